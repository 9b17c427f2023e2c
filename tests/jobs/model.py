"""A model of how copies share one job, small enough to look at every state it can be in.

The row of the job and the processes are values; `Protocol.steps` lists all that can happen next,
and `search` follows every step from every state, breadth first, so that what it finds broken is
told by the shortest way there. What is modelled, and why no more is needed:

- Time comes in ticks, and only differences count: a state holds how many ticks a lease or a trust
  has left, never a date. So a finite number of states stands for histories of any length.
- A statement is sent, is carried out at any later time (or never), and its answer arrives at any
  time after that (or never). A slow network, a lost packet, a lock that is waited for, a database
  that is restarted or away for an hour: all are orders of these three events.
- A process can be killed, frozen (SIGSTOP, a paused machine), or blocked by its job (the event
  loop stands, the thread of the heartbeat goes on) at any moment and for any time. In the place of
  one that has ended there is a new one with a new id; what the old one sent is still under way.
- One statement is one event, since it holds the lock of the row from its check to its commit.
- Answers that refuse are left out: all they can do is to stop a run earlier. So is when a job is
  due: it always is. A copy that runs nothing is not frozen: it may do nothing for ever as it is.
- All monotonic clocks run equally fast. No other clock is looked at.

The heart of the proof is `Invariant.TRUST`: what a copy believes of its lease is never more than
what the row says. Belief ends first, the run ends with belief (the dead man sees to it when the
process itself can't), and only then can anybody else claim.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum, unique
from typing import Final, Literal, NamedTuple


@unique
class Guard(StrEnum):
    """A part of the protocol that can be taken out."""

    EXPIRY = "a claim leaves a job alone while its lease lasts"
    TAKEOVER = "a claim takes a job whose lease is over"
    LAID_ASIDE = "a claim ends a lost run even if its job is paused"
    FENCE = "each claim raises the fence"
    RENEWAL_FENCE = "a renewal checks the fence"
    RENEWAL_IN_TIME = "a renewal leaves a lease alone that is over"
    TIME_OF_EXECUTION = "a renewal reads the clock when it is carried out, not when it began"
    WRITE_FENCE = "a write checks the fence"
    WRITE_IN_TIME = "a write checks that the lease is not over"
    FINISH_FENCE = "a finish checks the fence"
    FINISH_AFTER_END = "a run is handed back after it has stopped"
    TRUST_FROM_SENDING = "trust is counted from the sending of what was answered"
    TRUST_IN_CLAIM = "a claim that is answered after its trust has ended is not begun"
    TRUST_PER_RUN = "good news about one run does not prolong the trust in another"
    DEAD_MAN = "the kernel ends a process that runs a job when its trust ends"
    CANCEL = "a copy cancels its run before its trust ends"
    HOLDER = "renewal, write and finish check the holder"


@unique
class Invariant(StrEnum):
    """What is true in every state, and of every step."""

    OVERLAP = "two processes never run the job at once"
    WRITE = "nothing is written by a run that has lost its lease"
    STRANGER = "a lease is prolonged by its own run alone"
    OUTCOME = "every run gets one outcome, and none before it has ended"
    TRUST = "a process that runs the job has a lease that lasts at least as long as its trust"
    SURVIVAL = "a process that is neither frozen nor blocked is not ended by the dead man"
    STRANDED = "whatever happened, one healthy copy is enough for the job to be claimed again"


class Message(NamedTuple):
    """A statement under way, or its answer."""

    kind: Literal["claim", "renewal", "write", "finish"]
    stage: Literal["sent", "begun", "answered"]
    # the run it is about: the number of its claim; 0 for a claim that was not carried out yet
    run: int
    # the trust that its answer is good for: the lease less the ticks since it was sent
    trust: int
    # ticks since its transaction began (only without TIME_OF_EXECUTION)
    age: int


class Copy(NamedTuple):
    """A process, and what it sent."""

    mode: Literal["free", "blocked", "frozen", "ended"]
    work: Literal["", "running", "stopped"]
    run: int
    trust: int
    mail: tuple[Message, ...]


class Row(NamedTuple):
    """The row of the job, and what the invariants need to know of its past."""

    holder: int | None
    # the claims so far: the fence, unless it is not raised
    run: int
    lease: int
    paused: bool
    lost_streak: int
    # has the lease of the last run ever been over, and has that run no outcome yet?
    lapsed: bool
    open: bool


class State(NamedTuple):
    """Everything there is."""

    row: Row
    copies: tuple[Copy, ...]


class Step(NamedTuple):
    """One thing that can happen, and what comes of it."""

    told: str
    copy: int
    after: State
    breaks: Invariant | None = None


NEW: Final = Copy("free", "", 0, 0, ())


@dataclass(frozen=True)
class Protocol:
    """Claim, heartbeat, expiry, finish and takeover of one job, less the guards taken out."""

    without: frozenset[Guard] = frozenset()
    copies: int = 2
    lease: int = 3
    margin: int = 1
    # statements and answers under way at the same time, of all copies together
    room: int = 2
    # runs lost in a row until the job is paused
    lost_limit: int = 2
    _ways_back: dict[State, int | None] = field(default_factory=dict)

    def start(self) -> State:
        """Return the state in which the copies have just come up."""
        return State(Row(None, 0, 0, False, 0, False, False), (NEW,) * self.copies)

    def has(self, guard: Guard) -> bool:
        """Say whether the guard is in place."""
        return guard not in self.without

    # What can happen

    def steps(self, state: State) -> Iterator[Step]:
        """Yield all that can happen next."""
        row, copies = state
        if not any(self._must_cancel(copy) for copy in copies):
            yield self._tick(state)
        if row.paused:
            yield Step("Somebody resumes the job.", 0, _with(state, paused=False, lost_streak=0))
        else:
            yield Step("Somebody pauses the job.", 0, _with(state, paused=True))
        has_room = sum(len(copy.mail) for copy in copies) < self.room
        for index, copy in enumerate(copies):
            if copy.mode != "ended":
                yield Step("{copy} is killed.", index, _end(state, index))
                yield from self._changes(state, index)
                if has_room and copy.mode != "frozen":
                    yield from self._sends(state, index)
            for message in dict.fromkeys(copy.mail):
                yield Step(f"{{copy}}'s {message.kind} is lost.", index, _drop(state, index, message))
                yield from self._moves(state, index, message)

    def _must_cancel(self, copy: Copy) -> bool:
        return (
            copy.work == "running"
            and copy.mode == "free"
            and copy.trust <= self.margin
            and self.has(Guard.CANCEL)
        )

    def _tick(self, state: State) -> Step:
        """Let time pass for everybody; the dead man strikes where trust is over."""
        row, copies = state
        if row.holder is not None:
            # How long it has been over counts for nothing, unless a clock was read in the past.
            floor = 0 if self.has(Guard.TIME_OF_EXECUTION) else -self.lease
            lease = max(row.lease - 1, floor)
            row = row._replace(lease=lease, lapsed=row.lapsed or lease <= 0)
        after = State(row, tuple(self._older(copy) for copy in copies))
        told, breaks, last = "A tick passes", None, 0
        for index, copy in enumerate(after.copies):
            if copy.mode in ("free", "blocked") and self._dead_man_strikes(copy):
                after = _end(after, index)
                told, last = "A tick passes, and the kernel ends {copy}", index
                if copy.mode == "free":
                    breaks = Invariant.SURVIVAL
        if row.holder is not None:
            told += "; the lease is over" if row.lease <= 0 else f"; the lease has {row.lease} left"
        return Step(f"{told}.", last, after, breaks)

    def _older(self, copy: Copy) -> Copy:
        mail = tuple(
            Message(
                message.kind,
                message.stage,
                message.run,
                max(message.trust - 1, 0),
                min(message.age + 1, self.lease) if message.stage == "begun" else 0,
            )
            for message in copy.mail
        )
        return Copy(copy.mode, copy.work, copy.run, max(copy.trust - 1, 0), mail)

    def _dead_man_strikes(self, copy: Copy) -> bool:
        return copy.work == "running" and copy.trust == 0 and self.has(Guard.DEAD_MAN)

    def _changes(self, state: State, index: int) -> Iterator[Step]:
        """Yield what can happen to a process without a message."""
        copy = state.copies[index]
        if copy.mode == "frozen":
            if self._dead_man_strikes(copy):
                told = "{copy} is thawed, and the kernel ends it before it does anything."
                yield Step(told, index, _end(state, index))
            else:
                yield Step("{copy} is thawed.", index, _set(state, index, mode="free"))
        elif copy.work == "running":
            yield Step("{copy} is frozen.", index, _set(state, index, mode="frozen"))
            if copy.mode == "blocked":
                yield Step("{copy} is no longer blocked.", index, _set(state, index, mode="free"))
            else:
                yield Step("{copy} is blocked by its run.", index, _set(state, index, mode="blocked"))
                stopped = _set(state, index, work="stopped", trust=0)
                yield Step("{copy}'s run ends or is cancelled.", index, stopped)
            if not self.has(Guard.TRUST_PER_RUN):
                told = "{copy} claims another job, and trusts this run for as long."
                yield Step(told, index, _set(state, index, trust=self.lease))
        elif copy.work == "stopped":
            told = "{copy} gives up telling the database."
            yield Step(told, index, _set(state, index, work="", run=0))

    def _sends(self, state: State, index: int) -> Iterator[Step]:
        """Yield the statements that a process can send."""
        copy = state.copies[index]
        if copy.work == "":
            yield self._send(state, index, Message("claim", "sent", 0, self.lease, 0))
        elif copy.work == "stopped":
            yield self._send(state, index, Message("finish", "sent", copy.run, 0, 0))
        else:
            yield self._send(state, index, Message("renewal", "sent", copy.run, self.lease, 0))
            yield self._send(state, index, Message("write", "sent", copy.run, 0, 0))
            if not self.has(Guard.FINISH_AFTER_END):
                yield self._send(state, index, Message("finish", "sent", copy.run, 0, 0))

    def _send(self, state: State, index: int, message: Message) -> Step:
        of_run = f" of run {message.run}" if message.run else ""
        return Step(f"{{copy}} sends a {message.kind}{of_run}.", index, _post(state, index, message))

    def _moves(self, state: State, index: int, message: Message) -> Iterator[Step]:
        """Yield what can become of a message, but for its loss."""
        copy = state.copies[index]
        if message.stage == "answered":
            if copy.mode in ("free", "blocked"):
                yield from self._arrives(state, index, message)
        elif (
            message.kind == "renewal"
            and message.stage == "sent"
            and not self.has(Guard.TIME_OF_EXECUTION)
        ):
            begun = _post(_drop(state, index, message), index, message._replace(stage="begun"))
            yield Step("{copy}'s renewal begins, and waits for a lock.", index, begun)
        else:
            yield self._carry_out(state, index, message)

    def _arrives(self, state: State, index: int, message: Message) -> Iterator[Step]:
        """Let a copy hear that its claim or renewal was good."""
        copy = state.copies[index]
        trust = message.trust if self.has(Guard.TRUST_FROM_SENDING) else self.lease
        after = _drop(state, index, message)
        if message.kind == "claim":
            if copy.work == "" and (trust > self.margin or not self.has(Guard.TRUST_IN_CLAIM)):
                after = _set(after, index, work="running", run=message.run, trust=trust)
                told = f"{{copy}} hears that it has the job, and begins run {message.run}."
                yield Step(told, index, after)
        elif copy.work == "running" and self._same(copy.run, message.run) and trust > copy.trust:
            told = f"{{copy}} hears of its renewal, and trusts for {trust} more."
            yield Step(told, index, _set(after, index, trust=trust))

    # What the database does

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
            return Step("{copy}'s claim is refused: the lease lasts.", index, after)
        if lost and not self.has(Guard.TAKEOVER):
            return Step("{copy}'s claim is refused: the job is held.", index, after)
        if row.paused and not (lost and self.has(Guard.LAID_ASIDE)):
            return Step("{copy}'s claim is refused: the job is paused.", index, after)
        streak = min(row.lost_streak + lost, self.lost_limit)
        if row.paused or streak == self.lost_limit:
            row = Row(None, row.run, 0, True, streak, False, False)
            return Step("{copy}'s claim lays the job aside.", index, State(row, after.copies))
        breaks = Invariant.OUTCOME if row.open and not lost else None
        row = Row(index, row.run + 1, self.lease, False, streak, False, True)
        answer = message._replace(stage="answered", run=row.run)
        told = f"{{copy}}'s claim is carried out: run {row.run}, the lease has {row.lease} left."
        return Step(told, index, _post(State(row, after.copies), index, answer), breaks)

    def _renew(self, state: State, index: int, message: Message) -> Step:
        row = state.row
        after = _drop(state, index, message)
        its_own = self._its_own(row, index, message.run, Guard.RENEWAL_FENCE)
        in_time = row.lease + message.age > 0 or not self.has(Guard.RENEWAL_IN_TIME)
        if not (its_own and in_time):
            return Step("{copy}'s renewal is refused.", index, after)
        breaks = Invariant.STRANGER if message.run != row.run else None
        row = row._replace(lease=self.lease - message.age)
        told = f"{{copy}}'s renewal of run {message.run} is carried out: the lease has {row.lease} left."
        answer = message._replace(stage="answered", age=0)
        return Step(told, index, _post(State(row, after.copies), index, answer), breaks)

    def _write(self, state: State, index: int, message: Message) -> Step:
        row = state.row
        after = _drop(state, index, message)
        its_own = self._its_own(row, index, message.run, Guard.WRITE_FENCE)
        in_time = row.lease > 0 or not self.has(Guard.WRITE_IN_TIME)
        if not (its_own and in_time):
            return Step("{copy}'s write is refused.", index, after)
        breaks = Invariant.WRITE if message.run != row.run or row.lapsed else None
        return Step(f"{{copy}}'s write of run {message.run} takes effect.", index, after, breaks)

    def _finish(self, state: State, index: int, message: Message) -> Step:
        row = state.row
        after = _drop(state, index, message)
        if not self._its_own(row, index, message.run, Guard.FINISH_FENCE):
            return Step("{copy}'s finish is refused.", index, after)
        last = message.run == row.run
        breaks = None if last and row.open else Invariant.OUTCOME
        row = Row(None, row.run, 0, row.paused, 0, False, row.open and not last)
        told = f"{{copy}}'s finish of run {message.run} is carried out: the job is free."
        return Step(told, index, State(row, after.copies), breaks)

    def _its_own(self, row: Row, index: int, run: int, fence: Guard) -> bool:
        """Compare holder and fence with the row's."""
        if row.holder is None or (row.holder != index and self.has(Guard.HOLDER)):
            return False
        return self._same(row.run, run) or not self.has(fence)

    def _same(self, run: int, other: int) -> bool:
        """Compare two runs by their fences."""
        return run == other or not self.has(Guard.FENCE)

    # What must be true

    def broken(self, state: State) -> Iterator[Invariant]:
        """Yield the invariants that the state breaks."""
        row, copies = state
        runs = [copy for copy in copies if copy.work == "running" and copy.mode != "ended"]
        active = [copy for copy in runs if copy.mode != "frozen"]
        if len(active) > 1:
            yield Invariant.OVERLAP
        for copy in active:
            if copy.run != row.run or not row.open:
                yield Invariant.OUTCOME
        for copy in runs:
            if copy.trust > 0 and (copy.run != row.run or row.lease < copy.trust):
                yield Invariant.TRUST
        if (row.holder is not None) != row.open:
            yield Invariant.OUTCOME

    def ticks_to_claim(self, state: State) -> int | None:
        """Return how long it can take until the job is claimed again, once faults have ended.

        From here on one copy is healthy, any one, and all others have ended. What is still under
        way may be carried out or lost, at the worst moment; the healthy copy just goes on
        claiming. None: it can go on in vain for ever.
        """
        worst = 0
        for index, copy in enumerate(state.copies):
            if copy.mode != "ended":
                ticks = self._ticks(self._alone(state, index))
                if ticks is None:
                    return None
                worst = max(worst, ticks)
        return worst

    def _alone(self, state: State, healthy: int) -> State:
        """Leave one copy, thawed, that has stopped what it ran."""
        copy = state.copies[healthy]
        if copy.mode == "frozen" and self._dead_man_strikes(copy):
            copy = copy._replace(mode="ended", work="")
        elif copy.work == "running":
            copy = copy._replace(mode="free", work="stopped", trust=0)
        copies = [each._replace(mode="ended", work="", run=0, trust=0) for each in state.copies]
        copies[healthy] = copy
        return self.reduced(State(state.row, (*copies, NEW) if copy.mode == "ended" else tuple(copies)))

    def _ticks(self, state: State) -> int | None:
        if state not in self._ways_back:
            self._ways_back[state] = None  # in a circle: in vain
            self._ways_back[state] = self._worst_way_back(state)
        return self._ways_back[state]

    def _worst_way_back(self, state: State) -> int | None:
        row = state.row
        if row.paused and row.holder is None:
            return 0  # it waits for somebody who resumes it
        index = next(i for i, copy in enumerate(state.copies) if copy.mode == "free")
        ways = []
        for other, copy in enumerate(state.copies):
            for message in copy.mail:
                ways.append(self._ticks(self.reduced(_drop(state, other, message))))
                if message.stage != "answered":
                    moves = self._moves(state, other, message)
                    ways += [self._ticks(self.reduced(step.after)) for step in moves]
        if state.copies[index].work == "stopped":
            finish = Message("finish", "sent", state.copies[index].run, 0, 0)
            finished = self._finish(_post(state, index, finish), index, finish)
            ways.append(self._ticks(self.reduced(_set(finished.after, index, work="", run=0))))
        else:
            claim = Message("claim", "sent", 0, self.lease, 0)
            claimed = self._claim(_post(state, index, claim), index, claim).after
            if claimed.row.run == row.run:  # refused, or laid aside
                waited = claimed if claimed.row != row else self._tick(state).after
                ticks = self._ticks(self.reduced(waited))
                ways.append(None if ticks is None else ticks + (claimed.row == row))
        if None in ways:
            return None
        return max((ticks for ticks in ways if ticks is not None), default=0)

    def reduced(self, state: State) -> State:
        """Return the one state that stands for all that differ in nothing that matters.

        Copies are equal, so their order is nothing; neither is how high a fence is, only which of
        two is higher. An ended process is forgotten with its last message and its lease.
        """
        row, copies = state
        kept = []
        runs = {0, row.run}
        for index, copy in enumerate(copies):
            if copy.mail:
                mail = [message for message in copy.mail if self._matters(copy, message)]
                runs.update([message.run for message in mail])
                copy = Copy(copy.mode, copy.work, copy.run, copy.trust, tuple(sorted(mail)))
            held = index == row.holder
            if held or copy.mail or copy.mode != "ended":
                kept.append((copy, held))
                runs.add(copy.run)
        kept.sort()
        for index, (_, held) in enumerate(kept):
            if held:
                row = Row(index, *row[1:])
        reduced = State(row, tuple([copy for copy, _ in kept]))
        return reduced if max(runs) < len(runs) else _renumbered(reduced, sorted(runs))

    def _matters(self, copy: Copy, message: Message) -> bool:
        """Say whether anything can still come of a message."""
        if message.stage != "answered":
            return True
        if message.kind == "renewal":
            if copy.work != "running" or not self._same(copy.run, message.run):
                return False
            return message.trust > copy.trust or not self.has(Guard.TRUST_FROM_SENDING)
        if copy.mode == "ended":
            return False
        late_is_good = not (self.has(Guard.TRUST_FROM_SENDING) and self.has(Guard.TRUST_IN_CLAIM))
        return message.trust > self.margin or late_is_good


def _renumbered(state: State, runs: list[int]) -> State:
    """Count the runs that are spoken of from 0 on."""
    rank = {run: position for position, run in enumerate(runs)}
    return State(
        state.row._replace(run=rank[state.row.run]),
        tuple(
            copy._replace(
                run=rank[copy.run],
                mail=tuple(message._replace(run=rank[message.run]) for message in copy.mail),
            )
            for copy in state.copies
        ),
    )


def _with(state: State, *, paused: bool, lost_streak: int | None = None) -> State:
    row = state.row
    streak = row.lost_streak if lost_streak is None else lost_streak
    return State(row._replace(paused=paused, lost_streak=streak), state.copies)


def _set(
    state: State,
    index: int,
    *,
    mode: Literal["free", "blocked", "frozen", "ended"] | None = None,
    work: Literal["", "running", "stopped"] | None = None,
    run: int | None = None,
    trust: int | None = None,
    mail: tuple[Message, ...] | None = None,
) -> State:
    row, copies = state
    copy = copies[index]
    changed = Copy(
        copy.mode if mode is None else mode,
        copy.work if work is None else work,
        copy.run if run is None else run,
        copy.trust if trust is None else trust,
        copy.mail if mail is None else mail,
    )
    return State(row, (*copies[:index], changed, *copies[index + 1 :]))


def _post(state: State, index: int, message: Message) -> State:
    return _set(state, index, mail=(*state.copies[index].mail, message))


def _drop(state: State, index: int, message: Message) -> State:
    mail = list(state.copies[index].mail)
    mail.remove(message)
    return _set(state, index, mail=tuple(mail))


def _end(state: State, index: int) -> State:
    """End a process; a new one comes in its place."""
    ended = _set(state, index, mode="ended", work="", run=0, trust=0)
    return State(ended.row, (*ended.copies, NEW))


class Verdict(NamedTuple):
    """What a search found."""

    states: int
    steps: int
    # what happened at least once, without the numbers of runs and ticks
    told: frozenset[str]
    # the longest time from the end of all faults to the next claim
    ticks_to_claim: int
    broken: Invariant | None
    # the shortest way to what is broken, in sentences
    trace: tuple[str, ...]


def search(protocol: Protocol, sought: frozenset[Invariant] = frozenset(Invariant)) -> Verdict:
    """Look at every state until one of the sought invariants is broken."""
    start = protocol.reduced(protocol.start())
    came_from: dict[State, State | None] = {start: None}
    queue = deque([start])
    reduced: dict[State, State] = {}
    steps = longest = 0
    told = set()
    while queue:
        state = queue.popleft()
        for step in protocol.steps(state):
            steps += 1
            told.add(step.told)
            if step.after not in reduced:
                reduced[step.after] = protocol.reduced(step.after)
            after = reduced[step.after]
            is_new = after not in came_from
            found = {step.breaks} if step.breaks else set()
            if is_new:
                came_from[after] = state
                queue.append(after)
                found.update(protocol.broken(after))
                if Invariant.STRANDED in sought:
                    ticks = protocol.ticks_to_claim(after)
                    longest = max(longest, ticks or 0)
                    if ticks is None:
                        found.add(Invariant.STRANDED)
            if found & sought:
                broken = min(found & sought)
                trace = _tell(protocol, [*_way(came_from, state), after])
                return Verdict(len(came_from), steps, frozenset(told), longest, broken, trace)
    return Verdict(len(came_from), steps, frozenset(told), longest, None, ())


def _way(came_from: dict[State, State | None], state: State) -> list[State]:
    way: list[State] = []
    at: State | None = state
    while at is not None:
        way.append(at)
        at = came_from[at]
    return way[::-1]


def _tell(protocol: Protocol, way: list[State]) -> tuple[str, ...]:
    """Walk the way again, with copies that keep their names."""
    state = protocol.start()
    sentences = []
    for goal in way[1:]:
        step = next(s for s in protocol.steps(state) if protocol.reduced(s.after) == goal)
        sentences.append(step.told.format(copy="ABCDEFGHIJ"[step.copy]))
        state = step.after
    return tuple(sentences)
