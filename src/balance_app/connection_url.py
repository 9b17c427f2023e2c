"""Strict parsing of DATABASE_URL, and of the settings that say the same in parts.

The rules are libpq's, as people try a URL with `psql URL`. Where libpq guesses, this parser refuses
the URL: a character of the password that also separates parts of the URL must be written as % and
its code. No error message quotes text that may be a part of the password.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

from balance_app.sessions import PINNED

LAST_PORT: Final = 65535


class UrlError(ValueError):
    """The URL can't be used; the message says why, and shows nothing secret."""


class Target(NamedTuple):
    """How to connect to the database of a URL."""

    # keyword arguments of `asyncpg.connect`; `dsn` has what asyncpg reads only from a DSN (TLS)
    arguments: dict[str, Any]
    # server settings for the startup packet
    server_settings: dict[str, str]
    # longest time to connect, if the URL sets one
    connect_seconds: float | None


def parse(url: str, tls: Mapping[str, str] | None = None) -> Target:
    """Read `postgresql://user:password@host:port/name?parameters`.

    `tls` holds parameters of TLS for what the URL leaves open.

    Raises:
        UrlError: the URL can't be used.
    """
    scheme, separator, rest = url.strip().partition("://")
    if not separator or scheme.partition("+")[0] not in {"postgres", "postgresql"}:
        raise UrlError("must start with postgresql://")
    if re.search(r"[\x00-\x20\x7f]", rest):
        raise UrlError("has a space or a control character: write it as % and its code (%20)")
    userinfo, hosts, name, query = _split(rest)
    user, colon, password = userinfo.partition(":")
    arguments: dict[str, Any] = {
        "user": _decoded(user, "user") or None,
        "password": _decoded(password, "password") if colon else None,
        "database": _decoded(name, "database's name") or None,
        "target_session_attrs": "any",
    }
    arguments["host"], arguments["port"] = _hosts(hosts)
    if arguments["host"] is None and "," in (several := os.environ.get("PGHOST", "")):
        arguments["host"] = [host_name(host) for host in several.split(",")]
    parameters = _parameters(query)
    return _apply(arguments, _with_tls(parameters, tls or {}))


def from_parts(
    hosts: str | None, ports: str, tls: Mapping[str, str], **arguments: str | None
) -> Target:
    """Make the target that DB_HOST and the other parts of a connection name.

    Raises:
        UrlError: the parameters of TLS can't be used; the message begins with a setting's name.
    """
    _check_use(tls, tls)
    _check_tls(tls, lambda parameter: f"DB_{parameter.upper()}")
    found: dict[str, Any] = {**arguments, "target_session_attrs": "any"}
    found["host"] = None if hosts is None else hosts.split(",")
    found["port"] = 5432 if hosts is None else [int(port) for port in ports.split(",")]
    return _apply(found, dict(tls))


def tls_parameters(url: str) -> dict[str, str]:
    """Return the parameters of TLS in a URL that `parse` has read."""
    parameters = _parameters(_split(url.strip().partition("://")[2])[3])
    return {key: value for key, value in parameters.items() if key in _TLS}


def _with_tls(parameters: dict[str, str], tls: Mapping[str, str]) -> dict[str, str]:
    """Add parameters of TLS that the URL does not set; a certificate and its key are a pair."""
    own = parameters.keys()
    pair = {"sslcert", "sslkey"}
    both = parameters | {
        key: value
        for key, value in tls.items()
        if key not in own and not (key in pair and pair & own)
    }
    _check_use(tls, both)
    return both


def _check_use(tls: Mapping[str, str], parameters: Mapping[str, str]) -> None:
    """Refuse settings of TLS that would be without effect."""
    mode = parameters.get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    if "sslrootcert" in tls and mode in {"disable", "allow", "prefer"}:
        raise UrlError(
            f"DB_SSLROOTCERT verifies nothing with sslmode {mode}: set DB_SSLMODE=verify-full"
        )
    if "sslkey" in tls and "sslcert" not in parameters:
        raise UrlError("DB_SSLKEY is the key of no certificate: set DB_SSLCERT, too")


def passwords(url: str) -> set[str]:
    """Return the passwords in a URL that `parse` has read, as they are written and decoded."""
    userinfo, _, _, query = _split(url.strip().partition("://")[2])
    parameters = (each.partition("=") for each in query.split("&"))
    written = [userinfo.partition(":")[2]]
    written += [value for key, _, value in parameters if key in {"password", "sslpassword"}]
    return {form for each in written for form in (each, unquote(each))}


def _split(rest: str) -> tuple[str, str, str, str]:
    """Return user and password, hosts and ports, the database's name, and the parameters."""
    before, at, after = rest.partition("@")
    if "@" in after:
        raise UrlError("has more than one @: in a user's name or password write it as %40")
    if not at:
        before, after = "", rest
    elif "/" in before:
        raise UrlError(
            "has a / before the @: in a user's name or password write it as %2F "
            "(and an @ behind the host as %40)"
        )
    end = re.search(r"[/?#]", after)
    hosts, tail = (after[: end.start()], after[end.start() :]) if end else (after, "")
    path, _, query = tail.partition("?")
    if "#" in tail:
        raise UrlError("has a #: write it as %23")
    return before, hosts, path.removeprefix("/"), query


def _decoded(text: str, what: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise UrlError(f"has a % in the {what} that starts no code: write it as %25")
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeError:
        raise UrlError(f"has a code (%..) in the {what} that is not UTF-8") from None
    if "\0" in decoded:
        raise UrlError(f"has a %00 in the {what}")
    return decoded


def _hosts(text: str) -> tuple[list[str] | None, list[int] | int]:
    """Return hosts and ports; None for hosts is the default socket of PostgreSQL's clients."""
    hosts: list[str] = []
    ports: list[int] = []
    for each in text.split(",") if text else ():
        found = re.fullmatch(r"(\[[0-9A-Fa-f:.%a-z]+\]|[^:\[\]]*)(?::(.*))?", each)
        if found is None:
            raise UrlError("has a host that can't be read: write an IPv6 address in [ and ]")
        host, port = found.groups()
        hosts.append(host_name(_decoded(host.strip("[]"), "host")))
        ports.append(_port(port))
    if len(hosts) <= 1 and not any(hosts):
        return None, ports[0] if ports else 5432
    if not all(hosts):
        raise UrlError("has an empty host in its list of hosts")
    return hosts, ports


def _port(text: str | None) -> int:
    if not text:
        return 5432
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= LAST_PORT:
        raise UrlError(
            "has a port that is not a number from 1 to 65535 "
            "(or a : or another special character of a password that is not written as %..)"
        )
    return int(text)


def host_name(host: str) -> str:
    """Return a host's name, address, or socket directory.

    Raises:
        UrlError: the text is none of these.
    """
    if host.startswith("/") or not host:
        return host
    if re.search(r"[\s/@,\"'\\]", host):
        raise UrlError("names a host with a character that no host name has")
    try:
        host.encode("idna")
    except UnicodeError:
        raise UrlError("names a host that is not a host name (an empty or too long part)") from None
    return host


def _parameters(query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for number, each in enumerate(query.split("&") if query else (), 1):
        key, equals, value = each.partition("=")
        if not equals or "=" in value:
            raise UrlError("has a parameter after the ? that is not written as name=value")
        if key not in _KNOWN:
            raise UrlError(_unknown(key, number))
        parameters[key] = _decoded(value, f"parameter {key}")
    return parameters


def _unknown(key: str, number: int) -> str:
    """Return the message; it names only what resembles a parameter, not the rest of a password."""
    if key in _HINTS:
        return f"has the parameter {key}, which is not known here: {_HINTS[key]}"
    near = get_close_matches(key, _KNOWN, 1, 0.8)
    if near:
        return f"has the parameter {key}, which is not known: {near[0]}?"
    return (
        f"has a parameter that is not known (number {number} after the ?): settings of the server "
        "are written as options=-c%20name%3Dvalue"
    )


# -- parameters --------------------------------------------------------------------------------

SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# asyncpg reads these from a DSN only
_TLS: Final = (
    "sslmode",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslrootcert",
    "sslcrl",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "sslnegotiation",
)
_FILES: Final = ("sslcert", "sslkey", "sslrootcert", "sslcrl", "passfile")
_TLS_VERSION: Final = r"TLSv1(\.[123])?"
# The parameters that are supported, and the pattern of their supported values.
_HONOURED: Final[Mapping[str, str]] = {
    **dict.fromkeys(_FILES, r"(?!system$).+"),
    "host": r".+",
    "port": r"[0-9,]+",
    "dbname": r".+",
    "user": r".+",
    "password": r".*",
    "sslmode": "|".join(SSL_MODES),
    "sslpassword": r".*",
    "sslnegotiation": "postgres|direct",
    "ssl_min_protocol_version": _TLS_VERSION,
    "ssl_max_protocol_version": _TLS_VERSION,
    "connect_timeout": r"[0-9]{1,4}",
    "application_name": r".+",
    "fallback_application_name": r".*",
    "options": r".*",
    # `read-write` and `primary` find the one of several hosts that can be written to
    "target_session_attrs": "any|read-write|primary",
    "krbsrvname": r".+",
    "gsslib": "gssapi|sspi",
    # The values are those of asyncpg's own behaviour.
    "channel_binding": "disable|prefer",
    "gssencmode": "disable|prefer",
    "client_encoding": "(?i:utf-?8|auto)",
    "load_balance_hosts": "disable",
    "sslcompression": "0",
    "sslsni": "1",
    "sslcertmode": "allow",
    "gssdelegation": "0",
}
# Parameters of libpq that are refused whatever the value.
_REFUSED: Final = frozenset(
    {
        "hostaddr",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "max_protocol_version",
        "min_protocol_version",
        "oauth_client_id",
        "oauth_client_secret",
        "oauth_issuer",
        "oauth_scope",
        "replication",
        "require_auth",
        "requirepeer",
        "requiressl",
        "scram_client_key",
        "scram_server_key",
        "service",
        "servicefile",
        "sslcrldir",
        "sslkeylogfile",
        "tcp_user_timeout",
    }
)
# asyncpg's names of these; as with libpq, the last three win over the parts before the ?.
_ARGUMENTS: Final[Mapping[str, str]] = {
    "passfile": "passfile",
    "krbsrvname": "krbsrvname",
    "gsslib": "gsslib",
    "target_session_attrs": "target_session_attrs",
    "dbname": "database",
    "user": "user",
    "password": "password",
}
_FOR_THE_SERVER: Final[tuple[str, ...]] = ("application_name", "options")
_KNOWN: Final = _HONOURED.keys() | _REFUSED
# Parameters of other programs.
_HINTS: Final[Mapping[str, str]] = {
    "database": "use dbname",
    "ssl": "use sslmode",
    "schema": "use DB_SCHEMA",
    "currentSchema": "use DB_SCHEMA",
    "search_path": "use DB_SCHEMA",
    "statement_timeout": "use DB_STATEMENT_SECONDS",
    "lock_timeout": "use DB_LOCK_SECONDS",
    "command_timeout": "use DB_STATEMENT_SECONDS",
    "timeout": "use connect_timeout",
    "pool_size": "use DB_POOL_SIZE",
    "pool_timeout": "use MAX_WAITING_SECONDS",
    "connection_limit": "use DB_POOL_SIZE",
    "pgbouncer": "use DB_POOLER",
    "server_settings": "use options",
    "prepared_statement_cache_size": "this service needs prepared statements",
    "statement_cache_size": "this service needs prepared statements",
}


def _apply(arguments: dict[str, Any], parameters: dict[str, str]) -> Target:
    for key, value in parameters.items():
        _check_value(key, value)
    _check_tls(parameters, str)
    if "host" in parameters:
        arguments["host"] = [host_name(host) for host in parameters["host"].split(",")]
        arguments["port"] = 5432
    if "port" in parameters:
        arguments["port"] = [_port(port) for port in parameters["port"].split(",")]
        if len(arguments["port"]) not in {1, len(arguments["host"] or "")}:
            raise UrlError("has a different number of ports than of hosts")
    for theirs, ours in _ARGUMENTS.items():
        if theirs in parameters:
            arguments[ours] = parameters[theirs]
    tls = [f"{key}={quote(parameters[key], safe='')}" for key in _TLS if parameters.get(key)]
    if tls:
        arguments["dsn"] = f"postgresql://?{'&'.join(tls)}"
    settings = {key: parameters[key] for key in _FOR_THE_SERVER if key in parameters}
    return Target(arguments, settings, float(parameters.get("connect_timeout", "0")) or None)


def _check_value(key: str, value: str) -> None:
    if key in _REFUSED:
        raise UrlError(f"has the parameter {key}, which this service does not support")
    if not re.fullmatch(_HONOURED[key], value):
        choices = _HONOURED[key].replace("|", ", ")
        can = f"; it can be {choices}" if re.fullmatch(r"[a-z0-9, -]+", choices) else ""
        raise UrlError(f"has a value of {key} that this service does not support{can}")
    if key == "options":
        _check_options(value)


def _check_options(text: str) -> None:
    """Refuse `options` for the server that set what this service sets itself."""
    for name in re.findall(r"(?:-c\s*|--)([A-Za-z_.-]+)\s*=", text):
        ours = name.replace("-", "_").lower()
        if ours in {*(each.lower() for each in PINNED), "search_path", "synchronous_commit"}:
            raise UrlError(f"has options that set {ours}, which this service sets itself")


def _check_tls(parameters: Mapping[str, str], named: Callable[[str], str]) -> None:
    """Load the files that the driver loads with each connection, to refuse wrong ones at start."""
    for key in _FILES:
        if key in parameters and not os.access(parameters[key], os.R_OK):
            raise UrlError(f"{named(key)} names a file that can't be read")
    mode, root = parameters.get("sslmode", ""), named("sslrootcert")
    certificates = parameters.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
    if mode.startswith("verify") and not (certificates or _default_file("root.crt").is_file()):
        raise UrlError(f"{named('sslmode')}={mode} needs the file of a root certificate ({root})")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if "sslrootcert" in parameters:
            context.load_verify_locations(parameters["sslrootcert"])
    except (OSError, ValueError):  # an ssl.SSLError is an OSError
        raise UrlError(f"{root} names a file without a certificate") from None
    if "sslcert" not in parameters:
        return
    password = parameters.get("sslpassword", "")
    try:
        context.load_cert_chain(
            parameters["sslcert"],
            parameters.get("sslkey") or os.environ.get("PGSSLKEY") or _default_key(),
            password=lambda: password,
        )
    except (OSError, ValueError):
        raise UrlError(
            f"{named('sslcert')} and {named('sslkey')} name no certificate with its key "
            "(or the key needs another password)"
        ) from None


def _default_key() -> Path | None:
    """Return where the driver looks for a key that is not named; else its certificate's file."""
    file = _default_file("postgresql.key")
    return file if file.is_file() else None


def _default_file(name: str) -> Path:
    """Return where libpq looks for a file; below no directory, if this user has no home."""
    return Path(os.path.expanduser(f"~/.postgresql/{name}"))  # noqa: PTH111 - Path's raises
