"""How many files and sockets one process may have open, and how many of them are for clients.

A login shell allows 1024, and lets the process raise its limit up to the hard limit. Each
connection of a client takes one, and so does each connection to the database: clients must not be
able to take them all.
"""

import resource
from typing import Final

from balance_app.settings import Settings

# No burst needs more, and some child processes loop over all descriptors that are allowed.
ENOUGH: Final = 1 << 20
MACOS_AT_MOST: Final = 10_240  # its "unlimited" can't be set
# A burst of the load test on one instance; a hard limit below that is reported at start.
BURST: Final = 10_000
# Files, pipes, name look-ups, child processes of jobs, connections that are being refused.
OTHER_FILES: Final = 48


def raise_limit() -> int:
    """Raise the soft limit of open files as far as possible; return the limit in force.

    Child processes inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft == resource.RLIM_INFINITY:
        return ENOUGH
    for limit in (most, MACOS_AT_MOST):
        if limit <= soft:
            break
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        except (OSError, ValueError):
            continue
        return limit
    return soft


def for_clients(settings: Settings, limit: int) -> int:
    """Return how many connections of clients leave enough for the database and everything else.

    When the limit is hardly enough for one instance, half of it is for clients.
    """
    return max(limit - OTHER_FILES - database_connections(settings), limit // 2)


def database_connections(settings: Settings) -> int:
    """Return how many connections to the database one instance may have open at once."""
    # Beside the two pools: heartbeat, probe, and two while it migrates.
    return settings.db_pool_size + settings.job_connections + 4


def shortage(settings: Settings, limit: int) -> str | None:
    """Return a warning when the limit is too low for a burst of MAX_WAITING requests."""
    clients = for_clients(settings, limit)
    if clients >= min(settings.max_waiting, BURST):
        return None
    return (
        f"This process may have {limit} files open, so it takes {clients} connections at once and "
        f"answers the others with 503: raise the hard limit (`ulimit -n 20000` as root, "
        "`LimitNOFILE=` of systemd, `--ulimit nofile=` of docker)."
    )
