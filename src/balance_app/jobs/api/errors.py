"""The problems with which a job's state refuses a request."""

from collections.abc import Iterable
from datetime import datetime
from typing import ClassVar

from balance_app.errors import Problem
from balance_app.faults import fault
from balance_app.formatting import exact


class JobNotFound(Problem):
    """There is no job with this name.

    Nothing was changed. `GET /api/cron/status` lists all jobs.
    """

    status, code, title = 404, "job-not-found", "Job not found"
    sample: ClassVar = {"name": "audit-moon"}

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no job {name}.", job=name)


class RunNotFound(Problem):
    """There is no run with this id. It never existed, or it is older than the history.

    Nothing was changed. `GET /api/cron/history` lists them.
    """

    status, code, title = 404, "run-not-found", "Run not found"
    sample: ClassVar = {"run": 4711}

    def __init__(self, run: int) -> None:
        super().__init__(f"There is no run {run}.", run=run)


class InstanceNotFound(Problem):
    """There is no instance with this id: it was dismissed, or has stopped.

    Nothing was changed. `GET /api/cron/status` lists them.
    """

    status, code, title = 404, "instance-not-found", "Instance not found"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("There is no instance with this id.")


class InstanceLive(Problem):
    """The instance is running: only one that is gone can be dismissed.

    Nothing was changed. To stop it, send SIGTERM to its process.
    """

    status, code, title = 409, "instance-live", "Instance live"
    sample: ClassVar = {"server": "app4"}

    def __init__(self, server: str) -> None:
        super().__init__(
            f"{server} was not dismissed: it is running, or restarting after an outage.",
            server=server,
        )


class JobRunning(Problem):
    """The job is running, and two runs of a job never overlap.

    Nothing was changed. Wait for the end of the run, or cancel it.
    """

    status, code, title = 409, "job-running", "Job running"
    sample: ClassVar = {
        "name": "audit-ledger",
        "server": "app3",
        "started_at": "2026-11-21T21:49:33.940623Z",
    }

    def __init__(
        self, name: str, *, server: str, started_at: datetime | str, what: str = "started"
    ) -> None:
        at = datetime.fromisoformat(started_at) if isinstance(started_at, str) else started_at
        super().__init__(
            f"{name} was not {what}: it is already running on {server} (since {exact(at)} UTC).",
            job=name,
            server=server,
            startedAt=started_at,
        )


class JobPaused(Problem):
    """The job is paused.

    Nothing was changed. Resume it first.
    """

    status, code, title = 409, "job-paused", "Job paused"
    sample: ClassVar = {"name": "audit-ledger", "by": "ada", "at": "2026-11-21T21:49:33.940623Z"}

    def __init__(self, name: str, *, by: str, at: str) -> None:
        since = exact(datetime.fromisoformat(at))
        super().__init__(
            f"{name} is paused (by {by}, since {since} UTC). Resume it first.",
            job=name,
            pausedBy=by,
            pausedAt=at,
        )


class JobNotRunning(Problem):
    """The job is not running, so there is nothing to cancel.

    Nothing was changed. To keep the job from starting, pause it.
    """

    status, code, title = 409, "job-not-running", "Job not running"
    sample: ClassVar = {"name": "audit-ledger", "state": "waiting"}

    def __init__(self, name: str, *, state: str) -> None:
        super().__init__(
            f"{name} is not running (it is {state}), so there is nothing to cancel.",
            job=name,
            state=state,
        )


class JobRequested(Problem):
    """A run of the job has been requested with other arguments, and has not started yet.

    Nothing was changed. Wait for the run, then request yours.
    """

    status, code, title = 409, "job-requested", "Job requested"
    sample: ClassVar = {"name": "audit-ledger", "by": "ada"}

    def __init__(self, name: str, *, by: str) -> None:
        super().__init__(
            f"{by} has already queued a run of {name} with other arguments. Wait for its start.",
            job=name,
            requestedBy=by,
        )


class InvalidArguments(Problem):
    """The function of the job can't be called with these arguments.

    Nothing was changed. `errors` names each argument that is wrong; the sentence says what it must
    be.
    """

    status, code, title = 422, "invalid-arguments", "Invalid arguments"
    sample: ClassVar = {
        "name": "report",
        "sentence": "days: input should be a valid integer",
        "arguments": ["days"],
    }

    def __init__(self, name: str, sentence: str, arguments: Iterable[str]) -> None:
        faults = [fault(f"/args/{each}", "wrong-argument")._asdict() for each in arguments]
        super().__init__(
            f"{name} can't run with these arguments: {sentence}.", job=name, errors=faults
        )


class JobWithoutCode(Problem):
    """No running instance has the code of the job, so none can run it.

    Nothing was changed. Start an instance that has the code, or forget the job.
    """

    status, code, title = 409, "job-without-code", "Job without code"
    sample: ClassVar = {"name": "audit-moon"}

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} can't run: no running instance has its code. It was removed or renamed, or "
            "the instances that have it are down.",
            job=name,
        )


class JobHasCode(Problem):
    """A running instance has the code of the job, and would run it again.

    Nothing was changed. Remove the job from the code of all instances first, or pause it.
    """

    status, code, title = 409, "job-has-code", "Job has code"
    sample: ClassVar = {"name": "audit-ledger"}

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} can't be forgotten: a running instance has its code, and would run it again.",
            job=name,
        )
