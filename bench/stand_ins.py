"""The service, and three stand-ins that do less, to measure the cost of each part.

`service`: an unchanged instance. `constant`: the same, but each change is answered with a constant
instead of a database call. `unchained`: the service, with changes that have no hash. `bare`: an
ASGI callable that reads the body and answers `{}`.
"""

import re
import sys
from datetime import UTC, datetime

import uvicorn
from starlette.types import Receive, Scope, Send

from balance_app import main, server
from balance_app.balances import repository
from balance_app.balances.model import Accepted, Entry, Movement, Outcome
from balance_app.balances.repository import CHANGE, BalanceRepository
from balance_app.jobs.job import Registry
from balance_app.logs import configure_logs
from balance_app.settings import load_settings


def unchained() -> str:
    """Return the statement of a change as it is without the hash chain; $9 is to be NULL."""
    without = re.sub(r"chain_hash\(hash, .*?\)(?=\s+WHERE)", "$9", CHANGE, flags=re.DOTALL)
    assert "chain_hash" not in without
    return without


class Constant(BalanceRepository):
    """Accepts every change without a database call."""

    async def change(self, movement: Movement) -> Outcome:
        """Return a constant outcome."""
        entry = Entry(movement.user_id, 2, movement.amount, 1, 0, datetime.now(UTC), movement.key)
        return Accepted(entry)


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer everything with `{}`."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


if __name__ == "__main__":
    settings = load_settings()
    configure_logs(settings)
    match sys.argv[1]:
        case "service":
            server.serve(settings, Registry([]))
        case "constant":
            vars(main)["BalanceRepository"] = Constant
            server.serve(settings, Registry([]))
        case "unchained":
            vars(repository)["CHANGE"] = unchained()
            setattr(Movement, "content", lambda *_: None)  # noqa: B010 - a stand-in for a method
            server.serve(settings, Registry([]))
        case "bare":
            uvicorn.run(
                bare,
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http="httptools",
                backlog=server.BACKLOG,
                access_log=False,
                log_level="warning",
            )
