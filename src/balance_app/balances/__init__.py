"""Balances: who has how much, every change of it, and the promise that none goes below zero.

What is authoritative: the row in `users` holds the balance and its version, a count of the
changes so far. Each change adds the entry (user, version) to `entries` in the same statement, so
the entries of a user are dense, carry every balance that ever was, and sum to the present one.

How a change is decided: one conditional UPDATE. PostgreSQL makes concurrent changes of a row
wait for each other and checks the condition again on the row as it then is, so no balance can be
spent twice. An UPDATE that changed nothing may have looked at a row that is no longer the latest;
its own snapshot must not be quoted. So a refusal is decided by a second statement with a fresh
snapshot, and names the balance and the version it saw.

What an idempotency key promises: one effect and one answer. The outcome is written to
`idempotency_keys` in the transaction that decides it; the key's uniqueness lets one transaction
win. A repeated request reads that row back in a transaction that writes to the log, and nothing
else: so its answer waits until all that it reports is as durable as any commit, and for no row.
"""
