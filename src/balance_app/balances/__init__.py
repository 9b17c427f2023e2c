"""Each user's balance, the ledger of its changes, and the guarantee that it is never negative.

What is authoritative: the row in `users` holds the balance and its version, the number of the
user's entries. Each change adds the entry (user, version) to `entries` in the same statement, so
the entries of a user are dense, carry every balance after them, and sum to the present one.

How a change is decided: one conditional UPDATE. PostgreSQL makes concurrent changes of a row
wait for each other and checks the condition again on the latest row, so no balance can be spent
twice. The snapshot of an UPDATE that changed nothing may be older than the row that made it fail,
so a refusal must not quote it. A second statement with a fresh snapshot decides the refusal, which
names the balance and the version it read.

What an idempotency key guarantees: one effect and one answer. The outcome is written to
`idempotency_keys` in the transaction that decides it; the key's uniqueness lets one transaction
win. A repeated request reads that row in a transaction that writes one message to the log: so its
answer waits until all that it reports is as durable as any commit, and waits for no row lock.
"""
