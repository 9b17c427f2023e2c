"""Rendering of pages: templates, static files, headers, compression.

Files are read and compressed once, and served from memory: Starlette's StaticFiles opens a file for
each request, and answers 500 when clients hold all the file descriptors that they may have.
"""

import re
import zlib
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from mimetypes import guess_type
from pathlib import Path
from typing import Final, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from balance_app import states
from balance_app.formatting import ago, duration
from balance_app.http.problem_pages import marked
from balance_app.web import view_models

# Scripts and styles come from the service's own files alone, and no other site may frame a page.
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "Vary": "Accept-Encoding",
}
_OWN_URL: Final = re.compile(r'(?<= )(?:href|src|action|formaction|data-stream)="(?=/)')
_FILES: Final = Path(__file__).parent / "static"
_TEMPLATES: Final = Path(__file__).parent / "templates"


class Asset(NamedTuple):
    """A static file: its content, the same compressed, and its hash, which its URL has."""

    body: bytes
    compressed: bytes
    digest: str
    media_type: str | None


@lru_cache(maxsize=1)
def templates() -> Environment:
    """Return the templates; they escape every value that they get."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "duration": duration,
        "exact": view_models.exact,
        "clock_time": view_models.clock_time,
        "iso": view_models.iso,
        "number": view_models.number,
        "marked": marked,
        "stamp": lambda moment: view_models.tenth(view_models.seconds_of(moment)),
    }
    environment.globals |= {
        "asset": _asset_url,
        "State": states.State,
        "Outcome": states.Outcome,
        "job_sign": states.job_sign,
        "outcome_sign": states.outcome_sign,
        "outcome_predicate": states.outcome_predicate,
        "ago": ago,
        "due": view_models.due,
        "why": view_models.why,
        "share": view_models.share,
        "progress_of": view_models.progress_of,
        "is_now": view_models.is_now,
    }
    return environment


def page(
    request: Request,
    template: str,
    view: Mapping[str, object],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a page, compressed if the client accepts that."""
    html = add_root_path(
        request.scope["root_path"], templates().get_template(template).render(view)
    ).encode()
    compressed = accepts_gzip(request)
    return Response(
        gzip(html) if compressed else html,
        status_code=status,
        media_type="text/html",
        headers={
            **HEADERS,
            **({"Content-Encoding": "gzip"} if compressed else {}),
            **(headers or {}),
        },
    )


def add_root_path(root_path: str, html: str) -> str:
    """Put ROOT_PATH before every URL of this service in a page.

    Only templates write such attributes, as they escape every value that they get.
    """
    return _OWN_URL.sub(rf"\g<0>{root_path}", html) if root_path else html


def file(request: Request, name: str) -> Response | None:
    """Return a static file; None if there is none with this name."""
    found = _asset(name) if name in _names() else None
    if found is None:
        return None
    compressed = accepts_gzip(request)
    # ast-grep-ignore: digest-compared - of a file that everybody gets
    current = request.query_params.get("v") == found.digest
    return Response(
        found.compressed if compressed else found.body,
        media_type=found.media_type,
        headers={
            "Cache-Control": "public, max-age=31536000, immutable" if current else "no-cache",
            "Vary": "Accept-Encoding",
            **({"Content-Encoding": "gzip"} if compressed else {}),
        },
    )


def accepts_gzip(request: Request) -> bool:
    """Say whether the client accepts gzip."""
    return "gzip" in request.headers.get("accept-encoding", "")


def gzip(body: bytes) -> bytes:
    """Compress a whole body."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    return compressor.compress(body) + compressor.flush()


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    return frozenset(path.name for path in _FILES.iterdir() if path.is_file())


@lru_cache
def _asset(name: str) -> Asset:
    body = (_FILES / name).read_bytes()
    return Asset(body, gzip(body), sha256(body).hexdigest()[:12], guess_type(name)[0])


def _asset_url(name: str) -> str:
    """Return the URL of a file; it changes with the file's content."""
    return f"/static/{name}?v={_asset(name).digest}"
