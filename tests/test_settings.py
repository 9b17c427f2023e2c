"""The environment is validated at start, and invalid values are named."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from balance_app.db import migrations
from balance_app.masks import mask_of
from balance_app.settings import BadSettingsError, load_settings
from balance_app.webhook_url import job_urls


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "0"),
        ("PORT", "http"),
        ("DB_POOL_SIZE", "0"),
        ("DB_STATEMENT_SECONDS", "-1"),
        ("DB_CONNECT_SECONDS", "nan"),
        ("SERVER_ID", "two words"),
        ("LOG_LEVEL", "loud"),
        ("DATABASE_URL", "mysql://somewhere/db"),
        ("DATABASE_URL", "postgresql://[half/db"),
    ],
)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """The message starts with the variable's name."""
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettingsError, match=f"^{name}: "):
        load_settings()


def test_a_lock_wait_must_end_before_the_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings that contradict each other are named together, with their values."""
    monkeypatch.setenv("DB_LOCK_SECONDS", "9")
    with pytest.raises(BadSettingsError, match=r"DB_LOCK_SECONDS \(9\).*DB_STATEMENT_SECONDS"):
        load_settings()


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a good nor a bad setting prints a password."""
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter2@db/x")
    assert "hunter2" not in repr(load_settings())
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter2@[db/x")
    with pytest.raises(BadSettingsError) as error:
        load_settings()
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
def test_the_usual_urls_are_understood(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """The URL schemes of other tools are accepted for the same database."""
    monkeypatch.setenv("DATABASE_URL", f"{scheme}://me:pw@db:5433/x")
    arguments = load_settings().connect_arguments()
    assert (arguments["user"], arguments["password"]) == ("me", "pw")
    assert (arguments["host"], arguments["port"], arguments["database"]) == (["db"], [5433], "x")


def test_the_reserve_leaves_time_for_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is at most a third of the lease; a larger value is refused."""
    assert load_settings().clock_reserve_seconds == 2
    monkeypatch.setenv("JOB_LEASE_SECONDS", "3")
    assert load_settings().clock_reserve_seconds == 1
    monkeypatch.setenv("JOB_CLOCK_RESERVE_SECONDS", "1.1")
    with pytest.raises(BadSettingsError, match=r"JOB_CLOCK_RESERVE_SECONDS \(1.1\).*a third"):
        load_settings()


TEXT = "# für alle\nSERVER_ID=from-file\nPORT=4321\n"


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_env_file_in_utf_8_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, coding: str, end: str
) -> None:
    """Also with a byte order mark, and with any line ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PORT", raising=False)
    for first in (TEXT, TEXT.partition("\n")[2]):
        Path(".env").write_bytes(first.replace("\n", end).encode(coding))
        assert (load_settings().server_id, load_settings().port) == ("from-file", 4321)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda file: file.write_bytes(TEXT.encode("utf-16")), r"UTF-8 \(line 1\)"),
        (lambda file: file.write_bytes(TEXT.replace("ü", "u").encode("utf-16-le")), "has NUL"),
        (lambda file: file.write_bytes(TEXT.encode("utf-16-be")), "UTF-8"),
        (lambda file: file.write_bytes(TEXT.encode("utf-32")), "UTF-8"),
        (lambda file: file.write_bytes(b"PORT=1\n" + TEXT.encode("latin-1")), r"\(line 2\)"),
        (lambda file: file.write_bytes(b"DB_PASSWORD=a\0b\n"), "has NUL"),
        (lambda file: file.mkdir(), "can't be read: Is a directory"),
        (lambda file: file.symlink_to(file), "can't be read: Too many levels"),
    ],
)
def test_an_env_file_that_can_not_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: Callable[[Path], object],
    sentence: str,
) -> None:
    """In one sentence, without its content."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / ".env")
    with pytest.raises(BadSettingsError, match=rf"^\.env .*{sentence}[^\n]*\.$"):
        load_settings()


@pytest.mark.parametrize("name", ["DB_NAME", "DB_PASSWORD", "SERVER_ID", "DB_USER"])
def test_a_value_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A value in the environment that is not valid UTF-8 is refused."""
    monkeypatch.setitem(os.environ, name, "hunter2\udcff")
    with pytest.raises(BadSettingsError, match=f"^{name}: is not text in UTF-8$"):
        load_settings()


def test_a_directory_may_have_any_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one with characters that are special in configuration files."""
    source = tmp_path / "100% sure, %(here)s" / "src" / "balance_app"
    source.mkdir(parents=True)
    (source.parents[1] / "alembic").symlink_to(Path(__file__).parents[1] / "alembic")
    monkeypatch.setattr(migrations, "__file__", str(source / "db" / "migrations.py"))
    scripts = ScriptDirectory.from_config(migrations.alembic_config())
    assert [script.revision for script in scripts.walk_revisions()][-1] == "0001"


URL = "https://me:pass%40word@hooks.example.com/services/T0PSECRETOFAPATH?key=QUERYSECRET"


@pytest.mark.parametrize("name", ["ALERT_URL", "PING_URL", "JOB_PING_URLS"])
def test_the_url_of_a_receiver_is_a_secret(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """All of it but the host, wherever a part of it turns up; so it is in no message."""
    monkeypatch.setenv(name, f"moon={URL}" if name == "JOB_PING_URLS" else URL)
    settings = load_settings()
    assert "T0PSECRET" not in repr(settings)
    mask = mask_of(settings)
    for text in (URL, "/services/T0PSECRETOFAPATH", "T0PSECRETOFAPATH", "key=QUERYSECRET"):
        assert mask(f"POST {text} failed").replace("*", "") in {"POST  failed", "POST / failed"}
    for text in ("hooks.example.com can't be reached", "all services"):
        assert mask(text) == text


@pytest.mark.parametrize(
    "value",
    [
        *("hooks.example.com/T0PSECRET", "ftp://a.example/T0PSECRET", "https:///T0PSECRET"),
        *(
            "https://a.example/T0PSECRET x",
            "https://a.example:port/T0PSECRET",
            "https://[a/T0PSECRET",
        ),
        *(
            "https://a..example/T0PSECRET",
            "https://xn--/T0PSECRET",
            "https://256.1.1.1/T0PSECRET",
            f"https://{'a' * 64}.example/T0PSECRET",
        ),
        *("https://a.example/T0PSECRET#x", f"https://a.example/T0PSECRET{'x' * 2000}"),
    ],
)
@pytest.mark.parametrize("name", ["ALERT_URL", "PING_URL", "JOB_PING_URLS"])
def test_what_is_no_url_of_a_receiver_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """In a sentence that shows nothing of it."""
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettingsError, match=f"^{name}: ") as error:
        load_settings()
    assert "SECRET" not in str(error.value)


def test_the_urls_of_jobs() -> None:
    """Their own, or one for all."""
    urls = job_urls("a=https://x.example/1?b=c https://y.example/{job}/ping")
    assert (urls.of("a"), urls.of("b")) == ("https://x.example/1?b=c", "https://y.example/b/ping")
    assert job_urls("a=https://x.example").of("b") is None
    for wrong in ("https://a.example/ping", "https://a.example/{job} https://b.example/{job}"):
        with pytest.raises(ValueError, match="JOB=URL pairs"):
            job_urls(wrong)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a=https://x.example/S3CRET b=https://y.example a=https://z.example", "one URL for each"),
        ("a=https://x.example/S3CRET,b=https://y.example", "a space, and no comma"),
        ("https://x.example/S3CRET/{job},https://y.example", "a space, and no comma"),
    ],
)
def test_urls_of_jobs_that_nobody_means_are_refused(value: str, message: str) -> None:
    """Two of one job, of which one would be ignored, and two that were read as one."""
    with pytest.raises(ValueError, match=message) as error:
        job_urls(value)
    assert "S3CRET" not in str(error.value)


def test_what_is_around_the_name_of_a_job_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same for all jobs, and lets everybody report them."""
    url = "https://hc-ping.example/PROJ3CTKEY/{job}/run?of={job}&key=S3CRET%21"
    monkeypatch.setenv("JOB_PING_URLS", url)
    mask = mask_of(load_settings())
    for name in ("moon", "sun"):
        masked = mask(f"GET {url.replace('{job}', name)} failed")
        assert "PROJ3CTKEY" not in masked
        assert "S3CRET" not in masked
        assert f"/{name}/run?of={name}" in masked
    assert "S3CRET" not in mask("&key=S3CRET! is wrong")
    assert mask("hc-ping.example can't be reached") == "hc-ping.example can't be reached"
