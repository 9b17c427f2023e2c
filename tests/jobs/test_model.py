"""No two runs of a job overlap and no job is stranded: every reachable state is checked.

`pytest -rP tests/jobs/test_model.py` shows, for each guard, the shortest trace to the invariant
that breaks without it.
"""

from dataclasses import replace

import pytest

from tests.jobs.model import Guard, Invariant, Protocol, search
from tests.system.sizes import FULL, report_figures, size

STEPPING = Protocol(reserve=1, step=1)
SMALL = [Protocol(), STEPPING]
LARGE = [
    Protocol(instances=3),
    Protocol(room=3, lease=2),
    Protocol(lease=4),
    Protocol(lease=4, reserve=2, step=2),
]

NEEDED = [
    (Guard.EXPIRY, Invariant.OVERLAP),
    (Guard.TAKEOVER, Invariant.STRANDED),
    (Guard.LOST_WHILE_PAUSED, Invariant.STRANDED),
    (Guard.FENCE, Invariant.WRITE),
    (Guard.RENEWAL_FENCE, Invariant.FOREIGN_RENEWAL),
    (Guard.RENEWAL_IN_TIME, Invariant.WRITE),
    (Guard.TIME_OF_EXECUTION, Invariant.WRITE),
    (Guard.WRITE_FENCE, Invariant.WRITE),
    (Guard.WRITE_IN_TIME, Invariant.WRITE),
    (Guard.FINISH_FENCE, Invariant.OVERLAP),
    (Guard.FINISH_FENCE, Invariant.OUTCOME),
    (Guard.FINISH_AFTER_END, Invariant.OVERLAP),
    (Guard.TRUST_FROM_SENDING, Invariant.TRUST),
    (Guard.TRUST_FROM_SENDING, Invariant.OVERLAP),
    (Guard.TRUST_IN_CLAIM, Invariant.OVERLAP),
    (Guard.TRUST_PER_RUN, Invariant.OVERLAP),
    (Guard.WATCHDOG, Invariant.OVERLAP),
    (Guard.CANCEL, Invariant.SURVIVAL),
    (Guard.HOLDER, Invariant.OUTCOME),
    (Guard.CLOCK, Invariant.OVERLAP),
]

FENCED = frozenset({Invariant.WRITE, Invariant.FOREIGN_RENEWAL, Invariant.STRANDED})
REMAINS = {
    # The fence does not depend on clocks: it protects the data from a suspended machine too.
    Guard.WATCHDOG: FENCED,
    Guard.CLOCK: FENCED,
    # Safety does not depend on the cancellation; it saves the process from the watchdog timer.
    Guard.CANCEL: frozenset(Invariant) - {Invariant.SURVIVAL},
    # A foreign renewal only delays the next run: no instance trusts a lease because of it.
    Guard.RENEWAL_FENCE: frozenset(Invariant) - {Invariant.FOREIGN_RENEWAL},
}


def size_of(protocol: Protocol) -> str:
    clock = f", step {protocol.step}" if protocol.step else ""
    return f"{protocol.instances} instances, lease {protocol.lease}, room {protocol.room}{clock}"


@pytest.mark.parametrize("protocol", SMALL + LARGE * FULL, ids=size_of)
def test_no_state_breaks_an_invariant(protocol: Protocol) -> None:
    """With all guards in place no invariant breaks, and a job waits for at most one lease."""
    result = search(protocol)
    report_figures(f"{result.states:,} states, {result.steps:,} steps")
    assert result.broken is None, "\n".join(result.trace)
    assert result.ticks_to_claim == protocol.lease


@pytest.mark.parametrize(
    ("guard", "invariant"), NEEDED, ids=[f"{guard.name}-{broken.name}" for guard, broken in NEEDED]
)
def test_each_guard_is_needed(guard: Guard, invariant: Invariant) -> None:
    """Without any one of the guards there is a path to a broken invariant."""
    result = search(Protocol(frozenset({guard}), lease=2), frozenset({invariant}))
    story = [f"Without this: {guard}.", *result.trace, f"Broken: {invariant}."]
    report_figures("\n".join(story))
    assert result.broken is invariant


def test_no_guard_and_no_invariant_is_left_out() -> None:
    """Each guard is removed once, and each invariant is seen to break."""
    assert {guard for guard, _ in NEEDED} == set(Guard)
    assert {invariant for _, invariant in NEEDED} == set(Invariant)


@pytest.mark.parametrize("guard", REMAINS, ids=lambda guard: guard.name)
def test_what_remains_without_a_guard(guard: Guard) -> None:
    """Without one guard, the other invariants still hold."""
    protocol = Protocol(frozenset({guard}), lease=2, room=size(1, 2))
    result = search(protocol, REMAINS[guard])
    report_figures(f"Without this: {guard}. {result.states:,} states")
    assert result.broken is None, "\n".join(result.trace)


@pytest.mark.parametrize("beyond", [replace(STEPPING, reserve=0), replace(STEPPING, step=2)])
def test_a_clock_that_steps_further_than_the_reserve_lets_runs_overlap(beyond: Protocol) -> None:
    """Control: up to the reserve no invariant breaks; beyond it, trust outlasts the lease.

    The writes of a run are fenced all the same.
    """
    for invariant in (Invariant.TRUST, Invariant.OVERLAP):
        result = search(beyond, frozenset({invariant}))
        report_figures("\n".join([f"Reserve {beyond.reserve}, step {beyond.step}.", *result.trace]))
        assert result.broken is invariant
    assert search(replace(beyond, room=1), FENCED).broken is None
