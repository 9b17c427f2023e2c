"""The burst: thousands of withdrawals sent at once, and a check of everything they left.

`python -m loadtest` creates a user, opens every connection, releases all requests together, and
then compares three things: the answers, the user's balance, and the user's entries. It exits with
0 only when they agree, with 1 when anything is wrong, and with 2 when it could not send at all.

The burst speaks HTTP/1.1 over asyncio streams (`burst`), because a general HTTP client uses more
CPU than the service that is measured. Set-up and read-back use httpx (`accounts`). Requests are
sent to loopback addresses of this machine only (`preconditions`), with a key if there is one
(`key`). `report` prints what was found as a table, `picture` draws all answers as an HTML file.
"""
