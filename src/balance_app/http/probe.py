"""Check whether an instance is ready: `python -I -S probe.py`, as a container's health check does.

It runs every few seconds, so it imports little, not even typing: to import the whole service costs
ten times as much as the answer.
"""

import os
import socket
import sys

# Longer than an instance needs for an answer during a burst on a busy machine.
TIMEOUT_SECONDS = 20.0
READY = 200
# An instance that listens on all addresses is probed at the loopback address.
_OWN = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound  # nosec


def probe(host: str, port: int) -> tuple[int, str]:
    """Return the status and the body that `/readyz` answers.

    Raises:
        OSError: no server answers.
        ValueError: the answer is not HTTP.
    """
    request = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection((_OWN.get(host, host), port), TIMEOUT_SECONDS) as connection:
        connection.sendall(request)
        answer = b""
        while more := connection.recv(65536):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1."):
        raise ValueError("the answer is not HTTP")
    return int(head.split()[1]), body.decode(errors="replace")


if __name__ == "__main__":
    status, body = probe(os.environ.get("HOST") or "127.0.0.1", int(os.environ.get("PORT") or 3000))
    sys.stdout.write(f"{body}\n")
    sys.exit(status != READY)
