"""Balances that never go below zero, and periodic jobs shared without a master.

`balances` keeps each user's balance and changes it in real time; `jobs` runs periodic functions on
any number of equal instances, never one twice at once. Neither imports the other; `maintenance`
holds the jobs that this service runs on its own data. The other folders serve these: HTTP, the
operator's page, the command line, and the database.
"""

from importlib.metadata import version
from typing import Final

__version__: Final = version("balance-app")
