"""Formats the service's answers: tables that fit a terminal's width, and plain lines elsewhere.

Colour only repeats a symbol or a label. Control characters from outside become spaces.
"""

import errno
import os
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import typer
from pydantic_core import to_json
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from balance_app.formatting import ago, brief, duration, exact, rough, visible
from balance_app.states import Outcome, Reason, State, Tone, job_sign, outcome_sign

PLAIN_WIDTH: Final = 1000  # columns where the output is not a terminal
ROOMY: Final = 100  # from so many columns on, bars and exact durations are shown
BAR: Final = 10
CAUSES_SHOWN: Final = 10

Json = dict[str, Any]


STYLES: Final = {
    Tone.GOOD: "green",
    Tone.RUN: "green",
    Tone.WAIT: "cyan",
    Tone.WARN: "yellow",
    Tone.BAD: "red",
    Tone.REST: "",
}
_LEVELS: Final = {"warning": "yellow", "error": "red", "critical": "red"}
_ASCII: Final = str.maketrans(
    {
        "▶": "*", "○": "-", "◔": "+", "↻": "~", "✕": "x", "‖": "=", "✓": "ok", "■": "#",
        "↷": ">", "□": "-", "━": "#", "─": "-", "·": "-",
    }
)  # fmt: skip


class _Console(Console):
    @override
    def on_broken_pipe(self) -> None:
        """Raise it, as any other failure of the output: rich would end the program."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def console(*, stderr: bool = False) -> Console:
    """Return the console for output; only on a terminal it has colours and cuts lines."""
    made = _Console(highlight=False, stderr=stderr)
    if not made.is_terminal:
        made.width = max(made.width, PLAIN_WIDTH)
    return made


def print_json(json: str) -> None:
    """Print JSON as it is: rich would break its lines, and an encoding lacks characters.

    JSON is in UTF-8 (RFC 8259), whatever the terminal has.
    """
    typer.echo(json.encode())


def print_as_json(data: object) -> None:
    """Print what this program has found itself as JSON."""
    print_json(to_json(data, indent=2).decode())


def text(content: str, on: Console, style: str = "") -> Text:
    """Return one line without markup or control characters, in the encoding of the console.

    It is cut to the width that it gets.
    """
    shown = visible(content)
    if not on.encoding.lower().startswith("utf"):
        shown = shown.translate(_ASCII)
        shown = shown.encode(on.encoding, "replace").decode(on.encoding)
    return Text(shown, style=style, no_wrap=True, overflow="ellipsis")


# -- jobs --------------------------------------------------------------------------------------


def status_table(status: Json, on: Console) -> RenderableType:
    """Return `/api/cron/status` as a table: the counts, a line per job, a line per instance."""
    now = moment(status["now"])
    counts = status["counts"]
    line = (
        f"{counts['running']} running, {counts['waiting']} waiting ({counts['overdue']} overdue), "
        f"{counts['paused']} paused · {exact(now)} UTC"
    )
    table = make_table(("JOB", "STATE", "SERVER", "NOW", "LAST RUN"), cut=("LAST RUN",))
    if on.is_terminal:
        table.columns[3].max_width = on.width // 3 if is_roomy(on) else 23
    for job in sorted(status["jobs"], key=lambda job: (job["state"] != State.RUNNING, job["name"])):
        sign = job_sign(job)
        table.add_row(
            text(job["name"], on, "bold" if job["state"] == State.RUNNING else ""),
            text(f"{sign.symbol} {sign.label}", on, STYLES[sign.tone]),
            text(job["server"] or "", on),
            text(_activity(job, now, on), on),
            _last(job["lastRun"], now, on),
        )
    overrides = [
        text(schedule(job, now), on, "yellow")
        for job in status["jobs"]
        if job.get("scheduleOverride") is not None  # the release before has none
    ]
    return Group(
        text(line, on, "bold"),
        Text(),
        table,
        Text(),
        *(([*overrides, Text()]) if overrides else []),
        *_instances(status, now, on),
    )


def jobs_table(jobs: list[Json], on: Console) -> RenderableType:
    """Return a line per job that an instance would run."""
    table = make_table(("JOB", "SCHEDULE", "FROM"), cut=("SCHEDULE", "FROM"))
    for job in jobs:
        table.add_row(
            text(job["name"], on),
            text(job["schedule"]["words"], on),
            text(job["origin"], on),
        )
    return table


def keys_table(keys: list[Json], on: Console) -> RenderableType:
    """Return a line per key."""
    styles = {"valid": "green", "expired": "yellow", "revoked": "red"}
    table = make_table(
        ("NAME", "STATE", "SCOPES", "ENDS", "LAST USED", "SESSIONS", "CREATED BY"),
        cut=("CREATED BY",),
    )
    for key in keys:
        ends = key["revokedAt"] or key["expiresAt"]
        table.add_row(
            text(key["name"], on),
            text(key["state"], on, styles[key["state"]]),
            text(" ".join(key["scopes"]), on),
            text("never" if ends is None else exact(moment(ends)), on),
            text(key["lastUsedOn"] or "never", on),
            text(str(key["sessions"]), on),
            text(f"{key['createdBy'] or ''} {key['createdAt'][:10]}", on),
        )
    return table


def schedule(job: Json, now: datetime) -> str:
    """Return when a job is due, whether that was set at run time, and what else is declared."""
    override, declared = job["scheduleOverride"], job["declaredSchedule"]["words"]
    line = f"{job['name']} is due {job['schedule']['words']}"
    if override is None:
        line += ", as its code declares."
    else:
        line += f": set by {override['by']} {_since(moment(override['at']), now)}."
        line += f" Its code declares: {declared}."
    others = ", ".join(other["words"] for other in job["otherSchedules"])
    return line + (f" Instances with other versions declare: {others}." if others else "")


def job_line(job: Json, now: str, on: Console) -> Text:
    """Return one line about what a job does at the service's time `now`."""
    sign = job_sign(job)
    where = f" on {job['server']}" if job["server"] else ""
    line = f"{sign.symbol} {job['name']} {sign.label}{where}, {_activity(job, moment(now), on)}"
    return text(line, on, STYLES[sign.tone])


def _activity(job: Json, now: datetime, on: Console) -> str:
    if job["state"] == State.RUNNING:
        since = job["stopRequestedAt"]
        stopping = "" if since is None else f"  stop requested {_since(moment(since), now)}"
        progress = _progress(job["progress"], on)
        if job.get("holdingUntil") is not None:  # the release before has none
            least = moment(job["holdingUntil"]) - moment(job["startedAt"])
            progress = f"work done, holding to {duration(least.total_seconds())}"
        return f"{duration(job['elapsedSeconds'])}  {progress}".rstrip() + stopping
    if job["state"] == State.PAUSED:
        paused = job["paused"]
        because = f": {paused['reason']}" if paused["reason"] else ""
        return f"by {paused['by']} {_since(moment(paused['at']), now)}{because}"
    waiting = job["waiting"]
    until = waiting["until"] or (job["readyAt"] if waiting["reason"] == Reason.DUE else None)
    if until is None:
        return str(waiting["sentence"])
    due = moment(until)
    seconds = (due - now).total_seconds()
    length = (duration if is_roomy(on) else rough)(abs(seconds))
    failures = job["failuresInARow"]
    failing = f", failed {failures} times in a row" if failures > 1 else ""
    return f"{'in' if seconds > 0 else 'since'} {length} ({brief(due, now)}){failing}"


def _progress(progress: Json | None, on: Console) -> str:
    if progress is None:
        return ""
    done, total, note = progress["done"], progress["total"], progress["note"]
    if not total:
        return f"{done} {note}".rstrip()
    share = min(max(done / total, 0.0), 1.0)
    percent = f"{int(share * 100)} %"
    if not on.is_terminal:
        return f"{done}/{total} ({percent}) {note}".rstrip()
    if not is_roomy(on):
        return percent
    full = int(share * BAR)
    return f"{'━' * full}{'─' * (BAR - full)} {percent} of {total} {note}".rstrip()


def _last(run: Json | None, now: datetime, on: Console) -> Text:
    if run is None:
        return Text()
    sign = outcome_sign(run["outcome"])
    ended = moment(run["endedAt"])
    line = f"{sign.symbol} {ago((now - ended).total_seconds())}"
    if is_roomy(on):
        line += f" ({brief(ended, now)})"
    if not on.is_terminal or run["outcome"] != Outcome.SUCCEEDED:
        line += f" {sign.label}"
    line += f" on {run['server']} in {duration(run['seconds'])}"
    line += f": {run['result']}" if run["result"] else ""
    return text(line, on, STYLES[sign.tone] if sign.tone == Tone.BAD else "dim")


def _instances(status: Json, now: datetime, on: Console) -> list[Text]:
    lines = []
    for instance in status["instances"]:
        names = [job["name"] for job in status["jobs"] if job["instanceId"] == instance["id"]]
        up = duration((now - moment(instance["startedAt"])).total_seconds())
        limit = instance.get("maxRunning")
        of = "" if limit is None else f" of at most {limit}"
        line = f"{instance['server']}: {instance['running']}{of} running"
        line += f" ({', '.join(names)})" if names else ""
        silent = duration(instance["seenSecondsAgo"])
        if instance["live"]:
            lines.append(text(f"{line}, up {up}", on))
        elif instance.get("state") == "silent":
            lines.append(text(f"{line}, no heartbeat for {silent}", on, "yellow"))
        else:
            lines.append(text(f"{line}, stopped responding {silent} ago", on, "red"))
    return lines or [text("No instance is running jobs.", on, "red")]


def verdict_lines(verdict: Json, command: Callable[..., str], on: Console) -> list[Text]:
    """Return the verdict: its sentence, then a line per cause that the sentence does not say.

    `command` makes the command that mends a cause, for the same service.
    """
    style = {"green": "green", "amber": "yellow", "red": "red"}.get(verdict["level"], "")
    lines = [text(f"{verdict['symbol']} {verdict['sentence']}", on, f"bold {style}")]
    told = [(each, _mending(each, command)) for each in verdict["causes"]]
    causes = []
    for each, mending in told:
        if each["text"] not in verdict["sentence"]:
            causes.append(f"  {each['text']}" + (f" ({mending})" if mending else ""))
        elif mending:
            causes.append(f"  {mending}")
    lines += [text(cause, on, style) for cause in causes[:CAUSES_SHOWN]]
    more = len(causes) - CAUSES_SHOWN + verdict["more"]
    return [*lines, *([text(f"  and {more} more", on)] if more > 0 else [])]


def _mending(cause: Json, command: Callable[..., str]) -> str:
    """Return the command that mends a cause; of one that is not red there is none."""
    commands = {"resume": "resume", "run": "run", "open": "history", "dismiss": "dismiss"}
    action = cause["action"]
    if action is None or cause["level"] != "red" or action["kind"] not in commands:
        return ""
    mending: str = command(commands[action["kind"]], cause["subject"])
    return mending


def history_table(runs: list[Json], now: datetime, on: Console) -> RenderableType:
    """Return a line per run of `/api/cron/history`."""
    table = make_table(
        ("STARTED (UTC)", "AGO", "JOB", "OUTCOME", "SERVER", "LASTED", "RESULT"), cut=("RESULT",)
    )
    for run in runs:
        sign = outcome_sign(run["outcome"])
        # A skipped tick has no start, only a due time.
        started = moment(run["startedAt"] if run["server"] else run["dueAt"])
        lasted = duration(run["seconds"]) if run["server"] and run["seconds"] is not None else ""
        result = run["result"] or ""
        if run["outcome"] == Outcome.SKIPPED:
            to = moment(run["lastDueAt"] or run["dueAt"])
            ticks = "1 tick" if run["ticks"] == 1 else f"{run['ticks']} ticks to {brief(to, now)}"
            result = f"{ticks}: {result}"
        table.add_row(
            text(brief(started, now) if on.is_terminal else exact(started), on),
            text(ago((now - started).total_seconds()), on),
            text(run["job"], on),
            text(f"{sign.symbol} {sign.label}", on, STYLES[sign.tone]),
            text(run["server"] or "", on),
            text(lasted, on),
            text(result, on, STYLES[sign.tone] if sign.tone == Tone.BAD else ""),
        )
    return table


def actions_table(actions: list[Json], now: datetime, on: Console) -> RenderableType:
    """Return a line per action of `/api/actions`."""
    table = make_table(
        ("DONE (UTC)", "BY", "WHAT", "TO", "BEFORE", "AFTER"), cut=("BEFORE", "AFTER")
    )
    for each in actions:
        at = moment(each["at"])
        table.add_row(
            text(brief(at, now) if on.is_terminal else exact(at), on),
            text(each["by"] or "-", on),
            text(each["action"], on),
            text(each["subject"], on),
            text(_members(each["before"]), on),
            text(_members(each["after"]), on),
        )
    return table


def _members(state: Json | None) -> str:
    """Return what something was or is."""
    return to_json(state).decode() if state else "-"


def run_line(run: Json, now: datetime) -> Text:
    """Return what became of one run, in a sentence."""
    sign = outcome_sign(run["outcome"])
    ended = moment(run["endedAt"])
    line = (
        f"{run['job']} {sign.label} {ago((now - ended).total_seconds())} ({exact(ended)} UTC) "
        f"on {run['server']} in {duration(run['seconds'])}."
    )
    return Text(visible(line), style=STYLES[sign.tone])


def run_log(log: Json, now: datetime) -> Text:
    """Return what a run said, a line each; what has several lines goes on below its first."""
    run = log["run"]
    parts = [_run_begun(run, now)]
    if run["result"]:
        parts.append(Text(visible(run["result"])))
    dropped = log["dropped"]
    if dropped:
        first = "first line was" if dropped == 1 else f"first {dropped} lines were"
        parts.append(Text(f"(The {first} not kept.)", style="dim"))
    for line in log["lines"]:
        style = _LEVELS.get(line["level"], "")
        first, *rest = line["text"].split("\n")
        begin = f"{moment(line['at']):%H:%M:%S} {line['level']:<8} "
        parts.append(Text(visible(begin + first), style=style))
        parts += [Text(visible(f"    {each}"), style=style) for each in rest]
    if not log["lines"]:
        parts.append(Text("No log lines." if run["outcome"] else "No log lines yet."))
    if log["traceback"] is not None:
        parts += [Text(visible(each)) for each in log["traceback"].split("\n")]
    return Text("\n").join(parts)


def _run_begun(run: Json, now: datetime) -> Text:
    """Return what became of a run, or since when it goes on, or that it did not run."""
    if run["outcome"] == Outcome.SKIPPED:
        return Text(visible(f"{run['job']} did not run ({exact(moment(run['dueAt']))} UTC)."))
    if run["outcome"] is not None:
        return run_line(run, now)
    started = exact(moment(run["startedAt"]))
    line = f"{run['job']} runs on {run['server']} since {started} UTC."
    return Text(visible(line), style=STYLES[Tone.RUN])


# -- shared ------------------------------------------------------------------------------------


def make_table(titles: tuple[str, ...], *, cut: tuple[str, ...] = (), numbers: int = 0) -> Table:
    """Return a table whose first columns hold numbers, and whose columns `cut` may be cut."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for place, title in enumerate(titles):
        table.add_column(
            title,
            no_wrap=title not in cut,
            overflow="ellipsis",
            justify="right" if place < numbers else "left",
        )
    return table


def is_roomy(on: Console) -> bool:
    """Return whether there is room for what is not needed."""
    return not on.is_terminal or on.width >= ROOMY


def _since(then: datetime, now: datetime) -> str:
    return f"{ago((now - then).total_seconds())} ({brief(then, now)})"


def moment(text: str) -> datetime:
    """Return a moment of the service's JSON."""
    return datetime.fromisoformat(text)
