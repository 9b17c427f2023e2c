"""Each guard of the job statements, on the real SQL; without it, its scenario fails.

Each scenario is played with the statements as they are, and once more for each of its guards with
that guard replaced in the statement's text: then it must yield a fault.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Final, NamedTuple

import asyncpg
import pytest

from balance_app.jobs import declarations, leases, repository, statements, transaction
from balance_app.jobs.declarations import LONGEST_QUARANTINE, LOST_LIMIT, QUARANTINE, Declared
from balance_app.jobs.leases import Progress, Renewal, renew_leases
from balance_app.jobs.repository import Changed, Completion, Skipped, claim_arguments
from balance_app.jobs.schedule import TickRange
from balance_app.jobs.transaction import COMMIT, LEASE_LOST
from tests.jobs.support import AT_ONCE, Instance, JobsDatabase, on
from tests.mutants import replaced
from tests.system.databases import session_waits
from tests.system.sizes import report_figures, size

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
DONE: Final = Completion(outcome="succeeded", result="done", seconds_ago=0)
RELEASED: Final = Completion(outcome="released", result="", seconds_ago=0, keeps_checkpoint=True)


@pytest.fixture(scope="module")
async def shared_jobs_db(postgres: dict[str, str]) -> AsyncIterator[JobsDatabase]:
    async with on(postgres) as jobs_db:
        yield jobs_db


# -- scenarios: each yields the faults that it finds ---------------------------------------------

Scenario = Callable[[JobsDatabase], AsyncIterator[str]]


class Guard(NamedTuple):
    """A part of a statement, and its replacement."""

    statement: str
    text: str
    instead: str


async def live_lease(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A job with a valid lease can't be claimed, however long it has been ready."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()
    if (await other.claim_next()).claimed:
        yield "the job was taken from its owner"


async def two_at_once(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """While one claim is under way, another neither gets the same job nor waits for it."""
    instance = jobs_db.instance()
    capabilities = await instance.declare("moon")
    first, second = await jobs_db.connect(), await jobs_db.connect()
    arguments = claim_arguments(instance.me, instance.lease, capabilities, AT_ONCE)
    async with first.transaction():
        one = await first.fetchrow(statements.CLAIM, *arguments)
        other = asyncio.create_task(second.fetchrow(statements.CLAIM, *arguments))
        await asyncio.wait({other}, timeout=0.5)
        if not other.done():
            yield "it waited"
    two = await other
    assert one is not None
    assert two is not None
    assert one["name"] == "moon"
    if two["name"] == one["name"]:
        yield f"both claimed it, with the fences {one['fence']} and {two['fence']}"


CLOCK_THAT_WAITS: Final = """
CREATE SCHEMA slow;
CREATE FUNCTION slow.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS $$BEGIN
    PERFORM pg_catalog.pg_advisory_xact_lock(1);
    RETURN pg_catalog.clock_timestamp();
END$$;
SET search_path = slow, public, pg_catalog;
SELECT pg_advisory_lock(1)
"""


async def overtaken_claim(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A claim that selected a job before another claimed it does not take it from that one."""
    slow, quick = jobs_db.instance("slow"), jobs_db.instance("quick")
    capabilities = await slow.declare("moon")
    await quick.declare("moon")
    locker, connection = await jobs_db.connect(), await jobs_db.connect()
    await locker.execute(CLOCK_THAT_WAITS)
    try:
        await connection.execute("SET search_path = slow, public, pg_catalog")
        arguments = claim_arguments(slow.me, slow.lease, capabilities, AT_ONCE)
        claiming = asyncio.create_task(connection.fetchrow(statements.CLAIM, *arguments))
        await session_waits(jobs_db.variables)
        await quick.claim()
        await locker.execute("SELECT pg_advisory_unlock(1)")
        await claiming
    finally:
        await locker.execute("DROP SCHEMA slow CASCADE")
    if (await jobs_db.row("moon"))["holder"] != quick.me.id:
        yield "it took the job from its owner"


async def no_code(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """An instance claims no job that was declared after its start, or whose code it has not."""
    old, new = jobs_db.instance("old"), jobs_db.instance("new")
    await old.declare("moon")
    await new.declare("moon", "sun")
    await jobs_db.ready("sun", seconds_ago=9)
    taken = []
    for instance in (old, old, new):
        claimed = (await instance.claim_next()).claimed
        taken.append(claimed.name if claimed else None)
    if taken != ["moon", None, "sun"]:
        yield f"it took a job that was declared later: {taken}"
    await jobs_db.forget()
    await new.declare("moon", "sun")
    await old.declare("sun")
    await jobs_db.ready("moon", seconds_ago=9)
    taken = []
    for instance in (old, old, new):
        claimed = (await instance.claim_next()).claimed
        taken.append(claimed.name if claimed else None)
    if taken != ["sun", None, "moon"]:
        yield f"it took a job that it has no code of: {taken}"


async def owners_first(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """An instance that lets owners reclaim first claims waiting jobs, but no expired lease."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()
    await jobs_db.expire("moon")
    if (await other.claim_next(takes_over_until=None)).claimed:
        yield "it took over"
        return
    await owner.jobs.finish("moon", 1, RELEASED)
    assert (await other.claim_next(takes_over_until=None)).claimed


async def higher_fence(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """The fence rises with each claim: later statements of the previous run are refused."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    first = await owner.claim()
    await jobs_db.expire("moon")
    try:
        second = await other.claim()
    except asyncpg.UniqueViolationError:
        yield "the history holds two runs of one fence"
        return
    if second.fence <= first.fence:
        yield f"the fence is {second.fence} after {first.fence}"
    if await owner.jobs.finish("moon", first.fence, DONE):
        yield "the old run ended the new one"


async def lost_and_paused(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A job that is lost while it is paused is freed, not started."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()
    await jobs_db.admin.execute(
        "UPDATE jobs SET paused_at = now(), paused_by = 'ada', pause_reason = 'full'"
    )
    await jobs_db.expire("moon")
    found = await other.claim_next()
    if found.claimed is not None:
        yield "it was started"
        return
    assert found.freed == "moon"
    row = await jobs_db.row("moon")
    assert (row["holder"], row["paused_by"], row["pause_reason"]) == (None, "ada", "full")
    assert (row["fence"], row["attempt"], row["last_outcome"]) == (1, 1, "lost")
    assert [run["outcome"] for run in await jobs_db.runs("moon")] == ["lost"]
    assert (await other.claim_next()).freed is None


async def lost_too_often(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """The third loss in a row quarantines a job for a while; a recorded end resets the count."""
    instance = jobs_db.instance()
    await instance.declare("moon")
    await instance.claim()
    for _ in range(LOST_LIMIT - 1):
        await jobs_db.expire("moon")
        last = await instance.claim()
    await instance.jobs.finish("moon", last.fence, RELEASED)
    assert (await jobs_db.row("moon"))["lost_streak"] == 0
    await instance.claim()
    for loss in range(1, LOST_LIMIT + 1):
        await jobs_db.expire("moon")
        found = await instance.claim_next()
        if (found.claimed is None) != (loss == LOST_LIMIT):
            yield f"after {loss} losses in a row it was {'' if found.claimed else 'not '}started"
            return
    outcomes = Counter(run["outcome"] for run in await jobs_db.runs("moon"))
    assert outcomes == {"lost": 2 * LOST_LIMIT - 1, "released": 1}
    checkpoint = '{"done": 7}'
    await jobs_db.admin.execute("UPDATE jobs SET checkpoint = $1", checkpoint)
    for doubled in range(6):
        row = await jobs_db.row("moon")
        assert (row["paused_at"], row["holder"]) == (None, None)
        lasts = row["ready_at"] - await jobs_db.admin.fetchval("SELECT clock_timestamp()")
        expected = min(QUARANTINE * 2**doubled, LONGEST_QUARANTINE)
        if not expected - MINUTE < lasts <= expected:
            yield f"the quarantine lasts {lasts} after {LOST_LIMIT + doubled} losses in a row"
        await jobs_db.ready("moon")
        assert (await instance.claim()).resumed == {"done": 7}
        await jobs_db.expire("moon")
        assert (await instance.claim_next()).freed == "moon"


async def retracted(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A live instance refutes the losses recorded against it, each once, and no others."""
    owner, other, dead = (
        jobs_db.instance("owner"),
        jobs_db.instance("other"),
        jobs_db.instance("dead"),
    )
    for instance in (owner, other, dead):
        await instance.declare("moon")
    await dead.claim()
    for instance in (owner, owner, other):
        await jobs_db.expire("moon")
        await instance.claim_next()
    row = await jobs_db.row("moon")
    assert (row["lost_streak"], row["holder"]) == (3, None)
    if await other.jobs.retract_losses() != []:
        yield "it refuted another instance's loss"
    for _ in range(2):
        await owner.jobs.retract_losses()
        row = await jobs_db.row("moon")
        if row["lost_streak"] != 1:
            yield f"{row['lost_streak']} losses are left of one dead instance"
    if (await jobs_db.outcomes("moon"))[0] != ("lost", repository.GONE):
        yield "the dead instance's loss was refuted"
    assert (await jobs_db.outcomes("moon"))[1:] == [("released", repository.UNREACHABLE)] * 2
    assert (row["last_outcome"], row["last_result"]) == ("released", repository.UNREACHABLE)
    if (await other.claim_next()).claimed is None:
        yield "it is still quarantined"


async def abandoned(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """Jobs that an instance holds but does not run are found; not its runs or others' jobs."""
    instance, other = jobs_db.instance("app1"), jobs_db.instance("app2")
    await instance.declare("moon", "sun", "mars")
    await other.declare("moon", "sun", "mars")
    runs, never, _ = await instance.claim(), await instance.claim(), await other.claim()
    found = await instance.jobs.abandoned([(runs.name, runs.fence)])
    if found != [(never.name, never.fence, 0, 0)]:
        yield f"it found {found}"
    found = await instance.jobs.abandoned([(runs.name, runs.fence), (never.name, 7)])
    if [(each.name, each.fence) for each in found] != [(never.name, never.fence)]:
        yield f"with an old fence it found {found}"


async def cancelled_and_lost(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A cancel request of a run that was then lost still reaches the next owner."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()
    await jobs_db.admin.execute("UPDATE jobs SET cancel_requested_by = 'ada'")
    await jobs_db.expire("moon")
    if (await other.claim()).cancel_requested_by != "ada":
        yield "the cancel request was lost"


async def delayed_claim(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A lease lasts from the statement on, not from the begin of its transaction."""
    instance = jobs_db.instance()
    capabilities = await instance.declare("moon")
    connection = await jobs_db.connect()
    async with connection.transaction():
        await asyncio.sleep(0.3)
        sent_at = await connection.fetchval("SELECT clock_timestamp()")
        await jobs_db.ready("moon", seconds_ago=9)
        arguments = claim_arguments(instance.me, instance.lease, capabilities, AT_ONCE)
        await connection.fetchrow(statements.CLAIM, *arguments)
    row = await jobs_db.row("moon")
    if row["holder"] is None or row["lease_expires_at"] < sent_at + instance.lease:
        yield "the lease was granted as of the transaction's begin"


async def delayed_heartbeat(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A renewal does not revive a lease that expired since its transaction began."""
    instance = jobs_db.instance()
    await instance.declare("moon", "sun")
    claims = [await instance.claim(), await instance.claim()]
    connection = await jobs_db.connect()
    async with connection.transaction():
        await connection.execute("SELECT")
        await asyncio.sleep(0.01)
        await jobs_db.expire("moon")
        sent_at = await connection.fetchval("SELECT clock_timestamp()")
        results = await instance.renew(connection, *((each.name, each.fence) for each in claims))
    if results["moon", 1].renewed or results["moon", 1].still_held:
        yield "a lease that was over was revived"
    assert results["sun", 1].renewed
    if (await jobs_db.row("sun"))["lease_expires_at"] < sent_at + instance.lease:
        yield "the lease was granted as of the transaction's begin"


async def late_heartbeat(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A renewal does not revive a lease that is over, even if no other has claimed the job yet."""
    instance = jobs_db.instance()
    await instance.declare("moon")
    await instance.claim()
    await jobs_db.expire("moon")
    result = (await instance.renew(jobs_db.admin, ("moon", 1)))["moon", 1]
    if result.renewed or result.still_held:
        yield "it was revived"


async def others_heartbeat(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """An instance renews its own leases only, whatever fence it sends."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()
    result = (await other.renew(jobs_db.admin, ("moon", 1), note="of another"))["moon", 1]
    if result.renewed or (await jobs_db.row("moon"))["note"]:
        yield "another instance renewed it"
    assert not result.still_held


async def old_heartbeat(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A renewal of an old run renews nothing, though the same instance holds the job again."""
    instance = jobs_db.instance()
    await instance.declare("moon")
    await instance.claim()
    await jobs_db.expire("moon")
    await instance.claim()
    result = (await instance.renew(jobs_db.admin, ("moon", 1), note="of the old run"))["moon", 1]
    if result.renewed or (await jobs_db.row("moon"))["note"]:
        yield "the old run renewed the new one's lease"
    assert not result.still_held


async def both_heartbeats(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """If a renewal contains an old run and the new one, only the new one is renewed."""
    instance = jobs_db.instance()
    await instance.declare("moon")
    await instance.claim()
    await jobs_db.expire("moon")
    await instance.claim()
    for fences in ((1, 2), (2, 1)):
        results = await instance.renew(jobs_db.admin, *(("moon", fence) for fence in fences))
        assert results["moon", 2].renewed
        if results["moon", 1].renewed or results["moon", 1].still_held:
            yield "the old run's lease was renewed too"


async def heartbeat_at_a_locked_row(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A locked row does not keep other leases from being renewed, and is not reported as lost."""
    instance = jobs_db.instance()
    await instance.declare("moon", "sun")
    await instance.claim()
    await instance.claim()
    locker, connection = await jobs_db.connect(), await jobs_db.connect()
    await connection.execute("SET lock_timeout = '300ms'")
    async with locker.transaction():
        await locker.execute("SELECT FROM jobs WHERE name = 'moon' FOR UPDATE")
        try:
            results = await instance.renew(connection, ("moon", 1), ("sun", 1))
        except asyncpg.LockNotAvailableError:
            yield "it waited"
            return
    assert (results["moon", 1].renewed, results["moon", 1].still_held) == (False, True)
    assert results["sun", 1].renewed


async def overtaken_heartbeat(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A renewal concurrent with a takeover does not renew the new owner's run."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()
    mover, connection = await jobs_db.connect(), await jobs_db.connect()
    async with mover.transaction():
        await mover.execute("UPDATE jobs SET holder = $1, fence = fence + 1", other.me.id)
        renewal = asyncio.create_task(owner.renew(connection, ("moon", 1), note="of the old run"))
        await asyncio.wait({renewal}, timeout=0.5)
    await renewal
    row = await jobs_db.row("moon")
    assert (row["fence"], row["holder"]) == (2, other.me.id)
    if row["note"]:
        yield "the old run's renewal went to the new one"


async def old_finish(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """The end of an old run changes nothing, though the same instance holds the job again."""
    instance = jobs_db.instance()
    await instance.declare("moon")
    await instance.claim()
    await jobs_db.expire("moon")
    await instance.claim()
    before = [await jobs_db.row("moon"), *await jobs_db.runs("moon")]
    if await instance.jobs.finish("moon", 1, DONE):
        yield "it was recorded"
    if before != [await jobs_db.row("moon"), *await jobs_db.runs("moon")]:
        yield "it changed something"


async def others_finish(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """Only its holder can finish a run."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()
    if await other.jobs.finish("moon", 1, DONE):
        yield "another instance ended it"


async def releasing(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A stopping instance shortens the lease of its own run, and never prolongs it."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()
    lease_expires_at = (await jobs_db.row("moon"))["lease_expires_at"]
    await other.jobs.mark_releasing("moon", 1, SECOND)
    if (await jobs_db.row("moon"))["lease_expires_at"] != lease_expires_at:
        yield "another instance shortened it"
    await owner.jobs.finish("moon", 1, RELEASED)
    await owner.claim()
    lease_expires_at = (await jobs_db.row("moon"))["lease_expires_at"]
    await owner.jobs.mark_releasing("moon", 1, SECOND)
    if (await jobs_db.row("moon"))["lease_expires_at"] != lease_expires_at:
        yield "it was shortened for an old run"
    await owner.jobs.mark_releasing("moon", 2, HOUR)
    if (await jobs_db.row("moon"))["lease_expires_at"] > lease_expires_at:
        yield "it got longer"
    await owner.jobs.mark_releasing("moon", 2, -SECOND)
    await other.claim()
    row = await jobs_db.row("moon")
    assert (row["lost_streak"], row["attempt"], row["releasing"]) == (0, 2, False)
    expected = ("released", "its instance was stopped")
    assert (row["last_outcome"], row["last_result"]) == expected
    _, released, _ = await jobs_db.runs("moon")
    assert (released["outcome"], released["result"]) == expected


async def checkpoints(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A checkpoint needs the holder, its fence and a valid lease."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()
    assert await owner.jobs.checkpoint("moon", 1, "[1]")
    if await other.jobs.checkpoint("moon", 1, "[2]"):
        yield "another instance wrote it"
    await jobs_db.expire("moon")
    if await owner.jobs.checkpoint("moon", 1, "[3]"):
        yield "it was written after the lease"
    await owner.claim()
    if await owner.jobs.checkpoint("moon", 1, "[4]"):
        yield "an old run wrote it"
    assert await owner.jobs.checkpoint("moon", 2, "[5]")


async def begin(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A transaction begins only for the holder, with its fence, while the lease lasts."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()

    async def enters(instance: Instance, fence: int) -> bool:
        row = await jobs_db.admin.fetchrow(transaction.ENTER, "moon", fence, instance.me.id)
        return row is not None

    assert await enters(owner, 1)
    if await enters(other, 1):
        yield "another instance entered"
    await jobs_db.expire("moon")
    if await enters(owner, 1):
        yield "it entered after the lease"
    await owner.claim()
    if await enters(owner, 1):
        yield "an old run entered"
    assert await enters(owner, 2)


async def delayed_begin(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """Whether the lease lasts is decided by the clock, not by the transaction's begin."""
    instance = jobs_db.instance()
    await instance.declare("moon")
    await instance.claim()
    connection = await jobs_db.connect()
    async with connection.transaction():
        await connection.execute("SELECT")
        await asyncio.sleep(0.01)
        await jobs_db.expire("moon")
        if await connection.fetchrow(transaction.ENTER, "moon", 1, instance.me.id) is not None:
            yield "it began after the lease"


async def commits(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A transaction commits only for the holder, with its fence, while the lease lasts."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    await owner.claim()

    async def commits_after(instance: Instance, fence: int, *meanwhile: Awaitable[Any]) -> bool:
        """Set the run as ENTER does; return whether it commits after `meanwhile`."""
        connection = await jobs_db.connect()
        await connection.execute("BEGIN")
        for name, value in {"job": "moon", "fence": fence, "holder": instance.me.id}.items():
            await connection.execute(
                "SELECT set_config($1, $2, true)", f"balance_app.{name}", str(value)
            )
        for each in meanwhile:
            await each
        try:
            await connection.execute(COMMIT)
        except asyncpg.PostgresError as error:
            if error.sqlstate != LEASE_LOST:
                raise
            return False
        return True

    assert await commits_after(owner, 1)
    if await commits_after(other, 1):
        yield "another instance committed"
    if await commits_after(owner, 1, asyncio.sleep(0.01), jobs_db.expire("moon")):
        yield "it committed after the lease"
    await owner.claim()
    if await commits_after(owner, 1):
        yield "an old run committed"
    assert await commits_after(owner, 2)


async def between_check_and_commit(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """After the check no other can claim the job, even if its lease ends before the commit."""
    owner, other = jobs_db.instance("owner", lease=SECOND), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    connection = await jobs_db.connect()
    await connection.execute("BEGIN")
    await owner.claim()
    await connection.fetchrow(transaction.ENTER, "moon", 1, owner.me.id)
    await connection.execute("SELECT hold_lease()")
    await asyncio.sleep(1.1)
    found = await other.claim_next()
    if found.claimed is not None:
        yield "it was taken between the check and the commit"
    await connection.execute("COMMIT")
    if found.claimed is None:
        assert (await other.claim()).fence == 2


async def marked_once(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """The startup mark of a job is written once: later instances can't postpone it."""
    first, second = jobs_db.instance("first"), jobs_db.instance("second")
    await second.declare("moon")
    capabilities = await first.declare("moon", "sun")
    await jobs_db.admin.execute(
        "UPDATE jobs SET ready_at = now() + interval '1 h' WHERE name = 'sun'"
    )
    await first.jobs.mark_startup(capabilities, MINUTE)
    startup_marked_at = (await jobs_db.row("moon"))["startup_marked_at"]
    assert startup_marked_at is not None
    assert second.capabilities is not None
    await second.jobs.mark_startup(second.capabilities, MINUTE)
    if (await jobs_db.row("moon"))["startup_marked_at"] != startup_marked_at:
        yield "it was written again"
    if (await jobs_db.row("sun"))["startup_marked_at"] is not None:
        yield "a job that is not ready was marked"
    await jobs_db.ready("sun")
    await second.jobs.mark_startup(second.capabilities, MINUTE)
    if (await jobs_db.row("sun"))["startup_marked_at"] is not None:
        yield "an instance without its code marked the job"
    for ago, renewed in ((1.9, False), (2.1, True)):  # a mark expires after two warm-ups
        await jobs_db.admin.execute(
            "UPDATE jobs SET startup_marked_at = clock_timestamp() - $1::interval"
            " WHERE name = 'moon'",
            ago * MINUTE,
        )
        startup_marked_at = (await jobs_db.row("moon"))["startup_marked_at"]
        await second.jobs.mark_startup(second.capabilities, MINUTE)
        if ((await jobs_db.row("moon"))["startup_marked_at"] != startup_marked_at) != renewed:
            yield f"a mark of {ago} warm-ups ago was {'not ' * renewed}written again"


async def declared_in_between(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A job number below an instance's highest can't appear after its start."""
    other = await jobs_db.connect()
    instance = jobs_db.instance()
    await instance.declare()
    await other.execute("BEGIN")
    await other.fetch("SELECT pg_advisory_xact_lock($1)", DECLARE_LOCK)
    now = datetime.now(UTC)
    await other.execute(declarations.ADD, "sun", "every 60 s", "", "{}", None, now, now)
    declaring = asyncio.create_task(instance.declare("moon"))
    if declarations.DECLARE_LOCK == DECLARE_LOCK:
        await session_waits(jobs_db.variables)
    else:
        await declaring
    await other.execute("COMMIT")
    await declaring
    capabilities = instance.capabilities
    assert capabilities is not None
    number = (await jobs_db.row("sun"))["number"]
    if number <= capabilities.highest_number and "sun" not in capabilities.missing:
        yield "its capabilities contain a job that it has no code of"
    claims = [(await instance.claim_next()).claimed for _ in range(2)]
    assert "sun" not in [claimed.name for claimed in claims if claimed]


async def limited(jobs_db: JobsDatabase) -> AsyncIterator[str]:
    """A paused job is not claimed, and neither is one that is not ready."""
    instance = jobs_db.instance()
    await instance.declare("moon", "sun")
    await jobs_db.admin.execute(
        "UPDATE jobs SET paused_at = now(), paused_by = 'ada' WHERE name = 'moon'"
    )
    await jobs_db.admin.execute(
        "UPDATE jobs SET ready_at = clock_timestamp() + interval '1 min' WHERE name = 'sun'"
    )
    found = await instance.claim_next()
    if found.claimed:
        yield f"{found.claimed.name} was claimed"
        return
    assert found.wait_seconds is not None
    assert 50 < found.wait_seconds <= 60


DECLARE_LOCK: Final = declarations.DECLARE_LOCK
MODULES: Final = (declarations, leases, statements, transaction)
OWN_CLOCK = ("clock_timestamp()", "now()")
HELD = "    WHERE holder = $1 AND lease_expires_at > clock_timestamp()\n"
FREED = "WHERE name = $1 AND fence = $2 AND holder = $3"
LOCKS = """UPDATE jobs
    SET checkpoint = coalesce(
        nullif(current_setting('balance_app.checkpoint', true), '')::jsonb, checkpoint
    )
"""
LEASED = "AND lease_expires_at > clock_timestamp()"

# The guards to replace for each control, by scenario.
SCENARIOS: dict[Scenario, list[list[Guard]]] = {
    live_lease: [
        [
            Guard(
                "CLAIM", "claimable_at <= (SELECT clock_timestamp())", "claimable_at IS NOT NULL"
            ),
            Guard("CLAIM", "AND eligible_at <= (SELECT clock_timestamp())", ""),
        ]
    ],
    limited: [
        [
            Guard("CLAIM", "eligible.claimable_at <= (SELECT clock_timestamp())", "true"),
            Guard("CLAIM", "AND eligible_at <= (SELECT clock_timestamp())", ""),
        ],
    ],
    two_at_once: [
        [Guard("CLAIM", "    FOR UPDATE OF jobs SKIP LOCKED\n", "")],
        [Guard("CLAIM", " SKIP LOCKED", "")],
    ],
    overtaken_claim: [[Guard("CLAIM", "AND jobs.claimable_at <= eligible.claimable_at", "")]],
    no_code: [
        [Guard("CLAIM", "number <@ $5::int8multirange", "$5::int8multirange IS NOT NULL")],
    ],
    owners_first: [
        [
            Guard(
                "CLAIM",
                "(eligible.holder IS NULL OR clock_timestamp() <= $12::timestamptz)",
                "($12::timestamptz IS NULL OR true)",
            )
        ]
    ],
    higher_fence: [
        [Guard("CLAIM", "fence = jobs.fence + claimable::integer", "fence = jobs.fence")],
        [Guard("FINISH", FREED, "WHERE name = $1 AND $2::bigint > 0 AND $3::uuid IS NOT NULL")],
    ],
    lost_and_paused: [
        [Guard("CLAIM", "(paused_at IS NULL AND (releasing OR lost_streak + 1 < $6))", "true")]
    ],
    lost_too_often: [
        [Guard("CLAIM", "lost_streak + 1 < $6", "true")],
        [Guard("CLAIM", "lost_streak = lost_streak + lost::integer", "lost_streak = 0")],
        [Guard("CLAIM", "$13::interval * power(2,", "$13::interval * power(1,")],
    ],
    retracted: [
        [Guard("RETRACT", "        WHERE holder = $1\n", "        WHERE $1::uuid IS NOT NULL\n")],
        [Guard("RETRACT", "greatest(lost_streak - losses, 0)", "lost_streak")],
        [Guard("RETRACT", "least(ready_at, clock_timestamp())", "ready_at")],
    ],
    abandoned: [
        [Guard("ABANDONED", "WHERE holder = $1\n", "WHERE $1::uuid IS NOT NULL\n")],
        [Guard("ABANDONED", "AND (name, fence) NOT IN (SELECT *", "AND ('', 1) NOT IN (SELECT *")],
    ],
    cancelled_and_lost: [
        [Guard("CLAIM", "CASE WHEN claimable THEN cancel_requested_by END", "NULL")]
    ],
    delayed_claim: [[Guard("CLAIM", *OWN_CLOCK)]],
    delayed_heartbeat: [
        [Guard("HEARTBEAT", *OWN_CLOCK)],
        [Guard("HEARTBEAT", HELD, HELD.replace(*OWN_CLOCK))],
        [Guard("HEARTBEAT", "lease_expires_at = clock_timestamp()", "lease_expires_at = now()")],
    ],
    late_heartbeat: [[Guard("HEARTBEAT", HELD, "    WHERE holder = $1\n")]],
    others_heartbeat: [[Guard("HEARTBEAT", HELD, HELD.replace("holder = $1 AND", ""))]],
    old_heartbeat: [
        [
            Guard(
                "HEARTBEAT",
                "SELECT name, fence FROM jobs JOIN renewal USING (name, fence)",
                "SELECT name, renewal.fence FROM jobs JOIN renewal USING (name)",
            )
        ]
    ],
    both_heartbeats: [
        [
            Guard(
                "HEARTBEAT",
                "LEFT JOIN renewed USING (name, fence)",
                "LEFT JOIN renewed USING (name)",
            )
        ]
    ],
    heartbeat_at_a_locked_row: [
        [Guard("HEARTBEAT", " SKIP LOCKED", "")],
        [Guard("HEARTBEAT", "    FOR NO KEY UPDATE OF jobs SKIP LOCKED\n", "")],
    ],
    overtaken_heartbeat: [[Guard("HEARTBEAT", "    FOR NO KEY UPDATE OF jobs SKIP LOCKED\n", "")]],
    old_finish: [[Guard("FINISH", "AND fence = $2 AND holder", "AND holder")]],
    others_finish: [[Guard("FINISH", "AND holder = $3", "AND $3::uuid IS NOT NULL")]],
    releasing: [
        [Guard("MARK_RELEASING", "AND fence = $2", "AND $2::bigint > 0")],
        [Guard("MARK_RELEASING", "AND holder = $3", "AND $3::uuid IS NOT NULL")],
        [
            Guard(
                "MARK_RELEASING",
                "least(lease_expires_at, clock_timestamp() + $4::interval)",
                "now() + $4",
            )
        ],
    ],
    checkpoints: [
        [Guard("CHECKPOINT", "fence = $2", "$2::bigint > 0")],
        [Guard("CHECKPOINT", "holder = $3", "$3::uuid IS NOT NULL")],
        [Guard("CHECKPOINT", LEASED, "")],
    ],
    begin: [
        [Guard("ENTER", "fence = $2", "$2::bigint > 0")],
        [Guard("ENTER", "holder = $3", "$3::uuid IS NOT NULL")],
        [Guard("ENTER", LEASED, "")],
    ],
    delayed_begin: [[Guard("ENTER", *OWN_CLOCK)]],
    commits: [
        [Guard("hold_lease", "AND fence = current_setting('balance_app.fence')::bigint", "")],
        [Guard("hold_lease", "AND holder = current_setting('balance_app.holder')::uuid", "")],
        [Guard("hold_lease", LEASED, "")],
        [Guard("hold_lease", *OWN_CLOCK)],
    ],
    between_check_and_commit: [[Guard("hold_lease", LOCKS, "PERFORM 1 FROM jobs\n")]],
    marked_once: [
        [
            Guard(
                "MARK_STARTUP",
                "startup_marked_at IS NULL OR startup_marked_at <=",
                "clock_timestamp() >=",
            )
        ],
        [Guard("MARK_STARTUP", "OR startup_marked_at <= clock_timestamp() - 2 * $3::interval", "")],
        [Guard("MARK_STARTUP", "claimable_at <= (SELECT", "'infinity' >= (SELECT")],
        [Guard("MARK_STARTUP", "number <@ $1::int8multirange", "$1::int8multirange IS NOT NULL")],
    ],
    declared_in_between: [[Guard("DECLARE_LOCK", str(DECLARE_LOCK), "7")]],
}


async def play(jobs_db: JobsDatabase, scenario: Scenario) -> list[str]:
    await jobs_db.forget()
    try:
        return [fault async for fault in scenario(jobs_db)]
    finally:
        await jobs_db.close()


async def remove(jobs_db: JobsDatabase, guard: Guard, patch: pytest.MonkeyPatch) -> None:
    """Replace a guard, in the program or in the database."""
    if guard.statement == "hold_lease":
        text = await jobs_db.admin.fetchval("SELECT pg_get_functiondef('hold_lease'::regproc)")
        await jobs_db.admin.execute(replaced(text, guard.text, guard.instead))
        return
    (module,) = (each for each in MODULES if guard.statement in vars(each))
    statement = vars(module)[guard.statement]
    without = type(statement)(replaced(str(statement), guard.text, guard.instead))
    patch.setattr(module, guard.statement, without)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_each_guard_holds_and_is_missed(jobs_db: JobsDatabase, scenario: Scenario) -> None:
    """A scenario yields no fault; without any one of its guards it yields one."""
    assert await play(jobs_db, scenario) == []
    hold_lease = await jobs_db.admin.fetchval("SELECT pg_get_functiondef('hold_lease'::regproc)")
    for guards in SCENARIOS[scenario]:
        with pytest.MonkeyPatch.context() as patch:
            for guard in guards:
                await remove(jobs_db, guard, patch)
            faults = await play(jobs_db, scenario)
        await jobs_db.admin.execute(hold_lease)
        report_figures(f"without {' and '.join(guard.text.strip() for guard in guards)}: {faults}")
        assert faults, guards


# -- claims ----------------------------------------------------------------------------------------


async def test_concurrent_claims_take_each_job_once(jobs_db: JobsDatabase) -> None:
    """Fifty connections that claim repeatedly at once share all jobs without a duplicate."""
    jobs = size(small=300, full=3000)
    instances = [jobs_db.instance(f"app{number}") for number in range(50)]
    for instance in instances:
        await instance.declare(*(f"job-{number}" for number in range(jobs)))
    taken: list[tuple[str, int]] = []

    async def claim_all(instance: Instance) -> None:
        connection = await jobs_db.connect()
        assert instance.capabilities is not None
        arguments = claim_arguments(instance.me, instance.lease, instance.capabilities, AT_ONCE)
        await together.wait()
        while len(taken) < jobs:
            row = await connection.fetchrow(statements.CLAIM, *arguments)
            assert row is not None
            if row["name"] is not None:
                taken.append((row["name"], row["fence"]))

    together = asyncio.Barrier(len(instances))
    started = monotonic()
    async with asyncio.TaskGroup() as crowd:
        for instance in instances:
            crowd.create_task(claim_all(instance))
    report_figures(f"{len(taken)} claims in {monotonic() - started:.1f} s")
    assert sorted(taken) == sorted((f"job-{number}", 1) for number in range(jobs))
    held = await jobs_db.admin.fetch("SELECT holder FROM jobs GROUP BY holder")
    assert {row["holder"] for row in held} <= {instance.me.id for instance in instances}
    assert await jobs_db.admin.fetchval("SELECT count(*) FROM job_runs") == jobs


async def test_a_claim_records_the_run(jobs_db: JobsDatabase) -> None:
    """The row and the history agree, and the claim returns all that a run needs."""
    instance = jobs_db.instance("app7", lease=timedelta(seconds=9))
    await instance.declare("moon")
    found = await instance.claim_next()
    claimed = found.claimed
    assert claimed is not None
    row = await jobs_db.row("moon")
    (run,) = await jobs_db.runs("moon")
    assert (row["holder"], row["server"], row["fence"]) == (instance.me.id, "app7", 1)
    assert (run["holder"], run["server"], run["fence"]) == (instance.me.id, "app7", 1)
    assert run["started_at"] == row["started_at"] == claimed.started_at <= row["last_heartbeat_at"]
    assert run["due_at"] == row["due_at"] == claimed.due_at == claimed.anchor_at
    assert (run["outcome"], run["ended_at"], run["attempt"]) == (None, None, 0)
    assert claimed.schedule == "every 3600 s"
    assert (claimed.resumed, claimed.cancel_requested_by, claimed.attempt) == (None, None, 0)
    assert claimed.started_at <= found.now
    lasts = row["lease_expires_at"] - row["started_at"]
    assert timedelta(seconds=9) <= lasts < timedelta(seconds=10)


@pytest.mark.parametrize("swapped", [False, True], ids=["in order", "swapped"])
async def test_columns_are_read_by_name(
    jobs_db: JobsDatabase, monkeypatch: pytest.MonkeyPatch, *, swapped: bool
) -> None:
    """Two columns of one type that are swapped in a statement keep their meaning."""
    if swapped:
        for name in ("CLAIM", "ABANDONED"):
            sql = replaced(vars(statements)[name], "releases, retries", "retries, releases")
            monkeypatch.setattr(statements, name, sql)
    instance = jobs_db.instance()
    await instance.declare("moon")
    await jobs_db.admin.execute("UPDATE jobs SET releases = 1, retries = 2")
    claimed = await instance.claim()
    assert (claimed.releases, claimed.retries) == (1, 2)
    (abandoned,) = await instance.jobs.abandoned([])
    assert (abandoned.releases, abandoned.retries) == (1, 2)


async def test_a_takeover_records_the_loss(jobs_db: JobsDatabase) -> None:
    """The old run is lost as of the end of its lease; the new one has its tick and checkpoint."""
    owner, other = jobs_db.instance("owner"), jobs_db.instance("other")
    await owner.declare("moon")
    await other.declare("moon")
    first = await owner.claim()
    await owner.renew(jobs_db.admin, ("moon", 1), note="half of it")
    assert await owner.jobs.checkpoint("moon", 1, '{"done": [1, 2.5, null, "\u00e9"]}')
    await jobs_db.expire("moon")
    lease_expires_at = (await jobs_db.row("moon"))["lease_expires_at"]
    second = await other.claim()
    assert (second.fence, second.attempt) == (first.fence + 1, 1)
    assert second.due_at == first.due_at
    assert second.resumed == {"done": [1, 2.5, None, "\u00e9"]}
    lost, new = await jobs_db.runs("moon")
    assert (lost["outcome"], lost["ended_at"], lost["server"]) == (
        "lost",
        lease_expires_at,
        "owner",
    )
    assert lost["result"] == repository.GONE
    assert (new["outcome"], new["server"], new["attempt"]) == (None, "other", 1)
    row = await jobs_db.row("moon")
    assert (row["last_outcome"], row["last_server"]) == ("lost", "owner")
    assert (row["last_started_at"], row["last_ended_at"]) == (first.started_at, lease_expires_at)
    assert (row["done"], row["note"], row["lost_streak"]) == (None, None, 1)


async def test_the_longest_ready_comes_first(jobs_db: JobsDatabase) -> None:
    """Jobs are claimed in the order in which they became ready; lost ones by the lease's end."""
    instance = jobs_db.instance()
    await instance.declare("late", "lost", "middle", "first")
    for name, seconds_ago in {"lost": 99, "late": 1, "middle": 5, "first": 9}.items():
        await jobs_db.ready(name, seconds_ago=seconds_ago)
    assert (await instance.claim()).name == "lost"
    await jobs_db.admin.execute(
        "UPDATE jobs SET lease_expires_at = clock_timestamp() - interval '3 s' WHERE name = 'lost'"
    )
    names = [(await instance.claim()).name for _ in range(4)]
    assert names == ["first", "middle", "lost", "late"]


async def test_a_claim_says_when_to_try_again(jobs_db: JobsDatabase) -> None:
    """None without a job; otherwise the time until the next is ready, or a lease is over."""
    instance = jobs_db.instance()
    await instance.declare()
    found = await instance.claim_next()
    assert (found.claimed, found.freed, found.wait_seconds, found.busy) == (
        None,
        None,
        None,
        False,
    )
    await instance.declare("moon")
    await instance.claim()
    found = await instance.claim_next()
    assert found.wait_seconds is not None
    assert LEASE_SECONDS - 5 < found.wait_seconds <= LEASE_SECONDS
    assert found.busy
    next_at = found.now + timedelta(seconds=600)
    await instance.jobs.finish("moon", 1, DONE_UNTIL(next_at))
    found = await instance.claim_next()
    assert found.wait_seconds is not None
    assert 590 < found.wait_seconds <= 600
    assert not found.busy
    found = await instance.claim_next(backoff=HOUR)
    assert found.wait_seconds is not None
    assert 4190 < found.wait_seconds <= 4200


LEASE_SECONDS = 30


def DONE_UNTIL(due_at: datetime) -> Completion:  # noqa: N802 - a constant but for its moment
    return Completion(
        outcome="succeeded", result="done", seconds_ago=0, due_at=due_at, ready_at=due_at
    )


# -- claim policy --------------------------------------------------------------------------------

# Whether an instance claims a job, by the seconds since: its boot, the job was ready, its startup
# mark (None: no mark), the last heartbeat of a run (None: none). The warm-up is 10 s.
POLICIES = {
    "not marked, by an instance that is not warmed up": ((5, 3, None, None), False),
    "seen long ago": ((5, 90, 11, None), True),
    "seen lately": ((5, 3, 3, None), False),
    "marked before it is ready": ((5, -20, 3, None), False),
    "marked while the instance warmed up": ((15, 90, 6, None), False),
    "marked by a newcomer": ((50, 90, 3, None), True),
    "marked by a newcomer, and ready since then": ((50, 3, 4, None), True),
    "not marked, by an instance that is warmed up": ((50, 90, None, None), True),
    "other instances were up before": ((5, 90, 3, 4), True),
    "other instances were up before, not marked": ((5, 3, None, 4), True),
    "a run ended before the instance started": ((5, 3, 3, 6), False),
}


@pytest.mark.parametrize("case", POLICIES)
async def test_instances_that_start_together_warm_up_first(
    jobs_db: JobsDatabase, case: str
) -> None:
    """The warm-up begins with the job's startup mark; instances that are up do not wait."""
    (booted, ready, seen, alive), takes = POLICIES[case]
    instance = jobs_db.instance()
    capabilities = await instance.declare("moon")
    await jobs_db.admin.execute(
        "UPDATE jobs SET due_at = clock_timestamp() - $1::interval,"
        " ready_at = clock_timestamp() - $1::interval,"
        " startup_marked_at = clock_timestamp() - $2::interval,"
        " last_heartbeat_at = clock_timestamp() - $3::interval",
        *(None if ago is None else timedelta(seconds=ago) for ago in (ready, seen, alive)),
    )
    now = await jobs_db.admin.fetchval("SELECT clock_timestamp()")
    instance.capabilities = capabilities._replace(booted_at=now - timedelta(seconds=booted))
    warmed_up = booted > 10
    policy = {"warmed_up": warmed_up, "warm_up": timedelta(seconds=10)}
    found = await instance.claim_next(**policy)
    assert (found.claimed is not None) == takes
    if not takes and seen is not None:
        assert found.wait_seconds is not None
        until_then = max(10 - seen, -ready)
        assert until_then - 2 < found.wait_seconds <= until_then
    if takes and not warmed_up and alive is None:
        await jobs_db.forget()  # the backoff counts from the end of the warm-up
        await instance.declare("moon")
        await jobs_db.admin.execute(
            "UPDATE jobs SET startup_marked_at = clock_timestamp() - interval '11 s',"
            " ready_at = clock_timestamp() - interval '20 s'"
        )
        policy["warm_up"] = timedelta(seconds=10)
        assert (await instance.claim_next(**policy, backoff=timedelta(seconds=5))).claimed is None
        assert (
            await instance.claim_next(**policy, backoff=timedelta(seconds=0.5))
        ).claimed is not None


async def test_an_instance_with_more_runs_backs_off_longer(jobs_db: JobsDatabase) -> None:
    """A job can be claimed once it has been ready for the instance's backoff."""
    instance = jobs_db.instance()
    await instance.declare("moon")
    await jobs_db.ready("moon", seconds_ago=60)
    found = await instance.claim_next(backoff=timedelta(seconds=80))
    assert found.claimed is None
    assert found.wait_seconds is not None
    assert 10 < found.wait_seconds <= 20
    assert (await instance.claim_next(backoff=timedelta(seconds=59))).claimed is not None


async def test_light_load_is_shared_round_by_round(jobs_db: JobsDatabase) -> None:
    """An instance that has claimed in this round backs off by the tie break."""
    instances = [jobs_db.instance(name) for name in "ABC"]
    names = [f"job-{number}" for number in range(12)]
    for instance in instances:
        await instance.declare(*names)
    round_of = dict.fromkeys("ABC", 0)
    order = ""
    for _ in names:
        takers = []
        for instance in instances:
            policy = {"round": round_of[instance.me.server], "tie_break": HOUR}
            claimed = (await instance.claim_next(**policy)).claimed
            if claimed is not None:
                takers.append(instance.me.server)
                round_of[instance.me.server] = claimed.round + 1
        if not takers:  # all have claimed: after the tie break the next round begins
            instance = min(instances, key=lambda instance: round_of[instance.me.server])
            policy = {"round": round_of[instance.me.server], "tie_break": timedelta(0)}
            claimed = await instance.claim(**policy)
            takers.append(instance.me.server)
            round_of[instance.me.server] = claimed.round + 1
        order += "".join(takers)
        if len(order) >= len(names):
            break
    report_figures(f"claimed by {order}")
    assert Counter(order) == {"A": 4, "B": 4, "C": 4}
    rounds = [order[start : start + 3] for start in range(0, 12, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"ABC"}


# -- ends ------------------------------------------------------------------------------------------


async def test_an_end_frees_the_job_for_its_next_tick(jobs_db: JobsDatabase) -> None:
    """The next tick is a new one: no attempt, checkpoint or request is left."""
    instance = jobs_db.instance("app7")
    await instance.declare("moon")
    claimed = await instance.claim()
    await instance.jobs.checkpoint("moon", 1, "[1]")
    await jobs_db.admin.execute(
        "UPDATE jobs SET cancel_requested_by = 'ada', requested_by = 'eve',"
        " startup_marked_at = now()"
    )
    due_at = claimed.due_at + HOUR
    first = claimed.due_at + SECOND
    skipped = [
        Skipped(TickRange(first, first + 8 * SECOND, 9), "no instance was free"),
        Skipped(TickRange(first + 9 * SECOND, first + 9 * SECOND, 1), "it was under way"),
    ]
    completion = Completion(
        outcome="succeeded",
        result="all is well",
        seconds_ago=1.5,
        due_at=due_at,
        ready_at=due_at + SECOND,
        skipped=skipped,
    )
    assert await instance.jobs.finish("moon", 1, completion)
    row = await jobs_db.row("moon")
    for column in (
        "holder",
        "server",
        "started_at",
        "lease_expires_at",
        "cancel_requested_by",
        "requested_by",
    ):
        assert row[column] is None, column
    for column in ("done", "total", "note", "startup_marked_at", "checkpoint"):
        assert row[column] is None, column
    assert (row["due_at"], row["ready_at"], row["claimable_at"]) == (
        due_at,
        due_at + SECOND,
        due_at + SECOND,
    )
    assert (row["attempt"], row["fence"], row["lost_streak"]) == (0, 1, 0)
    assert (row["last_outcome"], row["last_result"]) == ("succeeded", "all is well")
    assert (row["last_server"], row["last_started_at"]) == ("app7", claimed.started_at)
    run, *ranges = await jobs_db.runs("moon")
    assert (run["outcome"], run["result"]) == ("succeeded", "all is well")
    assert run["ended_at"] == row["last_ended_at"]
    assert row["last_heartbeat_at"] - row["last_ended_at"] >= timedelta(seconds=1.4)
    assert [
        (each["outcome"], each["due_at"], each["last_due_at"], each["ticks"], each["result"])
        for each in ranges
    ] == [("skipped", *each.range, each.reason) for each in skipped]
    assert {each["fence"] for each in ranges} == {None}
    assert not await instance.jobs.finish("moon", 1, completion)
    assert len(await jobs_db.runs("moon")) == 3


async def test_a_release_keeps_the_tick(jobs_db: JobsDatabase) -> None:
    """The tick and its checkpoint go to the next owner, at once or at the given time."""
    instance = jobs_db.instance()
    await instance.declare("moon")
    first = await instance.claim()
    await instance.jobs.checkpoint("moon", 1, "[1]")
    assert await instance.jobs.finish("moon", 1, RELEASED)
    second = await instance.claim()
    assert (second.due_at, second.attempt, second.resumed) == (first.due_at, 1, [1])
    later = await jobs_db.admin.fetchval("SELECT clock_timestamp() + interval '1 min'")
    completion = Completion(outcome="failed", result="no", seconds_ago=0, ready_at=later)
    assert await instance.jobs.finish("moon", 2, completion)
    assert (await instance.claim_next()).claimed is None
    row = await jobs_db.row("moon")
    assert (row["due_at"], row["ready_at"], row["attempt"]) == (first.due_at, later, 2)
    assert row["checkpoint"] is None


async def test_a_late_end_counts_until_the_job_is_claimed(jobs_db: JobsDatabase) -> None:
    """A run can be finished after its lease is over, if no other run has begun."""
    instance = jobs_db.instance()
    await instance.declare("moon")
    await instance.claim()
    await jobs_db.expire("moon")
    assert await instance.jobs.finish("moon", 1, DONE)
    assert (await jobs_db.row("moon"))["last_outcome"] == "succeeded"


# -- heartbeats ------------------------------------------------------------------------------------


async def test_a_heartbeat_records_the_instance(jobs_db: JobsDatabase) -> None:
    """An instance is recorded with its capabilities, whether or not it runs a job."""
    instance = jobs_db.instance("app7")
    await jobs_db.instance().declare("moon")
    await instance.declare("sun")
    assert await instance.renew(jobs_db.admin) == {}
    (first,) = await jobs_db.admin.fetch("SELECT * FROM instances")
    assert (first["id"], first["server"]) == instance.me
    assert (first["highest_number"], first["missing"]) == (2, ["moon"])
    await instance.renew(jobs_db.admin)
    (second,) = await jobs_db.admin.fetch("SELECT * FROM instances")
    assert second["last_heartbeat_at"] > first["last_heartbeat_at"]
    assert second["started_at"] == first["started_at"]


async def test_a_heartbeat_returns_cancel_requests(jobs_db: JobsDatabase) -> None:
    """The renewal result contains the cancel request of that run, and of no other."""
    instance = jobs_db.instance()
    await instance.declare("moon", "sun")
    await instance.claim()
    await instance.claim()
    await jobs_db.admin.execute("UPDATE jobs SET cancel_requested_by = 'ada' WHERE name = 'moon'")
    results = await instance.renew(jobs_db.admin, ("moon", 1), ("sun", 1), ("mars", 1))
    assert (results["moon", 1].renewed, results["moon", 1].cancel_requested_by) == (True, "ada")
    assert (results["sun", 1].renewed, results["sun", 1].cancel_requested_by) == (True, None)
    assert (results["mars", 1].renewed, results["mars", 1].still_held) == (False, False)


async def test_a_heartbeat_records_when_a_run_was_requested_to_stop(jobs_db: JobsDatabase) -> None:
    """The first such heartbeat sets the time, and the next run does not inherit it."""
    instance = jobs_db.instance()
    capabilities = await instance.declare("moon")
    for fence in (1, 2):
        claimed = await instance.claim()
        noted = []
        for stopping in (False, True, True):
            renewal = Renewal("moon", fence, Progress(None, None, None), stopping)
            await renew_leases(jobs_db.admin, instance.me, instance.lease, capabilities, [renewal])
            stop_requested_at = (await jobs_db.row("moon"))["stop_requested_at"]
            noted.append(
                stop_requested_at
                if stop_requested_at and stop_requested_at >= claimed.started_at
                else None
            )
        assert noted[0] is None
        assert noted[1] is not None
        assert noted[1] == noted[2]
        await jobs_db.admin.execute(
            "UPDATE jobs SET releasing = true, lease_expires_at = clock_timestamp()"
        )


# -- declarations ----------------------------------------------------------------------------------


async def test_instances_declare_at_once(jobs_db: JobsDatabase) -> None:
    """Ten instances with the same jobs make each row once, with dense numbers, and can run all."""
    names = [f"job-{number}" for number in range(20)]
    instances = [jobs_db.instance(f"app{number}") for number in range(10)]
    capabilities = await asyncio.gather(*(instance.declare(*names) for instance in instances))
    rows = await jobs_db.admin.fetch("SELECT number, name FROM jobs ORDER BY number")
    assert [row["number"] for row in rows] == list(range(1, 21))
    assert {(each.highest_number, tuple(each.missing)) for each in capabilities} == {(20, ())}
    before = await jobs_db.admin.fetch("SELECT * FROM jobs ORDER BY number")
    await instances[0].declare(*names)
    assert await jobs_db.admin.fetch("SELECT * FROM jobs ORDER BY number") == before


async def test_instances_with_other_code_declare_at_once(jobs_db: JobsDatabase) -> None:
    """In any order, an instance's capabilities contain its own jobs, and no others."""
    sets = [{f"job-{(start + step) % 30}" for step in range(12)} for start in range(0, 30, 3)]
    instances = [jobs_db.instance(f"app{number}") for number in range(10)]
    await asyncio.gather(
        *(instance.declare(*names) for instance, names in zip(instances, sets, strict=True))
    )
    rows = await jobs_db.admin.fetch("SELECT name, number FROM jobs")
    numbers = {row["name"]: row["number"] for row in rows}
    assert len(numbers) == 30
    for instance, names in zip(instances, sets, strict=True):
        capabilities = instance.capabilities
        assert capabilities is not None
        can = {
            name
            for name, number in numbers.items()
            if number <= capabilities.highest_number and name not in capabilities.missing
        }
        assert can == names


async def test_first_ticks(jobs_db: JobsDatabase) -> None:
    """An interval begins with its declaration; cron waits for its first tick."""
    instance = jobs_db.instance()
    await instance.declare("moon", schedule="every 7 s")
    await instance.declare("sun", schedule="cron 0 3 * * * Europe/Berlin")
    moon, sun = await jobs_db.row("moon"), await jobs_db.row("sun")
    assert moon["due_at"] == moon["ready_at"] == moon["anchor_at"]
    assert sun["due_at"] == sun["ready_at"] > sun["anchor_at"]
    assert sun["due_at"].minute == 0


async def test_a_changed_schedule_takes_effect(jobs_db: JobsDatabase) -> None:
    """A waiting job is due at the new schedule's next tick; the anchor is unchanged."""
    instance = jobs_db.instance()
    await instance.declare("moon", schedule="every 3600 s")
    claimed = await instance.claim()
    await instance.jobs.finish("moon", 1, DONE_UNTIL(claimed.due_at + HOUR))
    await instance.declare("moon", schedule="every 60 s")
    row = await jobs_db.row("moon")
    assert row["due_at"] == row["ready_at"] == claimed.anchor_at + timedelta(seconds=60)
    assert (row["schedule"], row["anchor_at"]) == ("every 60 s", claimed.anchor_at)
    await instance.jobs.declare({"moon": Declared("every 60 s", "Now with words.")})
    changed = await jobs_db.row("moon")
    assert (changed["description"], changed["due_at"]) == ("Now with words.", row["due_at"])


async def test_a_changed_schedule_drops_no_due_tick(jobs_db: JobsDatabase) -> None:
    """A tick that is already due, or is to be retried, still runs."""
    instance = jobs_db.instance()
    await instance.declare("moon", "sun")
    claimed = await instance.claim()
    again_at = claimed.due_at + timedelta(seconds=99)
    completion = Completion(outcome="failed", result="", seconds_ago=0, ready_at=again_at)
    await instance.jobs.finish(claimed.name, 1, completion)
    before = await jobs_db.admin.fetch(
        "SELECT name, due_at, ready_at, attempt FROM jobs ORDER BY 1"
    )
    await instance.declare("moon", "sun", schedule="every 60 s")
    rows = await jobs_db.admin.fetch("SELECT name, due_at, ready_at, attempt FROM jobs ORDER BY 1")
    assert rows == before


async def test_a_schedule_that_changes_under_a_run(jobs_db: JobsDatabase) -> None:
    """A finish by the old schedule is refused and returns the new one, which sets the next tick."""
    instance = jobs_db.instance()
    await instance.declare("moon", schedule="every 31622400 s")
    claimed = await instance.claim()
    await instance.declare("moon", schedule="every 60 s")
    row = await jobs_db.row("moon")
    assert (row["due_at"], row["holder"]) == (claimed.due_at, instance.me.id)
    completion = DONE_UNTIL(claimed.due_at + timedelta(days=366))
    done = await instance.jobs.finish("moon", 1, completion, claimed.schedule)
    assert done == Changed("every 60 s", None)
    assert await jobs_db.row("moon") == row
    completion = DONE_UNTIL(claimed.due_at + timedelta(seconds=60))
    assert await instance.jobs.finish("moon", 1, completion, "every 60 s") is True
    assert await instance.jobs.finish("moon", 1, completion, "every 60 s") is False
