"""The project's own rules for its source, and what is listed as installed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TRAPS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "rules/traps").iterdir()}
CASES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "rules/cases").iterdir()}
PLANTED_AT = {
    "python": "src/balance_app/access/planted_{}_{}.py",
    "html": "src/balance_app/web/templates/planted_{}_{}.html",
}


def test_each_rule_has_a_reason_and_cases_for_and_against() -> None:
    """What a rule finds is written beside it, and what looks alike and is right."""
    assert sorted(TRAPS) == sorted(CASES)
    for name, rule in TRAPS.items():
        assert (rule["id"], rule["severity"]) == (name, "error")
        assert rule["note"], name
        assert CASES[name]["id"] == name
        assert CASES[name]["valid"], name
        assert CASES[name]["invalid"], name


def _scan(root: Path) -> list[dict[str, Any]]:
    found = subprocess.run(
        [BIN / "ast-grep", "scan", "--json"], cwd=root, capture_output=True, check=False
    )
    return list(json.loads(found.stdout))


def test_each_trap_is_found_where_the_source_is(tmp_path: Path) -> None:
    """A rule that is right but looks at other files finds nothing."""
    shutil.copy(ROOT / "sgconfig.yml", tmp_path)
    shutil.copytree(ROOT / "rules", tmp_path / "rules")
    planted = set()
    for name, cases in CASES.items():
        template = PLANTED_AT[TRAPS[name]["language"]]
        for number, text in enumerate(cases["invalid"]):
            file = tmp_path / template.format(name, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            planted.add((name, file.relative_to(tmp_path).as_posix()))
    assert planted <= {(each["ruleId"], each["file"]) for each in _scan(tmp_path)}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_rule_that_finds_nothing_is_noticed(name: str, tmp_path: Path) -> None:
    """Control: with another rule in its place, `ast-grep test` fails."""
    shutil.copy(ROOT / "sgconfig.yml", tmp_path)
    shutil.copytree(ROOT / "rules", tmp_path / "rules")
    rule = tmp_path / f"rules/traps/{name}.yml"
    never = {**TRAPS[name], "rule": {"kind": "comment", "regex": "^never$"}, "utils": None}
    rule.write_text(yaml.safe_dump({key: value for key, value in never.items() if value}))
    tested = subprocess.run(
        [BIN / "ast-grep", "test", "--skip-snapshot-tests"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert tested.returncode != 0
    assert f"FAIL {name}" in tested.stdout.decode()


def test_the_list_of_what_is_installed_is_that_of_the_lock(tmp_path: Path) -> None:
    """`make sbom` names each package of the image, and nothing of this machine."""
    file = tmp_path / "sbom.json"
    recipe = re.search(r"^sbom:.*\n(?:\t.*\n)*", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    command = re.search(r"BIN\)/python (.+) --output-file", recipe[0].replace("\\\n\t\t", ""))
    assert command is not None
    arguments = [*command[1].split(), "--output-file", file, "requirements.lock"]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    text = file.read_text()
    listed = {(each["name"], each["version"]) for each in json.loads(text)["components"]}
    lock = (ROOT / "requirements.lock").read_text()
    assert listed == set(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    assert str(ROOT) not in text
    assert "timestamp" not in json.loads(text)["metadata"]
