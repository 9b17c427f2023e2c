"""The facts of the machine on which something was measured."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from balance_app.local.postgres import binaries


def facts(where: Path) -> dict[str, str]:
    """Return the processors, memory, versions, the time of an fdatasync there, and the load."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    flushed = _output(str(binaries() / "pg_test_fsync"), "-s", "1", "-f", str(where / "fsync"))
    fdatasync = re.search(r"fdatasync\s+[\d.]+ ops/sec\s+(\d+) usecs/op", flushed)
    node = shutil.which("node")
    return {
        "Processors": f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}",
        "Memory": f"{memory:.0f} GiB",
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "PostgreSQL": _output(str(binaries() / "postgres"), "--version").split()[-1],
        "Node": _output(node, "--version").strip().lstrip("v") if node else "none",
        "A flush (fdatasync)": f"{fdatasync[1] if fdatasync else '?'} µs",
        "Load before": f"{os.getloadavg()[0]:.1f} (1 minute)",
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
