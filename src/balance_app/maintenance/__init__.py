"""The ten jobs of this service, on its own data. They are also the worked example of writing jobs.

Three audit: the ledger and the holds against the accounts, keys and external ids against what they
name, the daily balances against the ledger. An audit that finds a mismatch fails, and its metric
stays set until an audit succeeds. Three write summaries that could not be computed later, or only
at a cost. One watches values that have a limit. Two delete data whose retention is over (one of
them also ends overdue holds), and one refreshes the planner's statistics.

All process their tables in batches, each a short transaction by `Run.transaction`, which checks the
fence. So they hold no lock for long, and a run that has lost its lease writes nothing more. Each
batch ends with a checkpoint, from which the next run continues if this one is released or lost.
"""

from balance_app.maintenance.audits import audit_daily_balances, audit_keys, audit_ledger
from balance_app.maintenance.housekeeping import (
    prune_history,
    prune_refused_keys,
    refresh_statistics,
)
from balance_app.maintenance.limits import watch_limits
from balance_app.maintenance.summaries import note_daily_balances, record_sizes, total_days

__all__ = [
    "audit_daily_balances",
    "audit_keys",
    "audit_ledger",
    "note_daily_balances",
    "prune_history",
    "prune_refused_keys",
    "record_sizes",
    "refresh_statistics",
    "total_days",
    "watch_limits",
]
