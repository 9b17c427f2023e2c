"""The ten jobs, each on a real database and with a real `Run`."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from typing_extensions import override

from balance_app.balances.repository import CHANGE, CHANGE_ONCE, OPEN, REFUSE_ONCE
from balance_app.database import Database
from balance_app.jobs import audits, limits, steps, summaries
from balance_app.jobs.audits import LedgerMismatchError
from balance_app.jobs.housekeeping import ANALYZE, JOBS
from balance_app.jobs.limits import LimitNearError
from balance_app.jobs.registry import Registry
from balance_app.jobs.repository import Claimed, JobRepository, Me
from balance_app.jobs.run import LeaseLostError, Run
from balance_app.jobs.schedule import Every
from balance_app.settings import load_settings
from tests.processes import connect

Connection = asyncpg.Connection[asyncpg.Record] if False else Any  # replaced below
