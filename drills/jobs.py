"""Jobs that write to files, by which overlaps are found without asking the database.

`JOBS_MODULES` of an instance names this module; the environment configures it as that of
`tests.jobs.fleet`.
"""

import os
from pathlib import Path

from tests.jobs.fleet import declare
from tests.jobs.kinds import EventLog

_event_log = EventLog(Path(os.environ["FLEET_EVENT_LOGS"]))
_count = int(os.environ["FLEET_JOBS"])
globals().update({f"job_{each}": declare(each, _event_log) for each in range(1, _count + 1)})
