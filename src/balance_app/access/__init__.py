"""Who may do what: API keys, their scopes, the sessions of people, and what was done by whom.

The tables are authoritative. Each instance holds all valid keys and sessions, by the SHA-256 of
what a client sends, so that a request costs no query; it asks once a second whether any has
changed. So a key that is revoked is refused everywhere within two seconds. While the database is
unavailable, the keys stay valid for a minute; nothing can be changed then.

Until the first key is made, nobody is asked who he is: that is for one machine only, and an
instance that others can reach refuses to start. From the first key on every route needs one, unless
`routes` lists it as open, even when all keys are revoked again.

Instances make no keys, and can't: only the command line does, with the rights of the database's
owner. What they make are sessions, each a login with a key, with the scopes of the key, and valid
as long as it.
"""
