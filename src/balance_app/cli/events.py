"""The stream of the service's events."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final, NamedTuple

from pydantic_core import from_json

from balance_app.client import (
    InsufficientScope,
    MisdirectedRequest,
    ServiceFailure,
    Unauthorized,
)
from balance_app.client.transport import Transport

STREAM_SECONDS: Final = 5.0  # an event comes every second
RECONNECT_SECONDS: Final = 1.0


class Event(NamedTuple):
    """An event: the service's `status`, `unavailable` with a problem, or the client's `broken`."""

    kind: str
    body: dict[str, Any]
    text: str


async def follow(transport: Transport) -> AsyncGenerator[Event, None]:
    """Yield the events for ever; between two streams `broken`, with a `detail` that says so.

    Raises:
        Unauthorized, InsufficientScope, MisdirectedRequest: the next try would be refused, too.
    """
    while True:
        message = "The stream ended."
        try:
            async for event in _events(transport):
                yield event
        except (Unauthorized, InsufficientScope, MisdirectedRequest):
            raise
        except ServiceFailure as error:
            message = str(error)
        yield Event("broken", {"detail": f"{message} Reconnecting."}, "")
        await asyncio.sleep(RECONNECT_SECONDS)


async def _events(transport: Transport) -> AsyncGenerator[Event, None]:
    path = "/api/cron/events"
    async with transport.stream(
        path, "text/event-stream", silence_seconds=STREAM_SECONDS
    ) as answer:
        kind, data = "", ""
        async for line in answer.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                kind = value
            elif field == "data":
                data += value
            elif not line and data:
                yield Event(kind, _object(data), data)
                kind, data = "", ""


def _object(text: str) -> dict[str, Any]:
    """Return a JSON object, an empty one for anything else."""
    try:
        body = from_json(text)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
