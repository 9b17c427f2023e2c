"""The burst: thousands of withdrawals at one moment, and whether the service did exactly right.

`python -m loadtest` creates a user, opens every connection, releases all requests together, and
then checks three things against each other: the answers, the user's balance, and the user's
entries. It exits with 0 only when they agree, 1 when anything is wrong, and 2 when it could
not fire at all.

The burst speaks HTTP/1.1 over asyncio streams (`burst`), since what is measured is the service and
a general HTTP client costs more than the service does. Set-up and read-back use httpx (`accounts`).
Only this machine's own loopback addresses are ever fired at (`preconditions`).
"""
