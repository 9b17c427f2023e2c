"""Balances that never go below zero, and periodic jobs shared without a master.

`balances` keeps who has how much, and changes it in real time; `jobs` runs periodic functions on
any number of equal instances, never one twice at once. Neither knows the other; `maintenance` are
the jobs that this service has for its own data. Everything else is what they are met through.
"""

from importlib.metadata import version
from typing import Final

__version__: Final = version("balance-app")
