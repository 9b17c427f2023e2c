"""The compose file and `.env.example` match the settings."""

import re
from pathlib import Path

import pytest
import yaml

from balance_app.settings import Settings, load_settings

ROOT = Path(__file__).parents[1]
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DEPENDS_ON_THE_PLACE = {
    "ALERT_URL",
    "JOB_PING_URLS",
    "PING_URL",
    "BALANCE_APP_KEY",
    "BALANCE_APP_URL",
    "DATABASE_URL",
    "DB_DIRECT_URL",
    "DB_HOST",
    "DB_PASSWORD",
    "DB_POOLER",
    "DB_RUN_PASSWORD",
    "DB_SSLCERT",
    "DB_SSLKEY",
    "DB_SSLMODE",
    "DB_SSLROOTCERT",
    "JOB_MAX_RUNNING",
    "MIGRATE_DATABASE_URL",
    "RATE_PER_KEY",
    "SERVER_ID",
    "SHARED_PORT",
}


def variables() -> dict[str, str]:
    return dict(re.findall(r"^#([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))


def test_every_setting_is_in_the_example_and_nothing_else() -> None:
    """A setting that is added, renamed or removed must be so in .env.example too."""
    assert sorted(variables()) == sorted(name.upper() for name in Settings.model_fields)


def test_the_example_shows_the_defaults() -> None:
    """The value in a commented line of .env.example is the setting's default."""
    for name, shown in variables().items():
        if name not in DEPENDS_ON_THE_PLACE:
            default = Settings.model_fields[name.lower()].default
            shown_as_setting = type(default)(shown) if shown != "false" else False
            assert shown_as_setting == default, name


def test_the_example_is_valid_with_all_its_lines_uncommented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program accepts each of them, but for files that would have to exist."""
    for name in variables():
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text(
        re.sub(r"^#(?!DB_SSL.*/)([A-Z_]+=)", r"\1", EXAMPLE, flags=re.MULTILINE), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert settings.db_host == "localhost"
    assert settings.db_password is not None
    assert settings.db_password.get_secret_value() == "PASSWORD"


def test_compose_takes_from_the_example_what_it_says_of_the_database() -> None:
    """What reaches another database must reach neither the migration nor the instances."""
    of_database = re.split(r"^# --- .*$", EXAMPLE, flags=re.MULTILINE)[1]
    names = set(re.findall(r"^#([A-Z_]+)=", of_database, re.MULTILINE))
    said = re.search(r"database it takes (.*?) only", EXAMPLE.replace("\n#", ""))
    assert said is not None
    taken = set(re.findall("[A-Z_]{2,}", said[1]))
    services = yaml.safe_load(COMPOSE)["services"]
    for service in ("migrate", "app1", "app5"):
        given = services[service]["environment"]
        # What it says it takes is passed on from the file, or by the variable of that name.
        assert names - given.keys() <= taken, service
        own = {name for name in names & given.keys() if f"${{{name}" not in str(given[name])}
        assert not own & (taken - {"DB_RUN_PASSWORD"}), service


@pytest.mark.parametrize("file", ["Dockerfile", "docker-compose.yml"])
def test_base_images_are_named_by_digest(file: str) -> None:
    """What a tag means changes; what was tested is what is built and started."""
    text = (ROOT / file).read_text(encoding="utf-8")
    images = re.findall(
        r"^(?:ARG PYTHON_IMAGE=| +image: \$\{POSTGRES_IMAGE:-)(.+?)\}?$", text, re.MULTILINE
    )
    assert [bool(re.fullmatch(r"[a-z]+:[\w.-]+@sha256:[0-9a-f]{64}", each)) for each in images] == [
        True
    ]
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) <= {"$PYTHON_IMAGE"}
    assert set(re.findall(r"^ +image: (\S+)", text, re.MULTILINE)) <= {
        "balance-app",
        f"${{POSTGRES_IMAGE:-{images[0]}}}",
    }


def test_the_image_brings_its_init_and_its_labels() -> None:
    """It starts by itself in any runner, on any platform, and says what it was built from."""
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["tini", "-s", "--"]\nCMD ["balance-app", "serve"]' in image
    assert "init:" not in COMPOSE
    assert set(re.findall(r"org\.opencontainers\.image\.(\w+)=", image)) == {
        *("title", "description", "version", "revision", "source", "licenses")
    }
    assert not re.search("amd64|x86_64|arm64|aarch64|--platform", image)


def test_only_this_machine_reaches_the_instances_without_a_key() -> None:
    """Compose serves without keys, on ports of 127.0.0.1 alone; the image does neither."""
    assert "ALLOW_ANONYMOUS: ${ALLOW_ANONYMOUS:-true}" in COMPOSE
    ports = re.findall(r'"([^"]+:3000)"', COMPOSE)
    assert len(ports) == COMPOSE.count("ports:") == 5
    assert all(port.startswith("127.0.0.1:") for port in ports)
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "HOST=0.0.0.0" in image
    assert "ANONYMOUS" not in image


def test_the_instances_differ_in_name_and_port_only() -> None:
    """All other configuration is the same for all."""
    blocks = re.findall(r"^  app(\d):\n((?:    .*\n)+)", COMPOSE, re.MULTILINE)
    assert [number for number, _ in blocks] == ["1", "2", "3", "4", "5"]
    configured = {
        block.replace("    build: { context: ., args: [PYTHON_IMAGE] }\n", "")
        .replace(f"SERVER_ID: app{number} ", "SERVER_ID: app# ")
        .replace(f":300{number}:", ":300#:")
        for number, block in blocks
    }
    assert len(configured) == 1
