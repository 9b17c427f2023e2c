"""The JSON of requests about jobs and of their answers."""

import re
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal, Self

from fastapi import Path, Query
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from balance_app.errors import InvalidRequest
from balance_app.http.body import MAX_INTEGER, StrictModel
from balance_app.http.paging import BeforeId, Limit
from balance_app.http.params import DECIMAL, QueryModel, Who, printable, printable_schema
from balance_app.jobs.api.verdict import Code, Level
from balance_app.jobs.declarations import LOST_LIMIT
from balance_app.jobs.schedule import LONGEST, Cron, Every, Schedule, ScheduleError
from balance_app.states import Outcome, Reason, State

NAME_PATTERN: Final = r"^[a-z][a-z0-9-]{0,62}$"
_NAME: Final = re.compile(NAME_PATTERN, re.ASCII)


def _is_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise PydanticCustomError("not-a-name", "not the name of a job")
    return name


def _is_outcome(outcome: object) -> object:
    if outcome not in set(Outcome):
        raise PydanticCustomError("not-an-outcome", "not an outcome")
    return outcome


IsName = AfterValidator(_is_name)
PathName = Annotated[
    str,
    Path(json_schema_extra={"pattern": NAME_PATTERN}, examples=["audit-ledger"]),
    IsName,
]


class Pause(Who):
    """Who pauses a job, and why."""

    reason: Annotated[
        str | None,
        Field(
            description="why, for display",
            json_schema_extra=printable_schema(200),
            examples=["the disk is full"],
        ),
        printable(200),
    ] = None


class RunRequest(StrictModel):
    """How a job is to run."""

    args: Annotated[
        dict[str, JsonValue],
        Field(
            description="what to call its function with, in place of declared arguments",
            examples=[{"days": 30}],
        ),
    ]


class Page(QueryModel):
    """Which part of the history: runs with ids below a cursor."""

    job: Annotated[
        str | None,
        Field(
            description="only runs of this job",
            json_schema_extra={"pattern": NAME_PATTERN},
            examples=["audit-ledger"],
        ),
        IsName,
    ] = None
    outcome: Annotated[
        Outcome | None,
        Field(description="only runs with this outcome", examples=["failed"]),
        BeforeValidator(_is_outcome),
    ] = None
    before: BeforeId = MAX_INTEGER
    limit: Limit = 100


def _describe_one_of_two(schema: dict[str, Any]) -> None:
    """Document that an interval or a cron expression is given, and neither has a default."""
    schema["oneOf"] = [{"required": ["everySeconds"]}, {"required": ["cron"]}]
    schema["dependentRequired"] = {"tz": ["cron"]}
    for name in ("everySeconds", "cron"):
        del schema["properties"][name]["default"]


class ScheduleRequest(StrictModel):
    """When a job is due: at an interval, or as a cron expression says in a time zone."""

    model_config = ConfigDict(json_schema_extra=_describe_one_of_two)

    every_seconds: Annotated[
        int,
        Field(
            description="the interval between ticks",
            json_schema_extra={"minimum": 1, "maximum": LONGEST // timedelta(seconds=1)},
            examples=[300],
        ),
    ] = 0
    cron: Annotated[
        str,
        Field(
            description="instead, five fields as in crontab(5), or `@daily` and its like: "
            "`30 2 * * 1-5`",
            json_schema_extra=printable_schema(200),
        ),
        printable(200),
    ] = ""
    tz: Annotated[
        str,
        Field(
            description="the zone in which `cron` is read: `Europe/Berlin`",
            json_schema_extra=printable_schema(100),
        ),
        printable(100),
    ] = "UTC"

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = self.model_fields_set
        if ("every_seconds" in given) == ("cron" in given) or given == {"every_seconds", "tz"}:
            raise PydanticCustomError("not-one-schedule", "neither an interval nor an expression")
        return self

    def schedule(self) -> Schedule:
        """Return what is asked for.

        Raises:
            InvalidRequest: there is no such schedule; it says why.
        """
        by_interval = "every_seconds" in self.model_fields_set
        try:
            return Every.of_seconds(self.every_seconds) if by_interval else Cron(self.cron, self.tz)
        except ScheduleError as error:
            place = "/everySeconds" if by_interval else "/cron"
            raise InvalidRequest((place, "not-a-schedule"), sentence=str(error)) from None


RunId = Annotated[
    int,
    Path(ge=1, le=MAX_INTEGER, description="its id in the history", examples=[4711]),
    DECIMAL,
]
InstancePath = Annotated[
    str,
    Path(
        description="its id, as the status shows it",
        examples=["5f0c3b1e-62d5-4a43-9d0a-1f6a2f6f8a11"],
    ),
]
PauseQuery = Annotated[Pause, Query()]
PageQuery = Annotated[Page, Query()]


Instant = Annotated[datetime, Field(examples=["2026-11-21T21:49:33.940623Z"])]
Seconds = Annotated[float, Field(examples=[41.2])]
InstanceId = Annotated[
    str,
    Field(
        description="of one process of one instance; the servers' names are for display",
        examples=["5f0c3b1e-62d5-4a43-9d0a-1f6a2f6f8a11"],
    ),
]
Name = Annotated[str, Field(examples=["audit-ledger"])]
Server = Annotated[str, Field(examples=["app3"])]
Sentence = Annotated[str, Field(examples=["checked 12 000 entries of 1 000 users: all match"])]


class _Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True)


class ScheduleAnswer(_Answer):
    """When a job is due: as stored, and for display."""

    text: Annotated[str, Field(examples=["every 300 s"])]
    words: Annotated[str, Field(examples=["every 5 minutes"])]


class OverrideAnswer(_Answer):
    """By whom a schedule was set at run time, and when."""

    by: Annotated[str, Field(examples=["ada"])]
    at: Instant


class ProgressAnswer(_Answer):
    """How far a run is, as it last reported."""

    done: Annotated[int, Field(examples=[4000])]
    total: Annotated[int | None, Field(examples=[12000])]
    note: Annotated[str, Field(examples=["user 331"])]


class PausedAnswer(_Answer):
    """By whom a job was paused, when, and why."""

    by: Annotated[str, Field(examples=["ada"])]
    at: Instant
    reason: Annotated[str | None, Field(examples=["the disk is full"])]


class WaitingAnswer(_Answer):
    """Why a job does not run.

    `until` is set if the reason ends at a known time, `overdue` if no instance has claimed the job
    in time.
    """

    reason: Annotated[Reason, Field(examples=["not-due"])]
    until: Instant | None
    overdue: Annotated[bool, Field(examples=[False])]
    sentence: Annotated[str, Field(examples=["The next run is at 2026-11-21 21:55:00 UTC."])]


class LastRunAnswer(_Answer):
    """The run of a job that ended last."""

    outcome: Annotated[Outcome, Field(examples=["succeeded"])]
    server: Server
    started_at: Instant
    ended_at: Instant
    seconds: Annotated[float, Field(examples=[120.013])]
    result: Sentence | None


class JobAnswer(_Answer):
    """The current state of a job.

    `paused` may be set while it runs; then no other run follows. `dueAt` is the tick that waits or
    runs, `readyAt` the time at which it may start, and `attempt` the number of its previous runs.
    """

    name: Name
    state: Annotated[State, Field(examples=["running"])]
    description: Annotated[str, Field(examples=["Check every entry against the one before it."])]
    schedule: Annotated[ScheduleAnswer, Field(description="by which it is due")]
    declared_schedule: Annotated[ScheduleAnswer, Field(description="as code declares it")]
    schedule_override: Annotated[
        OverrideAnswer | None,
        Field(description="set when `schedule` was set at run time, whatever code declares"),
    ]
    other_schedules: Annotated[
        list[ScheduleAnswer],
        Field(
            description="declared by running instances of other versions; the latest is in effect"
        ),
    ]
    server: Annotated[Server | None, Field(description="which instance runs it")]
    instance_id: InstanceId | None
    started_at: Instant | None
    elapsed_seconds: Annotated[Seconds | None, Field(description="by the database's clock")]
    progress: ProgressAnswer | None
    work_ended_at: Annotated[
        Instant | None,
        Field(
            description="when its function returned; the run waits out its minimum duration",
            examples=[None],
        ),
    ]
    holding_until: Annotated[
        Instant | None,
        Field(
            description="set when its work is done and only its minimum duration runs",
            examples=[None],
        ),
    ]
    stop_requested_at: Annotated[
        Instant | None,
        Field(
            description="when it was requested to stop (a cancel, its timeout, a stop of its "
            "server): the request is repeated every few seconds until it ends",
            examples=[None],
        ),
    ]
    cancel_requested_by: Annotated[
        str | None, Field(description="who requested the run's end", examples=[None])
    ]
    due_at: Instant
    ready_at: Instant
    attempt: Annotated[int, Field(examples=[0])]
    failures_in_a_row: Annotated[
        int, Field(description="runs that failed or timed out since the last success", examples=[0])
    ]
    losses_in_a_row: Annotated[
        int,
        Field(
            description=f"runs in a row that were lost; {LOST_LIMIT} quarantine the job",
            examples=[0],
        ),
    ]
    fence: Annotated[int, Field(description="rises with each run", examples=[12])]
    requested_by: Annotated[str | None, Field(description="who requested the run", examples=[None])]
    args: Annotated[
        dict[str, Any],
        Field(description="what its function is called with, as declared", examples=[{"days": 30}]),
    ]
    requested_args: Annotated[
        dict[str, Any] | None,
        Field(description="what the requested run replaces of them", examples=[None]),
    ]
    has_code: Annotated[
        bool, Field(description="whether a running instance has its code", examples=[True])
    ]
    paused: PausedAnswer | None
    waiting: WaitingAnswer | None
    last_run: LastRunAnswer | None


class ForgottenAnswer(_Answer):
    """A job that is no longer listed; its history stays."""

    name: Name
    forgotten_at: Instant
    forgotten_by: Annotated[str, Field(examples=["ada"])]


class CountsAnswer(_Answer):
    """The number of jobs in each state, and of waiting jobs that are overdue."""

    running: Annotated[int, Field(examples=[4])]
    waiting: Annotated[int, Field(examples=[5])]
    paused: Annotated[int, Field(examples=[1])]
    overdue: Annotated[int, Field(examples=[0])]


class SilenceAnswer(_Answer):
    """From when to when no heartbeat arrived."""

    since: Annotated[Instant, Field(alias="from")]
    until: Instant


class InstanceAnswer(_Answer):
    """An instance that is running, or gone against its will.

    `live`: its last heartbeat is younger than the lease. `state` is `live`; or `silent`, while no
    instance reaches the database and shortly after; or `gone`, until it is dismissed or an instance
    of its name starts. One that stops as it should is not listed.
    """

    id: InstanceId
    server: Server
    started_at: Instant
    seen_seconds_ago: Annotated[float, Field(examples=[0.731])]
    live: Annotated[bool, Field(examples=[True])]
    state: Annotated[Literal["live", "silent", "gone"], Field(examples=["live"])]
    accepted: Annotated[
        int, Field(description="changes of balances that it accepted since its start")
    ]
    refused: Annotated[int, Field(description="changes that a balance refused")]
    silences: Annotated[
        list[SilenceAnswer],
        Field(description="when it sent no heartbeat for longer than a lease, the latest first"),
    ]
    replaces_seen_at: Annotated[
        Instant | None,
        Field(description="the last heartbeat of the instance of its name before it"),
    ]
    running: Annotated[int, Field(description="how many jobs it runs", examples=[2])]
    max_running: Annotated[
        int | None,
        Field(description="how many it runs at most (JOB_MAX_RUNNING); null: any number"),
    ]


class StatusAnswer(_Answer):
    """Every job and every instance, in one consistent snapshot; `now` is the database's time."""

    now: Instant
    counts: CountsAnswer
    instances: list[InstanceAnswer]
    outages: Annotated[
        list[SilenceAnswer],
        Field(description="when no instance reached the database, the latest first"),
    ]
    jobs: list[JobAnswer]


class CauseActionAnswer(_Answer):
    """What mends a cause: `resume` or `run` a job, `open` its runs, or `dismiss` an instance."""

    kind: Annotated[Literal["resume", "run", "open", "dismiss"], Field(examples=["resume"])]
    target: Annotated[
        str, Field(description="the job's name, or the instance's id", examples=["audit-ledger"])
    ]


class CauseAnswer(_Answer):
    """Why the verdict is not green."""

    level: Annotated[Level, Field(examples=["red"])]
    code: Annotated[Code, Field(examples=["job-paused"])]
    subject: Annotated[
        str,
        Field(
            description="the job or the instance; empty if it is neither", examples=["audit-ledger"]
        ),
    ]
    text: Annotated[str, Field(examples=["audit-ledger was paused: it failed 5 times in a row"])]
    since: Instant | None
    action: CauseActionAnswer | None


class VerdictAnswer(_Answer):
    """Whether all is well: red is wrong now and needs a hand, amber has healed by itself lately."""

    now: Annotated[
        Instant | None,
        Field(description="by the database's clock; null if it was never available"),
    ]
    level: Annotated[Level, Field(examples=["green"])]
    symbol: Annotated[str, Field(examples=["✓"])]
    sentence: Annotated[str, Field(examples=["All is well."])]
    causes: Annotated[list[CauseAnswer], Field(description="red ones first, at most 100")]
    more: Annotated[int, Field(description="causes that are not listed", examples=[0])]


class DismissedAnswer(_Answer):
    """What was dismissed: an instance's name, or `recovered`."""

    dismissed: Annotated[str, Field(examples=["app4"])]


class RunAnswer(_Answer):
    """A run, or a range of ticks that did not run (`skipped`: `dueAt` to `lastDueAt`)."""

    id: Annotated[int, Field(examples=[4711])]
    job: Name
    outcome: Annotated[
        Outcome | None, Field(description="null while it runs", examples=["succeeded"])
    ]
    server: Server | None
    fence: Annotated[int | None, Field(examples=[12])]
    due_at: Instant
    last_due_at: Annotated[Instant | None, Field(examples=[None])]
    ticks: Annotated[int, Field(examples=[1])]
    attempt: Annotated[int, Field(description="how many runs the tick had before", examples=[0])]
    started_at: Annotated[Instant | None, Field(description="null if it did not run")]
    ended_at: Annotated[Instant | None, Field(description="null while it runs")]
    seconds: Annotated[Seconds | None, Field(description="up to now while it runs")]
    result: Annotated[Sentence | None, Field(description="its result, its error, or why it ended")]
    args: Annotated[
        dict[str, Any] | None,
        Field(description="what it was requested with; null: as declared", examples=[None]),
    ]


class LogLineAnswer(_Answer):
    """A line that a run said; `number` counts all of its lines from 1."""

    number: Annotated[int, Field(examples=[9801])]
    at: Annotated[Instant, Field(description="by the database's clock, to some milliseconds")]
    level: Annotated[str, Field(examples=["info"])]
    text: Annotated[
        str, Field(description="what it says, then its values", examples=["sent mails=3"])
    ]


class RunLogAnswer(_Answer):
    """What a run said: its last 200 lines, or the last 64 KiB of them, and why it failed."""

    run: RunAnswer
    lines: list[LogLineAnswer]
    dropped: Annotated[
        int, Field(description="how many lines before these are not kept", examples=[9800])
    ]
    traceback: Annotated[
        str | None,
        Field(
            description="of the error that ended it",
            examples=["Traceback (most recent call last):\n  ...\nValueError: no such mailbox"],
        ),
    ]


class HistoryAnswer(_Answer):
    """A page of runs, the latest first; `next` is the cursor of the page after it."""

    runs: list[RunAnswer]
    next: Annotated[int | None, Field(examples=[4612], description="`before` of the next page")]
