"""Jobs that check the consistency of the stored data, and fail with the differences.

Each reads its tables in batches, and all that one check compares in the snapshot of one statement:
a movement writes all of its rows in one statement, so an audit sees it whole or not at all, however
many are under way. None locks a row. What a row refers to is found by its primary key.
"""

from typing import Final

from balance_app.maintenance.audits.daily_balances import audit_daily_balances
from balance_app.maintenance.audits.faults import LedgerMismatchError
from balance_app.maintenance.audits.keys import audit_keys
from balance_app.maintenance.audits.ledger import audit_ledger

AUDITS: Final = (audit_ledger, audit_keys, audit_daily_balances)

__all__ = ["AUDITS", "LedgerMismatchError", "audit_daily_balances", "audit_keys", "audit_ledger"]
