"""Which instances are there, gone or silent, from their rows; pure, and for display only.

An instance that stops as it should deletes its row. One that is gone against its will stays until
somebody dismisses it, or an instance of its name starts. If all are silent at once, that is an
outage of the database: nobody is gone then, nor for a lease after it.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

LIVE: Final = "live"
SILENT: Final = "silent"
GONE: Final = "gone"

Instance = dict[str, Any]


class Outage(NamedTuple):
    """A time in which no instance reached the database."""

    since: datetime
    until: datetime


class Fleet(NamedTuple):
    """The outages, the latest first, and whether the last is over for less than two leases."""

    outages: tuple[Outage, ...]
    settling: bool


def judge(
    instances: Sequence[Instance], now: datetime, lease: timedelta, back_at: datetime | None
) -> Fleet:
    """Set the `state` of each instance (an `InstanceAnswer` with its times).

    Args:
        instances: their rows.
        now: the time of the snapshot.
        lease: how long after its last heartbeat an instance is live.
        back_at: when the reader's own connection was last found to be back.

    What ended later than `now` did so before PostgreSQL's clock was set back: it is over.
    """
    if back_at is not None and back_at > now:
        back_at = None
    seen = {each["id"]: now - timedelta(seconds=each["seenSecondsAgo"]) for each in instances}
    live = [each for each in instances if each["live"]]
    dying = [seen[each["id"]] for each in instances if not each["live"]]
    outages = tuple(each for each in find_outages(live, dying, lease) if each.until <= now)
    ends = [outage.until for outage in outages[:1]]
    settling = any(now < end + 2 * lease for end in (*ends, *([back_at] if back_at else [])))
    latest = max(seen.values(), default=now)
    for each in instances:
        last = seen[each["id"]]
        forgiven = (
            (back_at is not None and last <= back_at and now < back_at + lease)
            or any(o.since - lease <= last <= o.until and now < o.until + lease for o in outages)
            or (not live and latest - last <= lease)
        )
        each["state"] = LIVE if each["live"] else SILENT if forgiven else GONE
    return Fleet(outages, settling)


def find_outages(
    live: Sequence[Instance], others_seen: Sequence[datetime], lease: timedelta
) -> tuple[Outage, ...]:
    """Return when all instances that were up were silent; the latest first.

    Args:
        live: the instances that are there.
        others_seen: the last heartbeats of those that are not, or not yet again.
        lease: how long an instance is trusted after a heartbeat.

    The silence of one instance is an outage if others fell silent with it, or if it is the only
    one: else it may have been a freeze of its own, which nobody who is still there has seen.
    """
    if not live:
        return ()
    eldest = min(live, key=lambda each: each["startedAt"])
    found = []
    for silence in eldest["silences"]:
        since, until = silence["from"], silence["until"]
        others = [each for each in live if each is not eldest and each["startedAt"] < since]
        fell_silent = any(since - lease <= seen <= since + lease for seen in others_seen)
        if not others and not fell_silent and len(live) + len(others_seen) > 1:
            continue
        for other in others:
            both = [
                (max(since, own["from"]), min(until, own["until"]))
                for own in other["silences"]
                if own["from"] < until and own["until"] > since
            ]
            if not both:
                break
            since, until = both[0]
        else:
            found.append(Outage(since, until))
    return tuple(found)


def parse(instance: Instance) -> None:
    """Turn the times of a row, as JSON has them, into moments."""
    instance["startedAt"] = _moment(instance["startedAt"])
    replaced = instance["replacesSeenAt"]
    instance["replacesSeenAt"] = None if replaced is None else _moment(replaced)
    times = [_moment(each) for each in instance["silences"]]
    instance["silences"] = [
        {"from": since, "until": until}
        for since, until in zip(times[::2], times[1::2], strict=False)
    ]


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
