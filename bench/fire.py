"""Fire changes at one URL from a process of its own; print wall and CPU seconds as JSON."""

import json
import sys
from collections import Counter

import uvloop

from loadtest.burst import Answer, Order, Progress, fire
from loadtest.preconditions import Target, allow_open_files, locate


async def main(url: str, user_id: int, requests: int, connections: int) -> None:
    """Fire, and print what came back."""
    allow_open_files(connections)
    target = await locate(Target.parse(url))
    order = Order(
        targets=[target],
        user_id=user_id,
        amount=-2,
        requests=requests,
        connections=connections,
        keyed=False,
        timeout_seconds=300,
    )
    volley = await fire(order, Progress())
    statuses = Counter(
        str(outcome.status) if isinstance(outcome, Answer) else outcome.reason
        for outcome in volley.outcomes
    )
    print(json.dumps({"wall": volley.wall_seconds, "cpu": volley.cpu_seconds, "got": statuses}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *(int(number) for number in sys.argv[2:5])))
