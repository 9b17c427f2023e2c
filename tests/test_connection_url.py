"""DATABASE_URL is read as libpq reads it, or refused in a sentence without its content."""

import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from balance_app.connection_url import UrlError, parse
from balance_app.settings import BadSettingsError, load_settings
from tests.processes import DATABASE_VARIABLES

SPECIAL = "#/?%[]@:&=+ "
SECRET = "Geheim"  # noqa: S105 - it is one, for these tests


def arguments(url: str) -> dict[str, Any]:
    return parse(url).arguments


@pytest.mark.parametrize("character", SPECIAL)
def test_a_percent_encoded_password_is_decoded(character: str) -> None:
    """Every character can be used in a password."""
    password = f"{character}a{character}b{character}"
    found = arguments(f"postgresql://u:{quote(password, safe='')}@h/d")
    assert found["password"] == password
    assert (found["user"], found["host"], found["database"]) == ("u", ["h"], "d")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_no_part_of_a_password_is_ever_shown(length: int) -> None:
    """With raw special characters in any order, it is read as intended, or refused unquoted."""
    for characters in permutations(SPECIAL, length):
        password = SECRET + "".join(f"{each}{SECRET}" for each in characters)
        for tail in ("@h:5432/d", "@h", "@h/d?sslmode=disable", "/d", ""):
            found, message = _read(f"postgresql://u:{password}{tail}")
            assert SECRET not in message
            # Without a host the text after an @ can't be distinguished from one.
            if found is not None and tail.startswith("@"):
                assert (found["password"], found["host"]) == (password, ["h"])


def _read(url: str) -> tuple[dict[str, Any] | None, str]:
    try:
        return arguments(url), ""
    except UrlError as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("command", "character"),
    [
        *((command, "/") for command in ("serve", "migrate", "up", "healthcheck")),
        *(("migrate", character) for character in "#?@%["),
    ],
)
def test_no_command_prints_it(command: str, character: str, tmp_path: Path) -> None:
    """No message or traceback contains the password; the exit code is that of invalid settings."""
    url = f"postgresql://u:{SECRET}{character}{SECRET}x{character}@127.0.0.1:1/d"
    environment = {k: v for k, v in os.environ.items() if k not in DATABASE_VARIABLES}
    ran = subprocess.run(
        [sys.executable, "-m", "balance_app", command],
        env={**environment, "DATABASE_URL": url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    output = ran.stdout + ran.stderr
    assert SECRET not in output
    assert "Traceback" not in output
    refused = character in "/@%"
    assert ran.returncode == (2 if refused else 3)
    if refused:
        assert output.startswith("DATABASE_URL: ")
        assert output.count("\n") == 1


ACCEPTED: dict[str, dict[str, Any]] = {
    "postgresql://": {"host": None, "port": 5432, "user": None, "database": None},
    "postgresql:///d": {"host": None, "database": "d"},
    "postgres://h": {"host": ["h"], "port": [5432]},
    "postgresql://u@h": {"user": "u", "password": None},
    "postgresql://u:@h": {"user": "u", "password": ""},
    "postgresql://a,b:6/d": {"host": ["a", "b"], "port": [5432, 6]},
    "postgresql://[::1]:6/d": {"host": ["::1"], "port": [6]},
    "postgresql://%2Frun%2Fpg/d": {"host": ["/run/pg"]},
    "postgresql:///d?host=/run/pg&port=6": {"host": ["/run/pg"], "port": [6]},
    "postgresql://h/?dbname=d&user=u&password=p%26": {
        "database": "d",
        "user": "u",
        "password": "p&",
    },
    "postgresql://h/d?channel_binding=prefer&gssencmode=disable&client_encoding=UTF8": {
        "host": ["h"]
    },
    "postgresql://h/d?target_session_attrs=read-write": {"target_session_attrs": "read-write"},
    "postgresql://h/d?sslmode=require&ssl_min_protocol_version=TLSv1.3": {
        "dsn": "postgresql://?sslmode=require&ssl_min_protocol_version=TLSv1.3"
    },
}


@pytest.mark.parametrize("url", ACCEPTED)
def test_urls_that_libpq_accepts_are_read(url: str) -> None:
    """With the same meaning as in libpq."""
    found = arguments(url)
    assert {key: found[key] for key in ACCEPTED[url]} == ACCEPTED[url]


def test_parameters_of_a_url_are_used() -> None:
    """The connect timeout, and the settings for the server."""
    target = parse(
        "postgresql://h/d?connect_timeout=10&application_name=me&options=-c%20geqo%3Doff"
    )
    assert target.connect_seconds == 10
    assert target.server_settings == {"application_name": "me", "options": "-c geqo=off"}


REFUSED = {
    "postgresql://h:http/d": "port",
    "postgresql://h:0/d": "port",
    "postgresql://h:70000/d": "port",
    "postgresql://a,,b/d": "empty host",
    "postgresql://a..b/d": "host name",
    "postgresql://::1/d": "port",
    "postgresql://[::1/d": "IPv6",
    "postgresql://u:%zz@h/d": "%25",
    "postgresql://u:%ff@h/d": "UTF-8",
    "postgresql://u:%00@h/d": "%00",
    "postgresql://h/d?channel_binding=require": "channel_binding",
    "postgresql://h/d?gssencmode=require": "gssencmode",
    "postgresql://h/d?sslmode=yes": "sslmode.*verify-full",
    "postgresql://h/d?sslmode=verify-full": "sslrootcert",
    "postgresql://h/d?sslrootcert=/no/such": "sslrootcert",
    "postgresql://h/d?sslrootcert=system": "sslrootcert",
    "postgresql://h/d?target_session_attrs=standby": "target_session_attrs",
    "postgresql://h/d?client_encoding=LATIN1": "client_encoding",
    "postgresql://h/d?connect_timeout=soon": "connect_timeout",
    "postgresql://h/d?options=-c%20search_path%3Dx": "search_path",
    "postgresql://h/d?hostaddr=1.2.3.4": "hostaddr",
    "postgresql://h/d?keepalives_idle=5": "keepalives_idle",
    "postgresql://h/d?service=x": "service",
    "postgresql://h/d?statement_timeout=5": "statement_timeout.*DB_STATEMENT_SECONDS",
    "postgresql://u:p@h/d?chanel_binding=require": "chanel_binding.*channel_binding",
    "postgresql://u:p@h/d?sslmode=require&nonsense=1": "number 2",
    "postgresql://h/d?novalue": "name=value",
    "mysql://h/d": "postgresql://",
}


@pytest.mark.parametrize("url", REFUSED)
def test_an_unsupported_url_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path
) -> None:
    """At once, in one sentence that begins with the setting's name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(BadSettingsError, match=f"^DATABASE_URL: .*{REFUSED[url]}") as refusal:
        load_settings()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("db:5433", "DB_PORT=5433"),
        ("a:5433,b:5434", "as many ports in DB_PORT"),
        ("a,,b", "empty host"),
        ("a,", "empty host"),
        ("a b", "host"),
        ("a..b", "host"),
    ],
)
def test_an_invalid_host_is_refused(
    monkeypatch: pytest.MonkeyPatch, host: str, message: str
) -> None:
    """DB_HOST contains hosts and nothing else."""
    monkeypatch.setenv("DB_HOST", host)
    with pytest.raises(BadSettingsError, match=f"^DB_HOST: .*{message}"):
        load_settings()


@pytest.mark.parametrize("port", ["5432,5433", "0,1,2", "1,,2", "5432;5433;5434", "70000"])
def test_invalid_ports_are_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    """One port, or one for each host."""
    monkeypatch.setenv("DB_HOST", "a,b,c")
    monkeypatch.setenv("DB_PORT", port)
    with pytest.raises(BadSettingsError, match="DB_PORT"):
        load_settings()


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("a", "6", "a port 6"),
        ("a, b", "6", "a port 6, b port 6"),
        ("a,b", "6, 7", "a port 6, b port 7"),
        ("[::1],::2,/run/pg", "5432", "::1 port 5432, ::2 port 5432, /run/pg port 5432"),
    ],
)
def test_several_hosts_are_read(
    monkeypatch: pytest.MonkeyPatch, host: str, port: str, address: str
) -> None:
    """With one port for all, or one for each."""
    monkeypatch.setenv("DB_HOST", host)
    monkeypatch.setenv("DB_PORT", port)
    assert load_settings().database_address == address


def test_hosts_of_the_environment_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a URL has none, those of libpq's PGHOST; a single one is left to the driver."""
    monkeypatch.setenv("PGHOST", "a,b")
    assert arguments("postgresql:///d")["host"] == ["a", "b"]
    monkeypatch.setenv("PGHOST", "a")
    assert arguments("postgresql:///d")["host"] is None


URL = "postgresql://h/d"
TLS_REFUSED: list[tuple[dict[str, str], str]] = [
    ({"DB_HOST": "h", "DB_SSLMODE": "yes"}, "^DB_SSLMODE: "),
    (
        {"DB_HOST": "h", "DB_SSLMODE": "verify-full"},
        "DB_SSLMODE=verify-full needs .*DB_SSLROOTCERT",
    ),
    ({"DB_HOST": "h", "DB_SSLMODE": "require", "DB_SSLROOTCERT": "/no"}, "DB_SSLROOTCERT .*read"),
    ({"DB_HOST": "h", "DB_SSLMODE": "require", "DB_SSLCERT": "/no"}, "DB_SSLCERT .*read"),
    ({"DB_HOST": "h", "DB_SSLROOTCERT": __file__}, "DB_SSLROOTCERT.*prefer"),
    (
        {"DB_HOST": "h", "DB_SSLMODE": "require", "DB_SSLROOTCERT": __file__},
        "without a certificate",
    ),
    ({"DB_HOST": "h", "DB_SSLMODE": "require", "DB_SSLCERT": __file__}, "DB_SSLCERT.*DB_SSLKEY"),
    ({"DB_HOST": "h", "DB_SSLKEY": __file__}, "DB_SSLKEY.*no certificate"),
    ({"DATABASE_URL": URL, "DB_SSLMODE": "verify-full"}, "^DATABASE_URL: .*root certificate"),
    ({"DATABASE_URL": URL, "DB_SSLKEY": __file__}, "^DATABASE_URL: .*DB_SSLKEY"),
    (
        {"DATABASE_URL": f"{URL}?sslmode=disable", "DB_SSLMODE": "require"},
        "^DATABASE_URL: .*sslmode.*DB_SSLMODE",
    ),
]


@pytest.mark.parametrize(("environment", "message"), TLS_REFUSED)
def test_settings_of_tls_that_can_not_be_used_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    """At once: a wrong file, one without effect, and one that contradicts the URL."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadSettingsError, match=message) as refusal:
        load_settings()
    assert "\n" not in str(refusal.value)


DIRECT = "postgresql://other:geheim@db/d"
POOLER_REFUSED: list[tuple[dict[str, str], str]] = [
    ({"DB_HOST": "h", "DB_POOLER": "session"}, "^DB_POOLER: "),
    ({"DB_HOST": "h", "DB_POOLER": "transaction"}, "needs DB_DIRECT_URL"),
    ({"DB_POOLER": "transaction", "DB_DIRECT_URL": DIRECT}, "needs DATABASE_URL or DB_HOST"),
    ({"DB_HOST": "h", "DB_DIRECT_URL": DIRECT}, "with DB_POOLER=transaction"),
    (
        {
            "DATABASE_URL": "postgresql://me:geheim@h/d?options=-c%20work_mem%3D8MB",
            "DB_POOLER": "transaction",
            "DB_DIRECT_URL": DIRECT,
        },
        "passes no `options` on",
    ),
    (
        {"DB_HOST": "h", "DB_POOLER": "transaction", "DB_DIRECT_URL": "db:geheim"},
        "^DB_DIRECT_URL: must start with",
    ),
]


@pytest.mark.parametrize(("environment", "message"), POOLER_REFUSED)
def test_settings_of_a_pooler_that_can_not_be_used_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    """One without the other, and one that has no effect; the password is not shown."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadSettingsError, match=message) as refusal:
        load_settings()
    assert "geheim" not in str(refusal.value)


def test_only_statements_of_requests_go_to_the_pooler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner, heartbeats, jobs and migrations go past it; its password is a secret."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://u@pooler:6432/d")
    monkeypatch.setenv("DB_POOLER", "transaction")
    monkeypatch.setenv("DB_DIRECT_URL", DIRECT)
    settings = load_settings()
    assert settings.statement_arguments()["host"] == ["pooler"]
    assert settings.connect_arguments()["host"] == settings.job_arguments()["host"] == ["db"]
    assert settings.database_address == "db port 5432, through the pooler at pooler port 6432"
    assert "geheim" in settings.secrets
    monkeypatch.setenv("MIGRATE_DATABASE_URL", "postgresql://owner@direct/d")
    owner = load_settings().as_owner()
    assert owner.connect_arguments()["host"] == owner.statement_arguments()["host"] == ["direct"]


def test_settings_of_tls_fill_what_a_url_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL's own parameters win; the owner's may differ."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/d?ssl_min_protocol_version=TLSv1.3")
    monkeypatch.setenv("MIGRATE_DATABASE_URL", "postgresql://h/d?sslmode=disable")
    monkeypatch.setenv("DB_SSLMODE", "require")
    settings = load_settings()
    dsn = "postgresql://?sslmode=require&ssl_min_protocol_version=TLSv1.3"
    assert settings.connect_arguments()["dsn"] == dsn
    assert settings.as_owner().connect_arguments()["dsn"] == "postgresql://?sslmode=disable"


def test_a_user_without_a_home_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers and systemd have users that no file names: nothing of theirs is there."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert load_settings(db_host="h").database_address == "h port 5432"
    with pytest.raises(BadSettingsError, match="root certificate"):
        load_settings(db_host="h", db_sslmode="verify-full")
