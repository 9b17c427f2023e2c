"""Configuration by environment (and `.env`), checked once when the program starts."""

import ipaddress
import os
import re
import socket
import stat
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from dotenv import dotenv_values
from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from balance_app import webhook_url
from balance_app.connection_url import (
    LAST_PORT,
    SSL_MODES,
    Target,
    UrlError,
    from_parts,
    host_name,
    parse,
    passwords,
    tls_parameters,
)
from balance_app.proxies import Network, networks
from balance_app.sessions import PINNED, SEARCH_PATH, addresses, shown

# The first segments of this service's own paths.
OWN_PATHS: Final = frozenset(
    {
        *("actions", "api", "change", "docs", "health", "instances", "jobs", "live", "livez"),
        *("login", "logout", "metrics", "openapi.json", "problems", "readyz", "runs", "static"),
        *("users", "verdict"),
    }
)

ENV_FILE: Final = Path(".env")
# NUL, and bytes that are not UTF-8, as Python reads them
_INVALID_TEXT: Final = re.compile("[\0\ud800-\udfff]")

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=3600)]


class Settings(BaseSettings):
    """The settings of one instance; a field's name in capitals is its environment variable."""

    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding="utf-8-sig",  # some editors write a byte order mark
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    # Before the URLs, which are checked together with them.
    db_sslmode: str | None = Field(
        None,
        pattern=f"^({'|'.join(SSL_MODES)})$",
        description="whether the connection has TLS, and what is verified (libpq's sslmode)",
    )
    db_sslrootcert: str | None = Field(
        None, description="file of the certificates that may sign the database's"
    )
    db_sslcert: str | None = Field(
        None, description="file of the certificate that this service shows to the database"
    )
    db_sslkey: str | None = Field(None, description="file of that certificate's key")

    database_url: SecretStr | None = Field(
        None, description="postgresql://user:password@host:port/name; wins over the DB_* parts"
    )
    migrate_database_url: SecretStr | None = Field(
        None,
        description="the same database as its owner, who migrates it and makes keys; by default "
        "as DATABASE_URL or DB_USER",
    )
    db_direct_url: SecretStr | None = Field(
        None,
        description="the same database past the pooler of DB_POOLER, for heartbeats, jobs and "
        "migrations",
    )
    db_pooler: Literal["none", "transaction"] = Field(
        "none",
        description="transaction: DATABASE_URL or DB_HOST is a pooler that gives each transaction "
        "any session (PgBouncer's pool_mode)",
    )
    db_host: str | None = Field(
        None,
        description="host name, address, or socket directory; of several, comma-separated, the one "
        "that is the primary",
    )
    db_port: str = Field("5432", description="its port; or one for each host, comma-separated")
    db_user: str = "postgres"
    db_password: SecretStr | None = None
    db_name: str = "postgres"
    db_schema: str = Field(
        "public",
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,62}$",
        description="the schema of all tables of this service; created if it is missing",
    )
    db_run_role: str = Field(
        "balance_app_run",
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,62}$",
        description="the role as which instances connect: migrations grant it what they need",
    )
    db_run_password: SecretStr | None = Field(
        None, description="the password that `balance-app migrate` gives to DB_RUN_ROLE"
    )

    db_pool_size: Annotated[int, Field(ge=1, le=100)] = Field(
        5, description="connections per instance: two for one account, the others for others"
    )
    db_connect_seconds: Seconds = 1.5
    db_statement_seconds: Seconds = Field(
        2.5, description="without an answer for this long, the database is unavailable"
    )
    db_lock_seconds: Seconds = Field(2.0, description="longest wait for a locked row")
    balance_group_commit: bool = Field(
        default=False,
        description="send changes of one account that wait for each other in one statement",
    )
    max_waiting: Annotated[int, Field(ge=1)] = Field(
        20_000, description="requests that may wait for a connection; one more is an overload"
    )
    max_waiting_seconds: Seconds = 60.0

    server_id: str = Field(default_factory=socket.gethostname, pattern=r"^[!-~]{1,100}$")
    host: str = "127.0.0.1"
    port: Port = 3000
    shared_port: Port | None = Field(
        None, description="a second port that several instances listen on together (SO_REUSEPORT)"
    )
    root_path: str = Field(
        "", description="what a proxy puts before each path, as /balances, even if it strips it"
    )
    allow_anonymous: bool = Field(
        default=False,
        description="serve without keys on an address that others can reach: a proxy in front "
        "authenticates them",
    )
    allowed_hosts: str = Field(
        "",
        description="names that the Host header may have where there are no keys, comma-separated, "
        "beside addresses and localhost; * for any",
    )
    trusted_proxies: str = Field(
        "",
        description="addresses and networks of proxies whose X-Forwarded-For, -Proto and -Host are "
        "believed, comma-separated",
    )
    rate_per_key: Annotated[float, Field(gt=0)] | None = Field(
        None, description="requests in a second that each key may send; by default any number"
    )
    streams_per_client: Annotated[int, Field(ge=1)] = Field(
        20,
        description="streams of events of one address (and key) at once, of 1000; behind a proxy "
        "that is not one of TRUSTED_PROXIES all clients have its address",
    )
    keep_alive_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        75,
        description="how long a connection may be idle; longer than a proxy keeps it (nginx: 60)",
    )
    body_seconds: Seconds = Field(5.0, description="longest time for a request body to arrive")
    drain_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        0.0,
        description="how long the instance listens after SIGTERM, not ready, until proxies send it "
        "nothing more; longer than they keep an idle connection to it",
    )
    stop_seconds: Annotated[int, Field(ge=1, le=60)] = Field(
        3, description="how long requests under way may take to end after SIGTERM and DRAIN_SECONDS"
    )

    jobs_enabled: bool = Field(
        default=True, description="false: this instance serves requests only"
    )
    job_min_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        120.0, description="a run lasts at least this long, unless its job says otherwise"
    )
    job_lease_seconds: Annotated[float, Field(ge=0.5, le=3600)] = Field(
        6.0, description="an instance without a heartbeat for this long loses its jobs"
    )
    job_heartbeat_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 1.0
    job_clock_reserve_seconds: Annotated[float, Field(ge=0, le=1200)] = Field(
        2.0, description="how far PostgreSQL's clock may step ahead without two runs overlapping"
    )
    job_warm_up_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        5.0, description="how far apart instances may start and still share jobs evenly"
    )
    job_step_seconds: Annotated[float, Field(ge=0, le=60)] = Field(
        0.25,
        description="how much later an instance claims a job than one that runs one job less",
    )
    jobs_modules: str = Field(
        "balance_app.maintenance", description="Python modules whose jobs run here, comma-separated"
    )
    jobs_entry_points: bool = Field(
        default=True,
        description="run the jobs of installed packages, too (entry points `balance_app.jobs`)",
    )
    job_max_running: Annotated[int, Field(ge=1)] | None = Field(
        None, description="how many runs this instance takes at once at most; by default any number"
    )
    job_connections: Annotated[int, Field(ge=1, le=100)] = Field(
        2, description="connections that the transactions of this instance's jobs may use"
    )

    alert_url: SecretStr | None = Field(
        None, description="where each thing that goes wrong, and recovers, is sent by POST"
    )
    alert_format: Literal["json", "slack"] = Field(
        "json", description="what is sent: an object of its own, or a message for Slack's webhooks"
    )
    ping_url: SecretStr | None = Field(
        None,
        description="called each half minute while nothing is wrong, and URL/fail while something "
        "is: of a service that alerts when no call comes",
    )
    job_ping_urls: SecretStr | None = Field(
        None,
        description="called when a job's run starts (URL/start), succeeds, fails (URL/fail): "
        "JOB=URL pairs, separated by spaces, or a URL with {job} in it, for all",
    )

    balance_app_data: str = Field(
        ".balance-app", description="where `balance-app up` keeps its PostgreSQL and its logs"
    )
    balance_app_url: str | None = Field(
        None, description="the service that the command line calls; default: the one at HOST, PORT"
    )
    balance_app_key: SecretStr | None = Field(
        None, description="the key that the command line sends to the service"
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    log_requests: bool = False

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        if isinstance(value, str) and _INVALID_TEXT.search(value):
            raise ValueError("is not text in UTF-8")
        return value

    @field_validator("log_level", "log_format", "alert_format", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("database_url", "migrate_database_url", "db_direct_url")
    @classmethod
    def _is_postgres_url(cls, url: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if url is None:
            return None
        tls = _tls(info.data)
        parse(url.get_secret_value(), tls)
        # The owner, and a pooler, may have another certificate.
        own = tls_parameters(url.get_secret_value()) if info.field_name == "database_url" else {}
        for name, value in tls.items():
            if own.get(name, value) != value:
                raise ValueError(f"sets {name} otherwise than DB_{name.upper()}: set one of them")
        return url

    @field_validator("db_run_password")
    @classmethod
    def _is_plain(cls, password: SecretStr | None) -> SecretStr | None:
        if password is not None and not re.fullmatch("[ -~]+", password.get_secret_value()):
            raise ValueError("must consist of printable ASCII characters")
        return password

    @field_validator("alert_url", "ping_url")
    @classmethod
    def _is_web_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            webhook_url.check(url.get_secret_value())
        return url

    @field_validator("job_ping_urls")
    @classmethod
    def _are_web_urls(cls, urls: SecretStr | None) -> SecretStr | None:
        if urls is not None:
            webhook_url.job_urls(urls.get_secret_value())
        return urls

    @field_validator("db_host")
    @classmethod
    def _are_hosts(cls, hosts: str | None) -> str | None:
        if hosts is None:
            return None
        names = []
        for each in hosts.split(","):
            address = each.strip().removeprefix("[").removesuffix("]")
            name, colon, port = address.partition(":")
            if colon and name and port.isdecimal():
                example = f"DB_HOST={name} and DB_PORT={port}"
                if "," in hosts:
                    example = "the hosts in DB_HOST, and as many ports in DB_PORT"
                raise ValueError(f"names a port: write {example}")
            if not address and "," in hosts:
                raise ValueError("has an empty host in its list of hosts")
            names.append(host_name(address))
        return ",".join(names)

    @field_validator("db_port", mode="before")
    @classmethod
    def _are_ports(cls, ports: object) -> str:
        found = [each.strip() for each in str(ports).split(",")]
        if not all(
            re.fullmatch("[0-9]{1,5}", each) and 1 <= int(each) <= LAST_PORT for each in found
        ):
            raise ValueError("must be a number from 1 to 65535, or one for each host of DB_HOST")
        return ",".join(found)

    @field_validator("root_path")
    @classmethod
    def _is_prefix(cls, prefix: str) -> str:
        if prefix and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", prefix, re.ASCII):
            raise ValueError("must be a path such as /balances: a slash first, and none at the end")
        if prefix.split("/")[1:2] and prefix.split("/")[1] in OWN_PATHS:
            # A stripped prefix could not be distinguished from one that is kept.
            raise ValueError(f"must not begin with a path of this program's own ({prefix})")
        return prefix

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, proxies: str) -> str:
        networks(proxies)
        return proxies

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.database_url is not None or self.db_host is None:
            return self
        hosts, ports = self.db_host.count(",") + 1, self.db_port.count(",") + 1
        if ports not in {1, hosts}:
            raise ValueError(f"DB_PORT has {ports} ports, and DB_HOST {hosts} hosts")
        try:
            self._target  # noqa: B018 - reads the files of TLS
        except UrlError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _pooler_can_be_passed(self) -> Self:
        if self.pooled and self.db_direct_url is None:
            raise ValueError(
                "DB_POOLER=transaction needs DB_DIRECT_URL, the same database past the pooler: a "
                "heartbeat must not wait in a pooler's queue, and jobs and migrations need sessions"
            )
        if self.pooled and not self.database_is_configured:
            raise ValueError("DB_POOLER=transaction needs DATABASE_URL or DB_HOST, the pooler's")
        if self.pooled and "options" in self._target.server_settings:
            raise ValueError(
                "DB_POOLER=transaction: a pooler passes no `options` on; set them at the role "
                "(ALTER ROLE ... SET), or in DB_DIRECT_URL for what goes past it"
            )
        if not self.pooled and self.db_direct_url is not None:
            raise ValueError("DB_DIRECT_URL is used with DB_POOLER=transaction alone: set both")
        return self

    @model_validator(mode="after")
    def _lock_wait_ends_first(self) -> Self:
        if self.db_lock_seconds >= self.db_statement_seconds:
            raise ValueError(
                f"DB_LOCK_SECONDS ({self.db_lock_seconds:g}) must be below "
                f"DB_STATEMENT_SECONDS ({self.db_statement_seconds:g}), "
                "or a locked row looks like a database that is unavailable"
            )
        return self

    @model_validator(mode="after")
    def _lease_lasts_three_heartbeats(self) -> Self:
        if self.job_heartbeat_seconds * 3 > self.job_lease_seconds:
            raise ValueError(
                f"JOB_HEARTBEAT_SECONDS ({self.job_heartbeat_seconds:g}) must be at most a third "
                f"of JOB_LEASE_SECONDS ({self.job_lease_seconds:g}), "
                "or one lost heartbeat loses the lease"
            )
        third = self.job_lease_seconds / 3
        if "job_clock_reserve_seconds" in self.model_fields_set and (
            self.job_clock_reserve_seconds > third * (1 + 1e-9)
        ):
            raise ValueError(
                f"JOB_CLOCK_RESERVE_SECONDS ({self.job_clock_reserve_seconds:g}) must be at most a "
                f"third of JOB_LEASE_SECONDS ({self.job_lease_seconds:g}), or there is no time "
                "left for heartbeats"
            )
        return self

    @property
    def clock_reserve_seconds(self) -> float:
        """How long before its lease ends a run is no longer trusted to hold it."""
        return min(self.job_clock_reserve_seconds, self.job_lease_seconds / 3)

    @cached_property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can reach the instance, and no proxy for others."""
        if self.proxy_networks:
            return False
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return False
        return all(ipaddress.ip_address(each[4][0]).is_loopback for each in found)

    @cached_property
    def proxy_networks(self) -> tuple[Network, ...]:
        """The proxies that are believed."""
        return networks(self.trusted_proxies)

    @property
    def database_is_configured(self) -> bool:
        """Whether a database was named, by URL or by host."""
        return self.database_url is not None or self.db_host is not None

    def as_owner(self) -> "Settings":
        """Return the settings with which the database's owner connects."""
        if self.migrate_database_url is None:
            return self
        return self.at(self.migrate_database_url)

    def at(self, url: SecretStr) -> "Settings":
        """Return these settings for the database of a URL, without a pooler."""
        place = {"database_url": url, "db_direct_url": None, "db_pooler": "none"}
        settings = self.model_copy(update=place)
        for of_others in ("_target", "_direct"):
            settings.__dict__.pop(of_others, None)
        return settings

    @cached_property
    def secrets(self) -> frozenset[str]:
        """What nobody may read: every secret setting, and the passwords in URLs."""
        fields = (getattr(self, name) for name in type(self).model_fields)
        found = {each.get_secret_value() for each in fields if isinstance(each, SecretStr)}
        for url in (self.database_url, self.migrate_database_url, self.db_direct_url):
            if url is not None:
                found |= passwords(url.get_secret_value())
        for each in self.webhooks:
            found |= webhook_url.secrets(each)
        return frozenset(found - {""})

    @property
    def webhooks(self) -> list[str]:
        """The URLs of alerts and pings."""
        own = [each.get_secret_value() for each in (self.alert_url, self.ping_url) if each]
        if self.job_ping_urls is None:
            return own
        return own + webhook_url.job_urls(self.job_ping_urls.get_secret_value()).all

    @property
    def connections_needed(self) -> int:
        """How many connections to PostgreSQL this instance may have open at once."""
        # One for heartbeats; one to connect with retry, to cancel a statement, or to migrate.
        requests = 0 if self.pooled else self.db_pool_size
        return requests + 1 + (self.job_connections + 1 if self.jobs_enabled else 0)

    @property
    def connections_at_least(self) -> int:
        """The fewest connections it can serve with: one for requests, one for heartbeats."""
        return 2 if self.jobs_enabled else 1

    @property
    def database_address(self) -> str:
        """Where the database is: hosts and ports, for people."""
        address = shown(addresses(self._target.arguments))
        if not self.pooled:
            return address
        return f"{shown(addresses(self._direct.arguments))}, through the pooler at {address}"

    @property
    def pooled(self) -> bool:
        """Whether the statements of requests go through a pooler."""
        return self.db_pooler != "none"

    def statement_arguments(self) -> dict[str, Any]:
        """Return the arguments of connections whose statements are short, to the pooler if any.

        After each lock timeout the request checks whether the row still changes
        (`balances/guard.py`): a row that does not has been locked for DB_LOCK_SECONDS at the second
        one. The server ends a statement before this instance marks the database unavailable, and
        early enough for its commit.
        """
        arguments = self._arguments(self._target)
        seconds = min(
            (self.db_lock_seconds + self.db_statement_seconds) / 2, self.db_statement_seconds * 0.8
        )
        arguments["server_settings"] |= {
            "statement_timeout": f"{round(seconds * 1000)}ms",
            "lock_timeout": f"{round(self.db_lock_seconds * 500)}ms",
            # These transactions are never idle, unless this instance is frozen.
            "idle_in_transaction_session_timeout": "10s",
            # A session keeps the plans of statements, and of the lookups of triggers and foreign
            # keys. Made when a table was small, a plan would read all of it until the next ANALYZE:
            # 1 ms more for every 20 000 entries.
            "enable_seqscan": "off",
        }
        return arguments

    def job_arguments(self) -> dict[str, Any]:
        """Return `connect_arguments` for the transactions of jobs.

        The server ends a transaction whose instance has been frozen for as long as a lease: its
        locks are released when another instance takes the job over.
        """
        arguments = self.connect_arguments()
        milliseconds = f"{round(self.job_lease_seconds * 1000)}ms"
        arguments["server_settings"]["idle_in_transaction_session_timeout"] = milliseconds
        return arguments

    def connect_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `asyncpg.connect` for this database, past a pooler."""
        return self._arguments(self._direct)

    def _arguments(self, target: Target) -> dict[str, Any]:
        common: dict[str, Any] = {
            "timeout": target.connect_seconds or self.db_connect_seconds,
            "server_settings": {
                **PINNED,
                "search_path": SEARCH_PATH.format(schema=self.db_schema),
                "application_name": f"balance_app {self.server_id}"[:63],
                "lock_timeout": f"{round(self.db_lock_seconds * 1000)}ms",
                # Without these PostgreSQL keeps the session of an instance whose network is cut
                # for two hours.
                "tcp_keepalives_idle": "60",
                "tcp_keepalives_interval": "10",
                "tcp_keepalives_count": "3",
            },
        }
        common["server_settings"] |= target.server_settings
        return {**target.arguments, **common}

    @cached_property
    def _direct(self) -> Target:
        if self.db_direct_url is None:
            return self._target
        return parse(self.db_direct_url.get_secret_value(), _tls(dict(self)))

    @cached_property
    def _target(self) -> Target:
        tls = _tls(dict(self))
        if self.database_url is not None:
            return parse(self.database_url.get_secret_value(), tls)
        return from_parts(
            self.db_host,
            self.db_port,
            tls,
            user=self.db_user,
            password=self.db_password.get_secret_value() if self.db_password else None,
            database=self.db_name,
        )


def _tls(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters of TLS that settings have, by libpq's names."""
    names = ("sslmode", "sslrootcert", "sslcert", "sslkey")
    return {name: value for name in names if (value := settings.get(f"db_{name}")) is not None}


class BadSettingsError(Exception):
    """The environment holds values that can't be used; the message names each one."""


def load_settings(**overrides: Any) -> Settings:  # noqa: ANN401 - any field's value
    """Read the environment and `.env`; keyword arguments win.

    Raises:
        BadSettingsError: one sentence per wrong value, never with the value of a secret.
    """
    _require_readable(ENV_FILE)
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        sentences = [
            f"{'_'.join(str(part) for part in problem['loc']).upper() or 'Settings'}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
        raise BadSettingsError("\n".join(sentences)) from None


def _require_readable(file: Path) -> None:
    """Refuse a `.env` that can't be read; it may be missing.

    Raises:
        BadSettingsError: it is not a file, or not text in UTF-8.
    """
    try:
        text = file.read_text("utf-8-sig")
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadSettingsError(f"{file} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadSettingsError(
            f"{file} is not text in UTF-8 (line {line}): save it in UTF-8."
        ) from None
    if "\0" in text:
        raise BadSettingsError(f"{file} is not text in UTF-8 (it has NUL in it): save it in UTF-8.")


def exposed_secrets() -> list[str]:
    """Return a warning if `.env` has secrets in it and other users can read it.

    It is no error: containers mount such files.
    """
    try:
        mode = ENV_FILE.stat().st_mode
    except OSError:
        return []
    if not mode & (stat.S_IRGRP | stat.S_IROTH):
        return []
    secrets = [
        name
        for name, value in dotenv_values(ENV_FILE, encoding="utf-8-sig").items()
        if value and _is_secret(name.upper(), value)
    ]
    if not secrets:
        return []
    return [f"Other users can read {', '.join(secrets)} in {ENV_FILE}: `chmod 600 {ENV_FILE}`."]


def _is_secret(name: str, value: str) -> bool:
    """Return whether a line of `.env` is a secret; a database's URL is one if it has a password."""
    field = Settings.model_fields.get(name.lower())
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    if name.endswith(("DATABASE_URL", "DIRECT_URL")):
        try:
            return bool(passwords(value) - {""})
        except ValueError:
            return True
    return SecretStr in kinds


def is_in_environment(name: str) -> bool:
    """Return whether the environment sets a setting, so that `.env` does not count."""
    return any(each.upper() == name and value for each, value in os.environ.items())


def unknown_names() -> list[str]:
    """Return a warning for each name that is probably meant as a setting, but is none.

    In `.env` that is any name but those of compose; in the environment, which other programs use
    too, a name that resembles a setting.
    """
    ours = sorted(name.upper() for name in Settings.model_fields)
    sentences = []
    for where, names, likeness in (
        (".env", dotenv_values(".env", encoding="utf-8-sig"), 0.6),
        ("the environment", os.environ, 0.85),
    ):
        for name in names:
            if name.upper() in ours or name.startswith(("COMPOSE_", "DOCKER_", "BALANCE_APP_")):
                continue
            near = get_close_matches(name.upper(), ours, 1, likeness)
            if near and ("_" in name or where == ".env"):
                sentences.append(f"{name} in {where} is not a setting: did you mean {near[0]}?")
            elif where == ".env":
                sentences.append(f"{name} in {where} is not a setting of this program.")
    return sentences
