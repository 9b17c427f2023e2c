"""The previous release and this one side by side: instances are replaced one after another."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic

import httpx
import pytest

from balance_app.local.postgres import SUPERUSER
from tests.jobs.fleet import overlaps, read_event_logs
from tests.processes import RUN_ROLE, Instance, connect, http_client
from tests.system.client import Load, open_account, read_ledger
from tests.system.releases import ROOT, NoReleaseError, oldest_compatible, unpack
from tests.system.sizes import report_figures, size

# Programs that can't work on this schema: they know other names of tables and columns than 0010
# does; or keys of the whole service and no holds, unlike 0012; or only the first format of hashes,
# unlike 0020.
OTHER_NAMES = ("f2f4455", "4f17b6e")
INCOMPATIBLE = (*OTHER_NAMES, "192842d", "f597f36")
INSTANCES = 5
REPLACED = size(small=2, full=INSTANCES)
JOBS = size(small=4, full=10)
CONNECTIONS = size(small=4, full=16)


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that unpacks the source of an earlier commit."""

    def source(commit: str) -> Path:
        try:
            return unpack(commit, tmp_path_factory.mktemp("before"))
        except NoReleaseError as error:
            pytest.skip(str(error))

    return source


@pytest.fixture(scope="session")
def oldest() -> str:
    """The oldest commit whose program works on this schema."""
    try:
        return oldest_compatible()
    except NoReleaseError as error:
        pytest.skip(str(error))


class Fleet:
    """Five instances, some of the previous release and some of this one."""

    def __init__(self, database: dict[str, str], before: Path, event_logs: Path) -> None:
        self._database = database
        self._before = before
        self._event_logs = event_logs
        self.members: dict[int, Instance] = {}
        self.fewest_ready = INSTANCES
        self.seen_not_ready: list[str] = []

    def member(self, number: int, *, old: bool) -> Instance:
        """Return an instance, not started yet."""
        source = self._before if old else ROOT
        return Instance(
            self._database,
            f"app{number}-{'before' if old else 'now'}",
            program=("-P", "-m", "tests.jobs.fleet"),
            PYTHONPATH=f"{source / 'src'}:{source}",
            FLEET_EVENT_LOGS=str(self._event_logs),
            FLEET_DIARY=str(self._event_logs),  # the name in the previous release
            FLEET_JOBS=str(JOBS),
            FLEET_EVERY="1",
            FLEET_SECONDS="1",
            JOB_MIN_SECONDS="0",
            JOB_WARM_UP_SECONDS="0.5",
            JOB_SETTLING_SECONDS="0.5",  # the name in the previous release
            JOB_LEASE_SECONDS="6",
            JOB_HEARTBEAT_SECONDS="1",
            # The release before has one role for everything.
            DB_USER=SUPERUSER if old else RUN_ROLE,
        )

    async def replace(self, number: int, *, old: bool) -> None:
        """Stop an instance and start one of the other release in its place."""
        leaving = self.members.pop(number)
        assert await leaving.stop() == 0
        joining = self.member(number, old=old)
        await joining.launch()
        try:
            await joining.ready()
        finally:
            self.members[number] = joining

    async def watch(self) -> None:
        """Poll the readiness of all instances that are not being replaced."""
        async with http_client(timeout=5) as http:
            while True:
                asked = list(self.members.values())
                answers = await asyncio.gather(*(self._is_ready(http, each) for each in asked))
                # An instance that is being replaced by now was asked to stop.
                still = [
                    ready
                    for each, ready in zip(asked, answers, strict=True)
                    if each in self.members.values()
                ]
                self.fewest_ready = min(self.fewest_ready, sum(still))
                await asyncio.sleep(0.05)

    async def _is_ready(self, http: httpx.AsyncClient, instance: Instance) -> bool:
        try:
            answer = await http.get(f"{instance.url}/readyz")
        except httpx.HTTPError as error:
            self.seen_not_ready.append(f"{instance.name}: {error!r}")
            return False
        if not answer.is_success:
            self.seen_not_ready.append(f"{instance.name}: {answer.text}")
        return answer.is_success


@asynccontextmanager
async def _running(fleet: Fleet, *, old: bool) -> AsyncIterator[None]:
    for number in range(1, INSTANCES + 1):
        fleet.members[number] = fleet.member(number, old=old)
        await fleet.members[number].launch()
    try:
        await asyncio.gather(*(each.ready() for each in fleet.members.values()))
        yield
    finally:
        await asyncio.gather(*(each.stop() for each in fleet.members.values()))


async def test_neighbouring_releases_run_side_by_side(
    database: dict[str, str], source_of: Callable[[str], Path], oldest: str, tmp_path: Path
) -> None:
    """Forward and back under load and with jobs: no 5xx, four of five ready, no overlap."""
    fleet = Fleet(database, source_of(oldest), tmp_path)
    problems: list[str] = []
    changes = 0
    async with _running(fleet, old=True):
        user = await open_account(fleet.members[1].url, balance=100_000)
        watch = asyncio.create_task(fleet.watch())
        try:
            for old in (False, True):
                for number in range(1, REPLACED + 1):
                    # The others serve; the replaced one gets no requests, as behind a balancer.
                    staying = [m.url for n, m in fleet.members.items() if n != number]
                    async with Load(staying, user, connections=CONNECTIONS) as load:
                        await fleet.replace(number, old=old)
                        await load.progress(20)
                    problems += load.unexpected
                    problems += [each for each in load.answers if each.startswith("503")]
                    changes += load.answers["200"]
                    await _each_job_runs_on(tmp_path)
            assert not watch.done()
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
        ledger = await read_ledger(fleet.members[1].url, user)
    spans = read_event_logs(tmp_path)
    report_figures(f"{changes} changes, {len(spans)} runs, at least {fleet.fewest_ready} ready")
    assert problems == []
    assert fleet.fewest_ready >= INSTANCES - 1, fleet.seen_not_ready[:3]
    assert overlaps(spans) == []
    assert {span.server.split("-")[1] for span in spans} == {"before", "now"}
    assert ledger.entries[-1].balance == ledger.final.balance
    connection = await connect(database)
    try:
        odd = await connection.fetch(
            "SELECT DISTINCT outcome FROM job_runs WHERE outcome NOT IN ('succeeded',"
            " 'released', 'skipped')"
        )
    finally:
        await connection.close()
    assert odd == []


@pytest.mark.parametrize("commit", INCOMPATIBLE)
async def test_incompatible_releases_are_not_ready(
    database: dict[str, str], source_of: Callable[[str], Path], tmp_path: Path, commit: str
) -> None:
    """When the schema changes under them: not ready, no wrong answer, no overlapping runs.

    Those that know the tables of jobs by other names run none any more.
    """
    fleet = Fleet(database, source_of(commit), tmp_path)
    newer = Fleet(database, tmp_path, tmp_path)
    answers: Counter[int] = Counter()
    async with _running(fleet, old=True), http_client(timeout=5) as http:
        urls = [each.url for each in fleet.members.values()]
        user = await open_account(urls[0], balance=100_000)
        await _each_job_runs_on(tmp_path)
        async with _running(newer, old=False):
            await _each_job_runs_on(tmp_path)
            migrated = monotonic()
            await _each_job_runs_on(tmp_path)
            for url in urls:
                change = {"userId": user, "amount": -1}
                answers[(await http.post(f"{url}/api/balance", json=change)).status_code] += 1
            ready = [(await http.get(f"{url}/readyz")).status_code for url in urls]
            ledger = await read_ledger(newer.members[1].url, user)
    spans = read_event_logs(tmp_path)
    report_figures(f"{commit}: {len(spans)} runs, changes answered {dict(answers)}")
    assert overlaps(spans) == []
    if commit in OTHER_NAMES:
        assert {each.server.split("-")[1] for each in spans if each.begin > migrated} == {"now"}
    assert ready == [503] * INSTANCES
    assert answers.keys() <= {200, 503}
    assert ledger.final.balance == 100_000 - answers[200]


async def _each_job_runs_on(event_logs: Path) -> None:
    """Wait until every job has begun a run after now."""
    now = monotonic()
    async with asyncio.timeout(60):
        while len({s.job for s in read_event_logs(event_logs) if s.begin > now}) < JOBS:  # noqa: ASYNC110 - files
            await asyncio.sleep(0.1)
