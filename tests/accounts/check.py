"""An exact check of what the clients of several accounts were answered, against ledgers and holds.

Each account alone is checked by `tests.history`. A transfer is a change of the payer's account and
one of the payee's; a capture and a reversal are changes too. What has no key of its own gets one
from what it refers to ("capture of 3", "reversal of 7"), since it may take effect only once: a
second capture of a hold is then a key with two effects.

Holds end and begin without a new version. An account's entries and holds, in the order of their
times, are its timeline: all states (version, balance, held) that it ever had. Times are given under
the row's lock, so that they rise with the versions.

All accounts together are strictly serializable if the operations have one order that keeps the
order of each timeline, puts each read between the event that made its state and the next, and keeps
the real-time order. Where the graph of these orders has no cycle, give each operation the latest
sending time among itself and all before it: an order exists if and only if no operation was
answered before this time. The total of all balances then changes only by changes: the halves of a
transfer are opposite, and no snapshot lies between them.

The floor of an account does not change during the run, and no account is frozen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from tests.accounts import holds, order, transfers
from tests.accounts.index import Index
from tests.accounts.model import Account, Operation
from tests.history import Violation

Rule = Callable[[Index], Iterator[Violation]]
RULES: tuple[Rule, ...] = (*transfers.RULES, *holds.RULES)


def check_accounts(
    accounts: Mapping[int, Account], operations: Iterable[Operation]
) -> list[Violation]:
    """Return the violations in the operations of several accounts, which are given by user id.

    `operations` must hold every try that was sent to any of the accounts, in any order; all other
    accounts that they transfer to or from must be given too.
    """
    index = Index(accounts, tuple(operations))
    violations = [violation for rule in RULES for violation in rule(index)]
    # Contradictory rows and answers have no meaningful order.
    return violations or list(order.one_order_explains_all(index))
