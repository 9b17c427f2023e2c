"""PostgreSQL as the service uses it: sessions, a pool with its wait queue, outages, the schema.

What is authoritative: what the server itself says. No state of the database is assumed: each
session pins what the meaning of the statements depends on; a failure is classified by its SQLSTATE
(`outages`), which says whether a write took effect, whether the session is still good, and whether
the whole database is unavailable.

What happens on failure: with no usable connection every queued operation is refused at once with
the cause, as nothing of it was sent, and one task reconnects with growing pauses. While some
connections work, they serve on. A schema that is missing is migrated as at start; one that belongs
to somebody else, or to a release that is not compatible, is left alone.
"""
