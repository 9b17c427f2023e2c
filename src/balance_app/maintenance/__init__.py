"""The ten jobs of this service, on its own data: also the worked example of how jobs are written.

Three audit (the ledger against the balances, keys against entries, the daily balances against the
ledger): one that finds a mismatch fails, and its metric stands until an audit succeeds. Three write
summaries that could not be computed later, or only at a cost. One watches numbers that can't grow
for ever. Three forget what is older than it was promised to be kept, and keep the planner's
statistics fresh.

All of them go through their tables in batches, one short transaction each, written through
`Run.transaction`, which checks the fence: so they never hold anybody up, and a run that was taken
over writes nothing more. Each batch ends with a checkpoint, from which the next run goes on when
this one is released or lost.
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
