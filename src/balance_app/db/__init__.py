"""PostgreSQL as the service uses it: a pool with its wait queue, outages, the schema.

What is authoritative: the server's own answers. No state of the database is assumed: each session
pins the parameters that the meaning of the statements depends on, and through a pooler each
transaction (`pooled`); a failure is classified by its
SQLSTATE (`outages`), which says whether a write took effect, whether the session can still be used,
and whether the whole database is unavailable.

What happens on failure: without a usable connection every queued operation is refused at once with
the cause, as nothing of it was sent, and one task connects with retry, with growing pauses. While
some connections work, they go on serving. A schema that is missing is migrated as at start; one
that belongs to another program, or to an incompatible release, is left alone.
"""
