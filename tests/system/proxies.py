"""nginx and HAProxy with the examples of `deploy/`, as they are but for their addresses."""

import asyncio
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tests.processes import free_port

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
KINDS: Final = ("nginx", "haproxy")
PREFIX: Final = "/balances"
DRAIN_SECONDS: Final = "3"  # as the examples say
# The settings that the examples need, and that of instances that ask nobody for a key.
SETTINGS: Final = {
    "ROOT_PATH": PREFIX,
    "TRUSTED_PROXIES": "127.0.0.1",
    "DRAIN_SECONDS": DRAIN_SECONDS,
    "ALLOW_ANONYMOUS": "true",
}

CHECK_SECONDS: Final = 0.8  # until HAProxy has asked each instance once

# What a distribution has in its own nginx.conf, for an unprivileged user.
_AROUND = """
daemon off;
pid {home}/pid;
error_log {home}/log notice;
worker_processes 2;
events {{ worker_connections 1000; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    include {home}/balance-app.conf;
}}
"""


def program(kind: str) -> str | None:
    """Return the path of nginx or HAProxy; None: it is not installed."""
    return shutil.which(kind, path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")


def example(kind: str, port: int, ports: Sequence[int]) -> str:
    """Return an example with other addresses: where it listens, and the five instances."""
    text = (DEPLOY / {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}[kind]).read_text()
    listens = {"nginx": "    listen 80;", "haproxy": "    bind :80\n"}[kind]
    assert text.count(listens) == 1
    text = text.replace(listens, listens.replace(":80", "80").replace("80", f"127.0.0.1:{port}"))
    for number, instance in enumerate(ports, start=1):
        text, found = re.subn(rf"127\.0\.0\.1:300{number}\b", f"127.0.0.1:{instance}", text)
        assert found
    assert not re.search(r"127\.0\.0\.1:300\d", text), "there are more instances than ports"
    return text


def _under_tls(kind: str, text: str, port: int, home: Path) -> str:
    """Return an example whose lines about TLS are no comments any more, with a new certificate."""
    pair, certificate, key = home / "both.pem", home / "certificate.pem", home / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    pair.write_text(certificate.read_text() + key.read_text())
    text, plain = re.subn(rf"    (listen|bind) 127\.0\.0\.1:{port};?\n", "", text)
    text, lines = re.subn(
        r"    # ((?:listen|ssl_|add_header|bind :443|http-response set-header) .*\n|ssl_.*\n)",
        r"    \1",
        text,
    )
    assert (plain, lines) == (1, {"nginx": 6, "haproxy": 2}[kind])
    for old, new in (
        ("    listen [::]:443 ssl http2;\n", ""),
        ("listen 443 ", f"listen 127.0.0.1:{port} "),
        ("bind :443 ", f"bind 127.0.0.1:{port} "),
        ("/etc/nginx/tls/bank.example.pem", str(certificate)),
        ("/etc/nginx/tls/bank.example.key", str(key)),
        ("/etc/haproxy/tls/bank.example.pem", str(pair)),
    ):
        text = text.replace(old, new)
    return text


class Proxy:
    """A running proxy."""

    def __init__(self, scheme: str, port: int, log: Path) -> None:
        self.origin = f"{scheme}://127.0.0.1:{port}"
        self.url = self.origin + PREFIX
        self.log = log


@asynccontextmanager
async def running(
    kind: str, ports: Sequence[int], changed: tuple[str, str] = ("", ""), *, tls: bool = False
) -> AsyncIterator[Proxy]:
    """Run a proxy in front of instances at five ports.

    For controls, `changed` is a text of the example, and its replacement.
    """
    path, port = program(kind), free_port()
    assert path is not None
    with tempfile.TemporaryDirectory(prefix="balance-app-test-", ignore_cleanup_errors=True) as top:
        home = Path(top)
        text = example(kind, port, ports)
        assert changed[0] in text
        text = text.replace(*changed) if changed[0] else text
        text = _under_tls(kind, text, port, home) if tls else text
        log = home / "log"
        log.touch()
        if kind == "nginx":
            (home / "balance-app.conf").write_text(text)
            (home / "nginx.conf").write_text(_AROUND.format(home=home))
            arguments = ["-e", str(log), "-p", top, "-c", str(home / "nginx.conf")]
        else:
            (home / "haproxy.cfg").write_text(text)
            arguments = ["-db", "-f", str(home / "haproxy.cfg")]
        # As root, both run as another user: nothing in the examples needs rights.
        user = "nobody" if Path("/").owner() == home.owner() else None
        if user is not None:
            for each in (home, *home.iterdir()):
                shutil.chown(each, user)
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                path,
                *arguments,
                user=user,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            await _listens(port, process, log)
            await asyncio.sleep(CHECK_SECONDS)
            yield Proxy("https" if tls else "http", port, log)
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _listens(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(20):
        while True:
            assert process.returncode is None, log.read_text()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
