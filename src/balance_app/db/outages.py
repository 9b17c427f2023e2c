"""Classification of database errors: why it can't be used, and whether a write took effect.

`classify` is the only place that interprets SQLSTATEs and the driver's exceptions. The cause it
returns is logged once, shown by `/readyz`, and reported to each request that is refused for it.
"""

from __future__ import annotations

import errno
import re
import ssl
from enum import Enum
from socket import gaierror
from typing import Final, NamedTuple

import asyncpg

from balance_app.errors import Applied
from balance_app.sessions import (
    OLDEST_SERVER,
    CertificateRefusedError,
    NotReplicatedError,
    OldServerError,
    PoolerError,
    StandbyError,
)


class Kind(Enum):
    """Why the database can't be used, as a sentence for people."""

    NOT_REACHED = "The service has not reached its database yet."
    STOPPING = "The service is stopping."
    REFUSED = "The database can't be reached: no server accepts connections at its address."
    UNREACHABLE = "The database can't be reached: there is no route to its address."
    UNKNOWN_HOST = "The database can't be reached: its host name is unknown."
    NO_ANSWER = "The database does not answer in time."
    CUT_OFF = "The connection to the database was lost."
    TLS = "The database can't be reached: no secure connection (TLS) can be made."
    TLS_NOT_OFFERED = "The database offers no secure connection (TLS), which sslmode demands."
    TLS_ISSUER = "The database's certificate is not signed by one of those in sslrootcert."
    TLS_HOST = "The database's certificate is that of another host."
    TLS_EXPIRED = "The database's certificate has expired, or is not valid yet."
    TLS_CLIENT = (
        "The database ended the connection when it had this service's certificate (sslcert): it is "
        "not signed by one that it knows, or has expired."
    )
    STARTING = "The database is starting or shutting down."
    ENDED = "The database ended the session."
    STANDBY = "No primary of the database is found, only a standby, which may lack changes."
    NOT_REPLICATED = "A commit did not wait for its standby: if the primary fails now, it is lost."
    NO_FITTING_HOST = "No host of the database meets target_session_attrs."
    READ_ONLY = "The database is read-only at present: balances can be read, but not changed."
    FULL = "The database accepts no more connections: a limit is reached."
    FILES = "This instance has no free file descriptor for a connection: too many open files."
    PASSWORD = "The database refuses the password."  # noqa: S105 - a sentence
    NOT_ALLOWED = "The database does not let this user log in (pg_hba.conf, or the role)."
    NO_DATABASE = "The database of this name does not exist, or can't be opened."
    PRIVILEGE = "The role lacks a privilege in the database."
    POOLER = (
        "A pooler in front of PostgreSQL breaks sessions (as PgBouncer does in transaction mode): "
        "connect to PostgreSQL itself, or set DB_POOLER=transaction, and DB_DIRECT_URL to the "
        "address of PostgreSQL itself."
    )
    NO_SERVER = "The pooler has no connection to PostgreSQL."
    TOO_OLD = f"The database's server is too old: PostgreSQL {OLDEST_SERVER} or newer is needed."
    SETTINGS = "The connection's settings can't be used."
    DISK_FULL = "The database's disk is full."
    RESOURCES = "The database is short of resources."
    TIME_LIMIT = "The database ended the statement: a time limit."
    LOCKED = "A row or table was locked for too long."
    CONFLICT = "The database ended the transaction: it conflicted with another."
    BROKEN = "The database met a system error."
    CLOSED = "The database allows no connections."
    SCHEMA = "The schema can't be used."
    SCHEMA_LOST = "Tables of this service are missing in the database, in whole or in part."
    REPLACED = "The database was replaced by another, as one that was restored from a backup."
    UNEXPECTED = "The database can't be used; the log says why."


class Cause(NamedTuple):
    """The classification of an error."""

    kind: Kind
    # `no`: the server reported that it rolled back, or nothing was sent; `unknown`: the connection
    # ended, or the time was up, before an answer came
    applied: Applied
    sqlstate: str | None = None
    # the message of the server or the driver, for the log
    text: str = ""

    @property
    def sentence(self) -> str:
        """The cause for people, with the server's code if it gave one."""
        if self.kind is Kind.SCHEMA:
            return self.text
        sentence = str(self.kind.value)
        if self.sqlstate is None:
            return sentence
        return f"{sentence.removesuffix('.')} (SQLSTATE {self.sqlstate})."


# Causes that end the start of an instance at once: waiting for them could last for ever.
PERMANENT: Final = frozenset(
    {
        Kind.PASSWORD,
        Kind.NOT_ALLOWED,
        Kind.NO_DATABASE,
        Kind.PRIVILEGE,
        Kind.POOLER,
        Kind.TOO_OLD,
        Kind.SETTINGS,
        Kind.TLS_NOT_OFFERED,
        Kind.TLS_ISSUER,
        Kind.TLS_HOST,
    }
)
# Causes that end one statement only: the database and other statements are not affected.
OF_A_STATEMENT: Final = frozenset({Kind.TIME_LIMIT, Kind.LOCKED, Kind.CONFLICT})

# The longest pause between two tries to connect, in seconds: within a second for outages that end
# by themselves; longer where an operator has to act, so that the tries don't fill the server's log.
_LONGEST_PAUSES: Final = {
    **dict.fromkeys(PERMANENT, 5.0),
    Kind.TLS: 5.0,
    Kind.TLS_EXPIRED: 5.0,
    Kind.TLS_CLIENT: 5.0,
    Kind.UNKNOWN_HOST: 2.0,
    Kind.FULL: 1.0,
    Kind.CLOSED: 1.0,
    Kind.SCHEMA: 1.0,
    Kind.UNEXPECTED: 1.0,
    Kind.READ_ONLY: 1.0,
    Kind.STANDBY: 0.5,
}
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 0.3


def pause_seconds(kind: Kind, tries: int) -> float:
    """Return how long to wait after `tries` failed tries, before jitter."""
    return min(FIRST_PAUSE * 2.0 ** min(tries, 10), _LONGEST_PAUSES.get(kind, LONGEST_PAUSE))


def applied_if_unavailable(error: BaseException) -> Applied | None:
    """Return whether a write took effect, if the database is at fault; None: the statement is."""
    cause = classify(error)
    return None if cause is None else cause.applied


def cause_of(problem: BaseException) -> Cause | None:
    """Return the cause of the error that a problem was made of, if it was made of one."""
    return None if problem.__cause__ is None else classify(problem.__cause__)


def ends_a_statement_only(problem: BaseException) -> bool:
    """Return whether the error that a problem was made of leaves the database available."""
    cause = cause_of(problem)
    return cause is not None and cause.kind in OF_A_STATEMENT


def is_fatal(error: BaseException) -> bool:
    """Return whether the server ended the session with this error, in whatever language."""
    severity = getattr(error, "severity_en", None) or getattr(error, "severity", None)
    return severity in {"FATAL", "PANIC"}


def classify(error: BaseException) -> Cause | None:
    """Return the cause of an error; None: the statement itself is at fault."""
    text = " ".join(str(error).split()) or type(error).__name__
    if notes := getattr(error, "__notes__", None):  # one for each of several hosts
        text = "; ".join(notes)
    if isinstance(error, asyncpg.PostgresError):
        cause = error.__cause__
        if isinstance(cause, asyncpg.ProtocolViolationError):  # said before it hung up
            error, text = cause, " ".join(str(cause).split())
        return _from_server(error, error.sqlstate or "", text)
    kind = _from_driver(error, text)
    if kind is None:
        return None
    return Cause(kind, "no" if kind is Kind.STANDBY else "unknown", text=text)


def _from_driver(error: BaseException, text: str) -> Kind | None:
    if isinstance(error, ssl.SSLError):
        return _from_tls(error)
    if isinstance(error, OSError) and not isinstance(error, gaierror | TimeoutError):
        return _from_system(error, text)
    return next((kind for types, kind in _EXCEPTIONS if isinstance(error, types)), None)


# The first match counts: some exceptions are instances of several of these types.
_EXCEPTIONS: Final[tuple[tuple[type[Exception], Kind | None], ...]] = (
    (PoolerError, Kind.POOLER),
    (StandbyError, Kind.STANDBY),
    (CertificateRefusedError, Kind.TLS_CLIENT),
    (NotReplicatedError, Kind.NOT_REPLICATED),
    (OldServerError, Kind.TOO_OLD),
    (asyncpg.ClientConfigurationError, Kind.SETTINGS),
    (gaierror, Kind.UNKNOWN_HOST),
    (TimeoutError, Kind.NO_ANSWER),
    (ValueError, None),  # asyncpg's DataError: an argument of the wrong type
    (asyncpg.TargetServerAttributeNotMatched, Kind.NO_FITTING_HOST),
    # InternalClientError: the server ended the session (FATAL) while the connection was idle, and
    # the next statement used the closing connection.
    (asyncpg.InterfaceError, Kind.CUT_OFF),
    (asyncpg.InternalClientError, Kind.CUT_OFF),
)


def _from_system(error: OSError, text: str) -> Kind:
    # After trying several addresses, an event loop gives the errno of each in the text only.
    codes = {error.errno} if error.errno else {int(code) for code in _ERRNO.findall(text)}
    if codes & {errno.EMFILE, errno.ENFILE}:
        return Kind.FILES
    if codes & {errno.ECONNREFUSED, errno.ENOENT}:  # ENOENT: there is no such Unix socket
        return Kind.REFUSED
    if codes & {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EHOSTDOWN}:
        return Kind.UNREACHABLE
    if codes & {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG}:
        return Kind.UNREACHABLE
    if "SSL" in text and not codes:  # asyncpg's: the server refuses TLS, or answers otherwise
        return Kind.TLS_NOT_OFFERED if "rejected" in text else Kind.TLS
    return Kind.CUT_OFF


def _from_tls(error: ssl.SSLError) -> Kind:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _CERTIFICATE.get(getattr(error, "verify_code", 0), Kind.TLS)
    # an alert of the server's about the certificate of this service
    alert = re.search("ALERT_(UNKNOWN_CA|.*CERTIFICATE)", error.reason or "")
    return Kind.TLS if alert is None else Kind.TLS_CLIENT


# X509_V_ERR_* of OpenSSL's x509_vfy.h
_CERTIFICATE: Final = {
    **dict.fromkeys((2, 18, 19, 20, 21), Kind.TLS_ISSUER),
    **dict.fromkeys((9, 10), Kind.TLS_EXPIRED),
    **dict.fromkeys((62, 64), Kind.TLS_HOST),
}
_ERRNO: Final = re.compile(r"\[Errno (\d+)\]")


def _from_server(error: asyncpg.PostgresError, state: str, text: str) -> Cause | None:
    # Appendix A of the PostgreSQL manual lists the codes.
    if state.startswith("08"):
        return _from_pooler(state, text)
    kind = next((kind for start, kind in _STATES if state.startswith(start)), None)
    if is_fatal(error):
        # A refused connection (57P03, class 53) sent nothing; other ends may follow a commit.
        applied: Applied = "no" if state.startswith(("53", "57P03")) else "unknown"
        closed = state == "55000"  # ALTER DATABASE ... ALLOW_CONNECTIONS false
        return Cause(Kind.CLOSED if closed else kind or Kind.ENDED, applied, state, text)
    if kind is None:
        return None
    return Cause(kind, "unknown" if state.startswith("57P") else "no", state, text)


def _from_pooler(state: str, text: str) -> Cause:
    """Classify an error of the connection, which a pooler may have reported.

    PgBouncer gives one code to all that it reports itself, and does not translate it.
    """
    for part, kind in _OF_POOLERS:
        if part in text:
            return Cause(kind, "no", state, text)
    return Cause(Kind.CUT_OFF, "unknown", state, text)


# PgBouncer's texts for connections that it refuses, and for statements that waited for a session of
# PostgreSQL and were not sent. After any other text a statement may have been.
_OF_POOLERS: Final = (
    ("startup parameter", Kind.POOLER),
    ("statement pooling", Kind.POOLER),
    ("query_wait_timeout", Kind.FULL),
    ("no more connections allowed", Kind.FULL),
    ("server login", Kind.NO_SERVER),
    ("server DNS lookup failed", Kind.NO_SERVER),
    ("server_connect_timeout", Kind.NO_SERVER),
    ("client_login_timeout", Kind.NO_SERVER),
    ("connect failed", Kind.NO_SERVER),
    ("no such database", Kind.NO_DATABASE),
    ("password authentication failed", Kind.PASSWORD),
    ("authentication failed", Kind.NOT_ALLOWED),
    ("no such user", Kind.NOT_ALLOWED),
    ("not allowed", Kind.NOT_ALLOWED),
)

_STATES: Final = (
    ("25006", Kind.READ_ONLY),
    ("25P0", Kind.TIME_LIMIT),
    ("28P01", Kind.PASSWORD),
    ("28", Kind.NOT_ALLOWED),
    ("3D000", Kind.NO_DATABASE),
    ("3F000", Kind.SCHEMA_LOST),
    ("40", Kind.CONFLICT),
    ("42703", Kind.SCHEMA_LOST),  # no such column
    ("42883", Kind.SCHEMA_LOST),  # no such function
    ("42P01", Kind.SCHEMA_LOST),  # no such table
    ("42501", Kind.PRIVILEGE),
    ("53100", Kind.DISK_FULL),
    ("53300", Kind.FULL),
    ("53", Kind.RESOURCES),
    ("55P03", Kind.LOCKED),
    ("57014", Kind.TIME_LIMIT),
    ("57P03", Kind.STARTING),
    ("57P04", Kind.NO_DATABASE),
    ("57P", Kind.ENDED),
    ("58", Kind.BROKEN),
)
