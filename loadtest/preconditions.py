"""Checked before any request is sent: targets that listen on loopback, enough open files."""

import asyncio
import os
import resource
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Self
from urllib.parse import urlsplit

from dotenv import dotenv_values

_PROBE_TIMEOUT_SECONDS = 5
_PORTS_OF_CONTAINERS = range(3001, 3006)
_FILES_BESIDE_CONNECTIONS = 64


class CannotRunError(Exception):
    """The load test cannot run; the message is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """One address of the service; several may be instances of one service."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a base URL such as `http://127.0.0.1:3000`.

        Raises:
            CannotRunError: the URL isn't a plain base URL, or its host not a loopback address.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        else:
            if parts.scheme != "http" or parts.path.strip("/") or parts.query or parts.username:
                host = None
        if host is None:
            shown = url.rpartition("@")[2]  # without a password
            raise CannotRunError(f"{shown} is not a base URL: write it like http://127.0.0.1:3000.")
        if not _is_loopback(host):
            raise CannotRunError(
                f"{host} is not this machine: the burst is only sent to a loopback address "
                "(localhost, 127.0.0.0/8 or ::1)."
            )
        return cls(host, 80 if port is None else port)

    @property
    def authority(self) -> str:
        """Return `host:port`, as in URLs and the Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Return the base URL, without a slash at the end."""
        return f"http://{self.authority}"


def absent(target: Target) -> CannotRunError:
    """Return the error for a target where nothing listens."""
    return CannotRunError(f"No service answers at {target.url}: start it with `make run`.")


async def find() -> list[Target]:
    """Return the service's default addresses: that of `make run`, or those of the containers.

    BALANCE_APP_URL and PORT, from the environment or `.env`, apply as for the service's commands.

    Raises:
        CannotRunError: nothing listens at any of these addresses.
    """
    variables = {**dotenv_values(".env", encoding="utf-8-sig"), **os.environ}
    url = variables.get("BALANCE_APP_URL") or f"http://127.0.0.1:{variables.get('PORT') or 3000}"
    target = Target.parse(url)
    try:
        return [await locate(target)]
    except CannotRunError:
        if variables.get("BALANCE_APP_URL"):
            raise
    containers = [Target("127.0.0.1", port) for port in _PORTS_OF_CONTAINERS]
    tried = await asyncio.gather(*(locate(each) for each in containers), return_exceptions=True)
    if found := [each for each in tried if isinstance(each, Target)]:
        return found
    raise absent(target)


async def locate(target: Target) -> Target:
    """Connect once and return the target with the numeric address that accepted.

    A name is resolved here, once, instead of once for each connection of the burst.

    Raises:
        CannotRunError: nothing listens there, or the name resolves to another machine.
    """
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_SECONDS):
            _, writer = await asyncio.open_connection(target.host, target.port)
    except OSError as error:
        raise absent(target) from error
    address: str = writer.get_extra_info("peername")[0]
    writer.close()
    await writer.wait_closed()
    if not _is_loopback(address):
        raise CannotRunError(f"{target.host} resolves to {address}, not a loopback address.")
    return Target(address, target.port)


def allow_open_files(connections: int) -> None:
    """Raise this process's soft limit of open files as far as so many connections need.

    Raises:
        CannotRunError: the hard limit is below what is needed.
    """
    needed = connections + _FILES_BESIDE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise CannotRunError(
            f"{connections} connections need {needed} open files and this shell allows {hard}: "
            f"raise it with `ulimit -n {max(needed, 20_000)}` (as root, or in the shell's limits) "
            f"or reuse fewer connections with `--connections {max(1, hard // 2)}`."
        )
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, ValueError) as error:
        raise CannotRunError(
            f"{connections} connections need {needed} open files and raising the limit from {soft} "
            f"failed ({error}): raise it with `ulimit -n {needed}` or use `--connections`."
        ) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
