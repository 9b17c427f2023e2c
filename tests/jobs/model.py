"""A model of instances that share one job, small enough to check every state it can reach.

The job's row and the processes are values; `Protocol.steps` yields all possible next steps, and
`search` follows every step from every state, breadth first, so that the trace to a broken invariant
is the shortest one. The model's assumptions, and why they suffice:

- Time passes in ticks, and only differences count: a state holds how many ticks a lease or a trust
  has left, never a date. So a finite number of states covers histories of any length.
- A statement is sent, is executed at any later time (or never), and its answer arrives at any time
  after that (or never). A slow network, a lost packet, a wait for a lock, a restart of the database
  or an outage of an hour: all are orders of these three events. At most `Protocol.room` messages
  are under way at once.
- A process can be killed, frozen (SIGSTOP), or blocked by its run (the event loop is blocked, or
  the run ignores its cancellation; the heartbeat thread goes on), at any moment and for any time.
  An ended process is replaced by one with a new id; messages of the old one remain under way.
- One statement is one event, since it holds the row lock from its check to its commit. A write is a
  transaction of a run, which checks the lease in the message that commits.
- Refusing answers are left out: they can only stop a run earlier. So is the due time: the job is
  always due. An instance without a run is never frozen: it may do nothing for any time anyway.
- There is one job. Where another matters (`Guard.TRUST_PER_RUN`), one step represents it.
- All monotonic clocks run equally fast, also while a process is frozen. A suspended machine may
  break this: without `Guard.CLOCK` it does.
- PostgreSQL's clock runs equally fast, and may step ahead between any two events, by at most `step`
  ticks during one lease. This has the effect of a lease that is shorter by as much. A step back
  only makes leases longer.

The core of the proof is `Invariant.TRUST`: an instance's trust in its lease never exceeds the lease
in the row. The trust ends first, the run ends with it (by the watchdog timer if the process itself
can't), and only then can another instance claim the job.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final, Literal, NamedTuple


@unique
class Guard(StrEnum):
    """A part of the protocol, or an assumption of it, that can be removed."""

    EXPIRY = "a claim leaves a job alone while its lease lasts"
    TAKEOVER = "a claim takes a job whose lease is over"
    LOST_WHILE_PAUSED = "a claim ends a lost run even if its job is paused"
    FENCE = "each claim raises the fence"
    RENEWAL_FENCE = "a renewal checks the fence"
    RENEWAL_IN_TIME = "a renewal does not revive a lease that is over"
    TIME_OF_EXECUTION = "a renewal reads the clock when it is executed, not when it began"
    WRITE_FENCE = "a write checks the fence"
    WRITE_IN_TIME = "a write checks that the lease is not over"
    FINISH_FENCE = "a finish checks the fence"
    FINISH_AFTER_END = "a run is released after it has stopped"
    TRUST_FROM_SENDING = "trust is counted from the sending of the answered statement"
    TRUST_IN_CLAIM = "a claim that is answered after its trust has ended starts no run"
    TRUST_PER_RUN = "a renewal of one run does not prolong the trust in another"
    WATCHDOG = "the kernel ends a process that runs a job when its trust ends"
    CANCEL = "an instance cancels its run before its trust ends"
    HOLDER = "renewal, write and finish check the holder"
    CLOCK = "the clock of a frozen process goes on"


@unique
class Invariant(StrEnum):
    """A property that holds in every state and of every step."""

    OVERLAP = "two runs of the job are never under way at once"
    WRITE = "nothing is written by a run that has lost its lease"
    FOREIGN_RENEWAL = "a lease is renewed by its own run alone"
    OUTCOME = "every run gets one outcome, and none before it has ended"
    TRUST = "a process that runs the job has a lease that lasts at least as long as its trust"
    SURVIVAL = "a process that is neither frozen nor blocked is not ended by the watchdog timer"
    STRANDED = "in every state, one healthy instance is enough for the job to be claimed again"


class Message(NamedTuple):
    """A statement under way, or its answer."""

    kind: Literal["claim", "renewal", "write", "finish"]
    stage: Literal["sent", "begun", "answered"]
    # the run it is about: the number of its claim; 0 for a claim that was not executed yet
    run: int
    # the trust that its answer grants: the lease less the ticks since it was sent
    trust: int
    # ticks since its transaction began (only without TIME_OF_EXECUTION)
    age: int


class Instance(NamedTuple):
    """A process, and its messages under way."""

    mode: Literal["free", "blocked", "frozen", "ended"]
    work: Literal["", "running", "stopped"]
    run: int
    trust: int
    mail: tuple[Message, ...]


class Row(NamedTuple):
    """The row of the job, and the part of its past that the invariants need."""

    holder: int | None = None
    # the claims so far: the fence
    run: int = 0
    lease: int = 0
    paused: bool = False
    lost_streak: int = 0
    # how far PostgreSQL's clock has stepped ahead since the lease was granted
    stepped: int = 0
    # has the lease of the last run ever been over, and has that run no outcome yet?
    lapsed: bool = False
    open: bool = False


class State(NamedTuple):
    """The row and all processes."""

    row: Row
    instances: tuple[Instance, ...]


class Step(NamedTuple):
    """One possible event and the state after it."""

    text: str
    instance: int
    after: State
    breaks: Invariant | None = None


# what makes the database refuse a statement of a run before the last
FENCES: Final = {
    "claim": None,
    "renewal": Guard.RENEWAL_FENCE,
    "write": Guard.WRITE_FENCE,
    "finish": Guard.FINISH_FENCE,
}
NEW: Final = Instance("free", "", 0, 0, ())


@dataclass(frozen=True)
class Protocol:
    """Claim, heartbeat, expiry, finish and takeover of one job, less the removed guards."""

    without: frozenset[Guard] = frozenset()
    instances: int = 2
    lease: int = 3
    margin: int = 1
    # by how much trust is shorter than the lease, and how far PostgreSQL's clock may step ahead
    reserve: int = 0
    step: int = 0
    # statements and answers under way at the same time, of all instances together
    room: int = 2
    # runs lost in a row until the job is paused
    lost_limit: int = 2

    def start(self) -> State:
        """Return the state just after the instances have started."""
        return State(Row(), (NEW,) * self.instances)

    def has(self, guard: Guard) -> bool:
        """Say whether the guard is in place."""
        return guard not in self.without

    @property
    def full_trust(self) -> int:
        """The ticks of trust that an answer grants, from the sending of its statement."""
        return self.lease - self.reserve

    # Steps

    def steps(self, state: State) -> Iterator[Step]:
        """Yield all possible next steps."""
        row, instances = state
        if not any(self._must_cancel(instance) for instance in instances):
            yield self._tick(state)
        if row.stepped < self.step and row.lease > 0:
            yield self._clock_steps(state)
        if row.paused:
            resumed = row._replace(paused=False, lost_streak=0)
            yield Step("Somebody resumes the job.", 0, State(resumed, instances))
        else:
            yield Step("Somebody pauses the job.", 0, State(row._replace(paused=True), instances))
        has_room = sum(len(instance.mail) for instance in instances) < self.room
        for index, instance in enumerate(instances):
            if instance.mode != "ended":
                yield Step("{instance} is killed.", index, _end(state, index))
                yield from self._changes(state, index)
                if has_room and instance.mode != "frozen":
                    yield from self._sends(state, index)
            for message in dict.fromkeys(instance.mail):
                lost = f"{{instance}}'s {message.kind} is lost."
                yield Step(lost, index, _drop(state, index, message))
                yield from self._moves(state, index, message)

    def _must_cancel(self, instance: Instance) -> bool:
        return (
            instance.work == "running"
            and instance.mode == "free"
            and instance.trust <= self.margin
            and self.has(Guard.CANCEL)
        )

    def _tick(self, state: State) -> Step:
        """Let a tick pass for all processes; the watchdog timer expires where trust is over."""
        row, instances = state
        if row.holder is not None:
            # How long it has been over is irrelevant, unless a clock was read in the past.
            floor = 0 if self.has(Guard.TIME_OF_EXECUTION) else -self.lease
            lease = max(row.lease - 1, floor)
            row = row._replace(lease=lease, lapsed=row.lapsed or lease <= 0)
            if lease <= 0:
                row = row._replace(stepped=0)  # it is over, however far the clock steps
        after = State(row, tuple(self._older(instance) for instance in instances))
        text, breaks, last = "A tick passes", None, 0
        for index, instance in enumerate(after.instances):
            if instance.mode in ("free", "blocked") and self._watchdog_expires(instance):
                after = _end(after, index)
                text, last = "A tick passes, and the kernel ends {instance}", index
                if instance.mode == "free":
                    breaks = Invariant.SURVIVAL
        if row.holder is not None:
            text += "; the lease is over" if row.lease <= 0 else f"; the lease has {row.lease} left"
        return Step(f"{text}.", last, after, breaks)

    def _clock_steps(self, state: State) -> Step:
        """Let PostgreSQL's clock step a tick ahead, and no other."""
        row = state.row
        lease = row.lease - 1
        stepped = row.stepped + 1 if lease > 0 else 0
        row = row._replace(lease=lease, stepped=stepped, lapsed=row.lapsed or lease == 0)
        text = f"PostgreSQL's clock steps ahead; the lease has {lease} left."
        return Step(text, 0, State(row, state.instances))

    def _older(self, instance: Instance) -> Instance:
        elapsed = 0 if instance.mode == "frozen" and not self.has(Guard.CLOCK) else 1
        mail = tuple(
            [
                Message(
                    message.kind,
                    message.stage,
                    message.run,
                    max(message.trust - elapsed, 0),
                    min(message.age + 1, self.lease) if message.stage == "begun" else 0,
                )
                for message in instance.mail
            ]
        )
        return Instance(
            instance.mode, instance.work, instance.run, max(instance.trust - elapsed, 0), mail
        )

    def _watchdog_expires(self, instance: Instance) -> bool:
        return instance.work == "running" and instance.trust == 0 and self.has(Guard.WATCHDOG)

    def _changes(self, state: State, index: int) -> Iterator[Step]:
        """Yield the steps of a process that involve no message."""
        instance = state.instances[index]

        def becomes(text: str, instance: Instance) -> Step:
            return Step(text, index, _put(state, index, instance))

        if instance.mode == "frozen":
            if self._watchdog_expires(instance):
                text = "{instance} is thawed, and the kernel ends it before it does anything."
                yield Step(text, index, _end(state, index))
            else:
                yield becomes("{instance} is thawed.", instance._replace(mode="free"))
        elif instance.work == "running":
            yield becomes("{instance} is frozen.", instance._replace(mode="frozen"))
            if instance.mode == "blocked":
                yield becomes("{instance} is no longer blocked.", instance._replace(mode="free"))
            else:
                yield becomes(
                    "{instance} is blocked by its run.", instance._replace(mode="blocked")
                )
                stopped = instance._replace(work="stopped", trust=0)
                yield becomes("{instance}'s run ends, or is cancelled.", stopped)
            if not self.has(Guard.TRUST_PER_RUN):
                text = "{instance} gets another job, and trusts this run for as long."
                yield becomes(text, instance._replace(trust=self.full_trust))
        elif instance.work == "stopped":
            text = "{instance} gives up reporting to the database."
            yield becomes(text, instance._replace(work="", run=0))

    def _sends(self, state: State, index: int) -> Iterator[Step]:
        """Yield the statements that a process can send."""
        instance = state.instances[index]
        if instance.mode == "free":
            # Also while it runs the job: a claim takes any job that is claimable.
            yield self._send(state, index, Message("claim", "sent", 0, self.full_trust, 0))
        if instance.work == "stopped":
            yield self._send(state, index, Message("finish", "sent", instance.run, 0, 0))
        elif instance.work == "running":
            renewal = Message("renewal", "sent", instance.run, self.full_trust, 0)
            yield self._send(state, index, renewal)
            yield self._send(state, index, Message("write", "sent", instance.run, 0, 0))
            if not self.has(Guard.FINISH_AFTER_END):
                yield self._send(state, index, Message("finish", "sent", instance.run, 0, 0))

    def _send(self, state: State, index: int, message: Message) -> Step:
        of_run = f" of run {message.run}" if message.run else ""
        text = f"{{instance}} sends a {message.kind}{of_run}."
        return Step(text, index, _post(state, index, message))

    def _moves(self, state: State, index: int, message: Message) -> Iterator[Step]:
        """Yield what can happen to a message, except its loss."""
        instance = state.instances[index]
        if message.stage == "answered":
            if instance.mode == "free" or (
                instance.mode == "blocked" and message.kind == "renewal"
            ):
                yield from self._arrives(state, index, message)
        elif (
            message.kind == "renewal"
            and message.stage == "sent"
            and not self.has(Guard.TIME_OF_EXECUTION)
        ):
            begun = _post(_drop(state, index, message), index, message._replace(stage="begun"))
            yield Step("{instance}'s renewal begins, and waits for a lock.", index, begun)
        else:
            yield self._carry_out(state, index, message)

    def _arrives(self, state: State, index: int, message: Message) -> Iterator[Step]:
        """Let an instance receive the answer that its claim or renewal succeeded."""
        trust = message.trust if self.has(Guard.TRUST_FROM_SENDING) else self.full_trust
        after = _drop(state, index, message)
        instance = after.instances[index]
        if message.kind == "claim":
            if trust > self.margin or not self.has(Guard.TRUST_IN_CLAIM):
                text = f"{{instance}} gets the answer to its claim, and begins run {message.run}."
                begun = instance._replace(work="running", run=message.run, trust=trust)
                breaks = Invariant.OVERLAP if instance.work == "running" else None
                yield Step(text, index, _put(after, index, begun), breaks)
        elif (
            instance.work == "running"
            and self._same(instance.run, message.run)
            and trust > instance.trust
        ):
            text = f"{{instance}} gets the answer to its renewal, and trusts for {trust} more."
            yield Step(text, index, _put(after, index, instance._replace(trust=trust)))

    # The database

    def _carry_out(self, state: State, index: int, message: Message) -> Step:
        if message.kind == "claim":
            return self._claim(state, index, message)
        if message.kind == "renewal":
            return self._renew(state, index, message)
        if message.kind == "write":
            return self._write(state, index, message)
        return self._finish(state, index, message)

    def _claim(self, state: State, index: int, message: Message) -> Step:
        row = state.row
        after = _drop(state, index, message)
        lost = row.holder is not None
        if lost and row.lease > 0 and self.has(Guard.EXPIRY):
            return Step("{instance}'s claim is refused: the lease lasts.", index, after)
        if lost and not self.has(Guard.TAKEOVER):
            return Step("{instance}'s claim is refused: the job is held.", index, after)
        if row.paused and not (lost and self.has(Guard.LOST_WHILE_PAUSED)):
            return Step("{instance}'s claim is refused: the job is paused.", index, after)
        streak = min(row.lost_streak + lost, self.lost_limit)
        if row.paused or streak == self.lost_limit:
            row = Row(run=row.run, paused=True, lost_streak=streak)
            return Step(
                "{instance}'s claim frees the job: it was lost.", index, State(row, after.instances)
            )
        breaks = Invariant.OUTCOME if row.open and not lost else None
        row = Row(index, row.run + 1, self.lease, lost_streak=streak, open=True)
        answer = message._replace(stage="answered", run=row.run)
        text = f"{{instance}}'s claim succeeds: run {row.run}, the lease has {row.lease} left."
        return Step(text, index, _post(State(row, after.instances), index, answer), breaks)

    def _renew(self, state: State, index: int, message: Message) -> Step:
        row = state.row
        after = _drop(state, index, message)
        its_own = self._its_own(row, index, message.run, Guard.RENEWAL_FENCE)
        in_time = row.lease + message.age > 0 or not self.has(Guard.RENEWAL_IN_TIME)
        if not (its_own and in_time):
            return Step("{instance}'s renewal is refused.", index, after)
        breaks = Invariant.FOREIGN_RENEWAL if message.run != row.run else None
        row = row._replace(lease=self.lease - message.age, stepped=0)
        text = f"{{instance}}'s renewal of run {message.run} succeeds; lease left: {row.lease}."
        answer = message._replace(stage="answered", age=0)
        return Step(text, index, _post(State(row, after.instances), index, answer), breaks)

    def _write(self, state: State, index: int, message: Message) -> Step:
        row = state.row
        after = _drop(state, index, message)
        its_own = self._its_own(row, index, message.run, Guard.WRITE_FENCE)
        in_time = row.lease > 0 or not self.has(Guard.WRITE_IN_TIME)
        if not (its_own and in_time):
            return Step("{instance}'s write is refused.", index, after)
        breaks = Invariant.WRITE if message.run != row.run or row.lapsed else None
        return Step(
            f"{{instance}}'s write of run {message.run} takes effect.", index, after, breaks
        )

    def _finish(self, state: State, index: int, message: Message) -> Step:
        row = state.row
        after = _drop(state, index, message)
        if not self._its_own(row, index, message.run, Guard.FINISH_FENCE):
            return Step("{instance}'s finish is refused.", index, after)
        last = message.run == row.run
        breaks = None if last and row.open else Invariant.OUTCOME
        row = Row(run=row.run, paused=row.paused, open=row.open and not last)
        text = f"{{instance}}'s finish of run {message.run} succeeds: the job is free."
        return Step(text, index, State(row, after.instances), breaks)

    def _its_own(self, row: Row, index: int, run: int, fence: Guard) -> bool:
        """Compare holder and fence with the row's."""
        if row.holder != index and self.has(Guard.HOLDER):
            return False
        return self._same(row.run, run) or not self.has(fence)

    def _same(self, run: int, other: int) -> bool:
        """Compare two runs by their fences."""
        return run == other or not self.has(Guard.FENCE)

    # Invariants

    def broken(self, state: State) -> Iterator[Invariant]:
        """Yield the invariants that the state breaks."""
        row, instances = state
        runs = [
            instance
            for instance in instances
            if instance.work == "running" and instance.mode != "ended"
        ]
        active = [instance for instance in runs if instance.mode != "frozen"]
        if len(active) > 1:
            yield Invariant.OVERLAP
        for instance in active:
            if instance.run != row.run or not row.open:
                yield Invariant.OUTCOME
        for instance in runs:
            if instance.trust > 0 and (instance.run != row.run or row.lease < instance.trust):
                yield Invariant.TRUST
        if (row.holder is not None) != row.open:
            yield Invariant.OUTCOME

    def ticks_to_claim(self, state: State) -> int | None:
        """Return the ticks until the job is claimed again once all faults have ended.

        No message is under way, and any one instance is healthy; the others do nothing.
        None: no claim ever succeeds.
        """
        ways = [
            self._ticks_alone(state, index)
            for index, instance in enumerate(state.instances)
            if instance.mode != "ended"
        ]
        return None if None in ways else max(ticks for ticks in ways if ticks is not None)

    def _ticks_alone(self, state: State, index: int) -> int | None:
        instance = state.instances[index]
        if instance.mode == "frozen" and self._watchdog_expires(instance):
            state, index = _end(state, index), len(state.instances)
        elif instance.work:
            finish = Message("finish", "sent", instance.run, 0, 0)
            state = self._finish(_post(state, index, finish), index, finish).after
            state = _put(state, index, NEW)
        claim = Message("claim", "sent", 0, self.lease, 0)
        for ticks in range(self.lease + 1):
            row = self._claim(_post(state, index, claim), index, claim).after.row
            waits_to_be_resumed = row.paused and row.holder is None
            if row.run > state.row.run or waits_to_be_resumed:
                return ticks
            state = self._tick(state).after
        return None

    def reduced(self, state: State) -> State:
        """Return the representative of all states that behave equally.

        Instances are equal, so their order does not matter; neither does the value of a fence, only
        which of two is higher. An ended process is dropped with its last message and its lease. A
        statement that will be refused whenever it is executed, like an answer that changes nothing,
        is lost at once.
        """
        row, instances = state
        kept = []
        runs = {0, row.run}
        for index, instance in enumerate(instances):
            known = instance
            if instance.mail:
                mail = [
                    message
                    for message in instance.mail
                    if self._matters(message, instance, row.run)
                ]
                runs.update([message.run for message in mail])
                known = Instance(
                    instance.mode, instance.work, instance.run, instance.trust, tuple(sorted(mail))
                )
            if known.mail or index == row.holder or instance.mode != "ended":
                runs.add(instance.run)
                kept.append((known, index == row.holder))
        kept.sort()
        for index, (_, held) in enumerate(kept):
            if held and index != row.holder:
                row = Row(index, *row[1:])
        reduced = State(row, tuple([instance for instance, _ in kept]))
        return reduced if max(runs) < len(runs) else _renumbered(reduced, sorted(runs))

    def _matters(self, message: Message, instance: Instance, last_run: int) -> bool:
        """Return whether a message can still have an effect."""
        if message.stage != "answered":
            fence = FENCES[message.kind]
            return fence is None or self._same(message.run, last_run) or not self.has(fence)
        if message.kind == "renewal":
            if instance.work != "running" or not self._same(instance.run, message.run):
                return False
            return message.trust > instance.trust or not self.has(Guard.TRUST_FROM_SENDING)
        if instance.mode == "ended":
            return False
        late_is_good = not (self.has(Guard.TRUST_FROM_SENDING) and self.has(Guard.TRUST_IN_CLAIM))
        return message.trust > self.margin or late_is_good


def _renumbered(state: State, runs: list[int]) -> State:
    """Renumber the runs in the state from 0."""
    rank = {run: position for position, run in enumerate(runs)}
    return State(
        state.row._replace(run=rank[state.row.run]),
        tuple(
            instance._replace(
                run=rank[instance.run],
                mail=tuple(message._replace(run=rank[message.run]) for message in instance.mail),
            )
            for instance in state.instances
        ),
    )


def _put(state: State, index: int, instance: Instance) -> State:
    instances = state.instances
    return State(state.row, (*instances[:index], instance, *instances[index + 1 :]))


def _post(state: State, index: int, message: Message) -> State:
    instance = state.instances[index]
    return _put(state, index, instance._replace(mail=(*instance.mail, message)))


def _drop(state: State, index: int, message: Message) -> State:
    instance = state.instances[index]
    at = instance.mail.index(message)
    return _put(state, index, instance._replace(mail=instance.mail[:at] + instance.mail[at + 1 :]))


def _end(state: State, index: int) -> State:
    """End a process; a new one replaces it."""
    ended = _put(state, index, Instance("ended", "", 0, 0, state.instances[index].mail))
    return State(ended.row, (*ended.instances, NEW))


class SearchResult(NamedTuple):
    """The result of a search."""

    states: int
    steps: int
    # the longest time from the end of all faults to the next claim
    ticks_to_claim: int
    broken: Invariant | None
    # the shortest path to the broken invariant, in sentences
    trace: tuple[str, ...]


def search(protocol: Protocol, sought: frozenset[Invariant] = frozenset(Invariant)) -> SearchResult:
    """Visit every reachable state, until one of the sought invariants is broken."""
    start = protocol.reduced(protocol.start())
    came_from: dict[State, State | None] = {start: None}
    queue = deque([start])
    steps = longest = 0
    while queue:
        state = queue.popleft()
        for step in protocol.steps(state):
            steps += 1
            after = protocol.reduced(step.after)
            broken = {step.breaks}
            if after not in came_from:
                came_from[after] = state
                queue.append(after)
                broken.update(protocol.broken(after))
                if not any(instance.mail for instance in after.instances):
                    ticks = protocol.ticks_to_claim(after)
                    longest = max(longest, ticks or 0)
                    broken.add(Invariant.STRANDED if ticks is None else None)
            for invariant in sought & broken:
                trace = _sentences(protocol, [*_path_to(came_from, state), after], invariant)
                return SearchResult(len(came_from), steps, longest, invariant, trace)
    return SearchResult(len(came_from), steps, longest, None, ())


def _path_to(came_from: dict[State, State | None], state: State) -> list[State]:
    path = []
    at: State | None = state
    while at is not None:
        path.append(at)
        at = came_from[at]
    return path[::-1]


def _sentences(protocol: Protocol, path: list[State], broken: Invariant) -> tuple[str, ...]:
    """Follow the path again, with instances that keep their names; return its sentences."""
    state = protocol.start()
    sentences = []
    for goal in path[1:]:
        there = [s for s in protocol.steps(state) if protocol.reduced(s.after) == goal]
        step = next((s for s in there if s.breaks == broken), there[0])
        sentences.append(step.text.format(instance="ABCDEFGHIJ"[step.instance]))
        state = step.after
    if broken is Invariant.STRANDED:
        sentences.append("All faults have ended, but no claim ever gets the job.")
    return tuple(sentences)
