"""Two versions of somebody's jobs side by side: what runs where, and by whose schedule."""

import asyncio
import signal
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import dedent
from time import monotonic
from typing import Any, Final

from tests.jobs.fleet import Span, overlaps, read_event_logs
from tests.processes import Instance, connect, http_client, running
from tests.system.sizes import FULL, report_figures, size

ROOT: Final = Path(__file__).parents[2]
SECONDS: Final = size(small=8, full=120)
OLD_SECONDS, NEW_SECONDS, SET_SECONDS = 2, 3, 5
RESTART_SECONDS: Final = size(small=1, full=4)
SCHEDULE: Final = "/api/cron/jobs/shared/schedule"
# What must be there before the old instances begin to restart.
NEW_IN_EFFECT: Final = (
    f"SELECT FROM jobs WHERE name = 'shared' AND schedule = 'every {NEW_SECONDS} s'"
)

MODULE: Final = '''
"""A version of somebody's jobs."""

import asyncio
import os
from datetime import timedelta
from pathlib import Path

from balance_app.jobs import Run, declarations, job
from tests.jobs.kinds import EventLog
from tests.mutants import put, replaced

event_log = EventLog(Path(os.environ["FLEET_EVENT_LOGS"]))


async def ticks(run: Run) -> None:
    event_log.write("start", run)
    for _ in range(10):
        await asyncio.sleep(0.05)
        event_log.write("tick", run)
    event_log.write("end", run)


@job(name="shared", every=timedelta(seconds={seconds}))
async def shared(run: Run) -> None:
    await ticks(run)


@job(name="{own}", every=timedelta(seconds=1))
async def own(run: Run) -> None:
    await ticks(run)
'''
# The rule without its order: the declaration that was made last is in effect.
LAST_DECLARED: Final = """
order = ("first_declared_at DESC", "last_declared_at DESC")
put(declarations, "IN_EFFECT", replaced(declarations.IN_EFFECT, *order))
"""

# Every schedule that the row of the shared job has had, in order.
WATCH: Final = """
CREATE SCHEMA watch;
CREATE TABLE watch.schedules (id bigserial, schedule text);
CREATE FUNCTION watch.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO watch.schedules (schedule) VALUES (NEW.schedule);
    RETURN NULL;
END $$;
CREATE TRIGGER watch AFTER UPDATE ON jobs FOR EACH ROW
WHEN (NEW.name = 'shared' AND OLD.schedule <> NEW.schedule) EXECUTE FUNCTION watch.note();
"""

# Runs of ticks after a moment, and those of them that are no ticks of an interval.
TICKS: Final = """
SELECT count(*) AS ticks, count(*) FILTER (WHERE mod(since, $2) <> 0) AS foreign_ticks
FROM (
    SELECT extract(epoch FROM run.due_at - anchor_at) AS since
    FROM job_runs AS run JOIN jobs ON name = job
    WHERE job = 'shared' AND run.fence IS NOT NULL AND run.due_at > $1
) AS ticks
"""


@dataclass(frozen=True)
class Outcome:
    """What became of the jobs while old instances restarted beside new ones."""

    # that the shared job had one after the other, since the new version came
    schedules: list[str]
    # a `JobAnswer`, at the end
    shared: dict[str, Any]
    ticks: int
    foreign_ticks: int
    restarts: int
    # as the event logs have them, since the new version was in effect
    spans: list[Span]
    overlaps: int

    @property
    def places(self) -> Counter[tuple[str, str]]:
        """How many runs each job had on instances of each version."""
        return Counter((span.job, span.server[:3]) for span in self.spans)


async def mixed_fleet(
    database: dict[str, str], directory: Path, *, seconds: int = NEW_SECONDS, rule: bool = True
) -> Outcome:
    """Run three old instances and two new ones; restart the old in turn, half of them by force.

    `seconds` is the interval that the shared job should have: the new version's, or one that is set
    before the new version comes.
    """
    event_logs = directory / "event-logs"
    event_logs.mkdir()

    def instances(version: str, number: int, seconds: int) -> list[Instance]:
        source = directory / version
        source.mkdir()
        module = MODULE.format(seconds=seconds, own=f"{version}-only")
        (source / "strangers.py").write_text(dedent(module) + ("" if rule else LAST_DECLARED))
        return [
            Instance(
                database,
                f"{version}{each}",
                log=directory / "log",
                program=("-P", "-m", "balance_app", "serve"),
                PYTHONPATH=f"{source}:{ROOT / 'src'}:{ROOT}",
                FLEET_EVENT_LOGS=str(event_logs),
                JOBS_MODULES="strangers",
                JOBS_ENTRY_POINTS="false",
                JOB_MIN_SECONDS="0",
                JOB_WARM_UP_SECONDS="0.5",
                JOB_LEASE_SECONDS="3",
                JOB_HEARTBEAT_SECONDS="0.5",
            )
            for each in range(1, number + 1)
        ]

    old, new = instances("old", 3, OLD_SECONDS), instances("new", 2, NEW_SECONDS)
    async with running(old):
        admin = await connect(database)
        await admin.execute(WATCH)
        if seconds != NEW_SECONDS:
            async with http_client(old[0].url) as client:
                answer = await client.put(SCHEDULE, json={"everySeconds": seconds})
                assert answer.status_code == 200, answer.text
        async with running(new):
            async with asyncio.timeout(60):
                while await admin.fetchrow(NEW_IN_EFFECT) is None:  # noqa: ASYNC110 - of others
                    await asyncio.sleep(0.05)
            begin, moment = monotonic(), await admin.fetchval("SELECT clock_timestamp()")
            restarts, ends = 0, [signal.SIGTERM, signal.SIGKILL]
            for instance, number in cycle(zip(old * 2, ends * 3, strict=True)):
                if monotonic() > begin + SECONDS:
                    break
                await instance.stop(number)
                await instance.launch()
                await instance.ready()
                restarts += 1
                await asyncio.sleep(RESTART_SECONDS)
            async with http_client(new[0].url) as client:
                status = (await client.get("/api/cron/status")).json()
            (shared,) = (job for job in status["jobs"] if job["name"] == "shared")
    spans = read_event_logs(event_logs)
    ticks, foreign_ticks = await admin.fetchrow(TICKS, moment, seconds) or (0, 0)
    schedules = await admin.fetch("SELECT schedule FROM watch.schedules ORDER BY id")
    await admin.close()
    return Outcome(
        schedules=[schedule for (schedule,) in schedules],
        shared=shared,
        ticks=ticks,
        foreign_ticks=foreign_ticks,
        restarts=restarts,
        spans=[span for span in spans if span.begin > begin],
        overlaps=len(overlaps(spans)),
    )


async def test_the_newest_declaration_is_in_effect_whoever_restarts(
    database: dict[str, str], tmp_path: Path
) -> None:
    """A job runs where its code is; old instances that restart flip no schedule back and forth."""
    found = await mixed_fleet(database, tmp_path)
    report_figures(
        f"{SECONDS} s, {found.restarts} restarts of old instances: schedules {found.schedules}, "
        f"{found.ticks} ticks of the shared job, {found.foreign_ticks} of another schedule; "
        f"runs by job and version {dict(sorted(found.places.items()))}, "
        f"{found.overlaps} overlaps"
    )
    assert found.schedules == [f"every {NEW_SECONDS} s"]
    assert [other["text"] for other in found.shared["otherSchedules"]] == [f"every {OLD_SECONDS} s"]
    assert (found.foreign_ticks, found.overlaps) == (0, 0)
    assert found.ticks >= SECONDS / NEW_SECONDS / 2
    assert {version for job, version in found.places if job == "old-only"} == {"old"}
    assert {version for job, version in found.places if job == "new-only"} == {"new"}
    assert {version for job, version in found.places if job == "shared"} == {"old", "new"} or (
        not FULL  # few runs may all be on instances of one version
    )


async def test_a_schedule_that_was_set_outlasts_restarts_and_a_deploy(
    database: dict[str, str], tmp_path: Path
) -> None:
    """The new version's schedule is what the row declares, and no tick is of it."""
    found = await mixed_fleet(database, tmp_path, seconds=SET_SECONDS)
    report_figures(
        f"{SECONDS} s, {found.restarts} restarts of old instances: {found.ticks} ticks of the "
        f"schedule that was set, {found.foreign_ticks} of another"
    )
    schedules = [found.shared[name]["text"] for name in ("schedule", "declaredSchedule")]
    assert schedules == [f"every {SET_SECONDS} s", f"every {NEW_SECONDS} s"]
    assert found.shared["scheduleOverride"]["by"] == "api"
    assert (found.foreign_ticks, found.overlaps) == (0, 0)
    assert found.ticks >= SECONDS / SET_SECONDS / 2


async def test_where_the_last_declaration_is_in_effect_the_schedule_flips(
    database: dict[str, str], tmp_path: Path
) -> None:
    """The control: each restart of an old instance brings its schedule back."""
    found = await mixed_fleet(database, tmp_path, rule=False)
    report_figures(f"{found.restarts} restarts: {len(found.schedules)} changes of the schedule")
    assert f"every {OLD_SECONDS} s" in found.schedules
