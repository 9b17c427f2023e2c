"""The examples for several hosts: valid by their own tools, and in step with the settings."""

import copy
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any, Final

import certifi
import kubernetes_validate
import pytest
import yaml

from balance_app.access.routes import NEEDS, OPEN
from balance_app.settings import Settings, load_settings

ROOT: Final = Path(__file__).parents[1]
DEPLOY: Final = ROOT / "deploy"
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text(encoding="utf-8")
EXAMPLE: Final = (ROOT / ".env.example").read_text(encoding="utf-8")
PRODUCTION: Final = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
UNIT: Final = DEPLOY / "balance-app@.service"
# the oldest that kubernetes.yaml is for, and the newest whose schemas are installed
VERSIONS: Final = ("1.27", kubernetes_validate.latest_version())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


SERVICE: Final = documents("kubernetes.yaml")
(MIGRATION,) = documents("kubernetes-migrate.yaml")
BY_KIND: Final = {each["kind"]: each for each in SERVICE}
POD: Final[dict[str, Any]] = BY_KIND["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
(MIGRATING,) = MIGRATION["spec"]["template"]["spec"]["containers"]


def of_unit(name: str) -> str:
    """Return a directive's last value in the unit."""
    found = re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    return str(found[-1])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", [*SERVICE, MIGRATION], ids=lambda each: each["kind"])
def test_the_published_schemas_accept_it(document: dict[str, Any], version: str) -> None:
    """Each field exists in that version of Kubernetes, and has a value of its type."""
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        (("spec", "replicas"), "five"),
        (("spec", "strategy", "maxUnavailable"), 1),
        (("spec", "template", "spec", "enableServiceLink"), False),
        (("spec", "template", "spec", "terminationGracePeriodSeconds"), "20s"),
    ],
)
def test_a_wrong_field_is_refused(where: tuple[str, ...], wrong: object) -> None:
    """The control: an unknown name, a wrong type."""
    deployment = copy.deepcopy(BY_KIND["Deployment"])
    *path, last = where
    part = deployment
    for each in path:
        part = part[each]
    part[last] = wrong
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_there_is_all_that_several_hosts_need() -> None:
    """Five instances, of which a rollout or a drained node takes one at a time."""
    assert sorted(BY_KIND) == sorted(
        ["ConfigMap", "Secret", "Deployment", "Service", "PodDisruptionBudget"]
    )
    deployment = BY_KIND["Deployment"]["spec"]
    assert deployment["replicas"] == 5
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 1
    assert BY_KIND["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


def test_the_selectors_find_the_instances_and_nothing_else() -> None:
    """A Service that also found the migration's pod would send it requests."""
    labels = POD["metadata"]["labels"]
    specs = {kind: BY_KIND[kind]["spec"] for kind in ("Deployment", "PodDisruptionBudget")}
    assert [each["selector"]["matchLabels"] for each in specs.values()] == [labels] * 2
    assert BY_KIND["Service"]["spec"]["selector"] == labels
    migrating = MIGRATION["spec"]["template"]["metadata"]["labels"].items()
    assert not labels.items() <= migrating
    (spread,) = POD["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels


def test_all_settings_exist_and_differ_from_their_defaults() -> None:
    """What the examples set is in .env.example, is accepted, and says something."""
    values = {**BY_KIND["ConfigMap"]["data"], **BY_KIND["Secret"]["stringData"]}
    own = dict(re.findall(r"([A-Z_]+)=(\S+)", of_unit("Environment")))
    in_pods = [each["name"] for each in CONTAINER["env"]]
    documented = re.findall(r"^(?!OTEL_)([A-Z_]+)=", PRODUCTION, re.MULTILINE)
    known = set(re.findall(r"^#([A-Z_]+)=", EXAMPLE, re.MULTILINE))
    assert {"DB_HOST", "HOST"} <= set(documented)
    assert {*values, *own, *in_pods, *documented} <= known
    (volume,) = CONTAINER["volumeMounts"]
    assert Path(values["DB_SSLROOTCERT"]).parent == Path(volume["mountPath"])
    values["DB_SSLROOTCERT"] = certifi.where()  # it is read
    settings = load_settings(**{name.lower(): value for name, value in values.items()})
    for name in values:
        assert getattr(settings, name.lower()) != Settings.model_fields[name.lower()].default, name
    assert in_pods == ["SERVER_ID"]
    assert CONTAINER["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    host = re.sub("%.", "3001", own["SERVER_ID"])
    assert load_settings(server_id=host, port=int(re.sub("%i", "3001", own["PORT"]))).port == 3001


def test_instances_do_not_have_the_owners_password() -> None:
    """They serve as a role that can't change the schema; the migration has a secret of its own."""
    assert set(BY_KIND["Secret"]["stringData"]) == {"DB_PASSWORD"}
    assert BY_KIND["ConfigMap"]["data"]["DB_USER"] == Settings.model_fields["db_run_role"].default
    secrets = [each["secretRef"]["name"] for each in CONTAINER["envFrom"] if "secretRef" in each]
    assert secrets == [BY_KIND["Secret"]["metadata"]["name"]]
    settings = {"configMapRef": {"name": BY_KIND["ConfigMap"]["metadata"]["name"]}}
    assert MIGRATING["envFrom"] == [settings, {"secretRef": {"name": "balance-app-owner"}}]
    assert "balance-app-owner" not in secrets


def test_the_probes_are_open_routes_at_the_port_of_the_image() -> None:
    """Liveness does not depend on the database: it would restart all instances in an outage."""
    probes = {name: CONTAINER[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {
        "startupProbe": "/livez",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }
    for path in paths.values():
        assert NEEDS["GET", path] is OPEN, "the kubelet has no key"
    (port,) = CONTAINER["ports"]
    assert f"PORT={port['containerPort']}" in DOCKERFILE
    (published,) = BY_KIND["Service"]["spec"]["ports"]
    assert {published["targetPort"], *(each["httpGet"]["port"] for each in probes.values())} == {
        port["name"]
    }


@pytest.mark.parametrize("pod", [POD, MIGRATION["spec"]["template"]], ids=["instance", "migration"])
def test_the_pods_keep_to_the_restricted_profile(pod: dict[str, Any]) -> None:
    """Kubernetes's strictest Pod Security Standard; also a root file system that is read-only."""
    spec = pod["spec"]
    user = int(re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)[-1])
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert [set(volume) for volume in spec["volumes"]] == [{"name", "configMap"}]
    assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_there_is_time_to_stop() -> None:
    """Requests under way end, and jobs are released, before anybody sends SIGKILL."""
    stop = Settings.model_fields["stop_seconds"].default
    drain = {
        "terminationGracePeriodSeconds": int(BY_KIND["ConfigMap"]["data"]["DRAIN_SECONDS"]),
        "TimeoutStopSec": int(re.findall(r"^DRAIN_SECONDS=(\d+)$", PRODUCTION, re.MULTILINE)[0]),
    }
    limits = {
        "terminationGracePeriodSeconds": POD["spec"]["terminationGracePeriodSeconds"],
        "TimeoutStopSec": int(of_unit("TimeoutStopSec")),
    }
    for name, limit in limits.items():
        assert limit >= drain[name] + stop + 5, name
    assert of_unit("KillMode") == "mixed"


def test_all_that_must_be_replaced_is_in_capitals() -> None:
    """What is applied unchanged finds no image and no database; no password is a real one."""
    assert CONTAINER["image"] == MIGRATING["image"] == "REGISTRY/balance-app:VERSION"
    assert BY_KIND["Secret"]["stringData"]["DB_PASSWORD"] == "PASSWORD"  # noqa: S105
    assert BY_KIND["ConfigMap"]["data"]["DB_HOST"].startswith("DATABASE")


ANALYZE: Final = shutil.which("systemd-analyze")
needs_systemd: Final = pytest.mark.skipif(
    ANALYZE is None, reason="systemd-analyze is not installed"
)


def analyzed(tmp_path: Path, unit: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Analyze the unit with a program that exists where these tests run."""
    assert ANALYZE is not None
    path = tmp_path / UNIT.name
    path.write_text(unit.replace(of_unit("ExecStart").split()[0], sys.executable), encoding="utf-8")
    return subprocess.run(
        (ANALYZE, "--no-pager", *command, str(path)),
        capture_output=True,
        check=False,
        text=True,
    )


@needs_systemd
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say. Control: a directive that does not exist."""
    unit = UNIT.read_text(encoding="utf-8")
    good = analyzed(tmp_path, unit, "verify")
    assert (good.returncode, good.stdout + good.stderr) == (0, "")
    bad = analyzed(tmp_path, unit.replace("ProtectSystem=", "ProtectSystems="), "verify")
    assert "ProtectSystems" in bad.stderr


@needs_systemd
def test_the_unit_is_hardened(tmp_path: Path) -> None:
    """Its exposure is at most 1.5 of 10. Control: without the hardening it is more."""
    unit = UNIT.read_text(encoding="utf-8")
    security = ("security", "--offline=true", "--threshold=15")
    assert analyzed(tmp_path, unit, *security).returncode == 0
    plain = "\n".join(chain(unit.split("DynamicUser=yes")[0].splitlines(), ["User=nobody"]))
    assert analyzed(tmp_path, plain, *security).returncode != 0
