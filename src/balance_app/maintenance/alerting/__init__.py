"""Alerts: somebody is told when nobody looks at the page.

The job `send-alerts` exists where `ALERT_URL`, `PING_URL` or `JOB_PING_URLS` is set. It compares
what is wrong now with what has been reported, both in rows, and records the difference as events:
a cause is there (`raised`) or is gone (`recovered`). Each event is one POST, in order, with an id
that is the same for each try. So the queue is the table `alerts`, and nothing is kept in memory.

At least once: an event is done when the receiver has accepted it, and an instance that dies between
the answer and the commit lets the next one send it again, with the same id. Not twice at once: the
lease of the job lets one instance send, and each try is recorded, fenced, before it is sent.

Pings are the reverse: an outside service alerts when they do not come. They tell what is so now, so
they are not queued: what could not be sent is replaced by what is so later.
"""

from balance_app.maintenance.alerting.events import Cause
from balance_app.maintenance.alerting.sender import Alerting

__all__ = ["Alerting", "Cause"]
