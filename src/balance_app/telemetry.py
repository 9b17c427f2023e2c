"""Whether an instance makes traces, by OpenTelemetry.

It does if the standard OTEL_* variables of the environment name an exporter, and the SDK is
installed (`balance-app[otel]`). It is decided once, at start, by the choice of classes: those of
`traced` make spans, the others know of no traces. While it is off nothing of the SDK is imported
(its API is by FastAPI).
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import structlog

from balance_app.db.pool import Database
from balance_app.http.middleware import RequestMiddleware
from balance_app.jobs.scheduler import Scheduler
from balance_app.masks import mask_of
from balance_app.settings import Settings

log = structlog.get_logger(__name__)


async def _nothing() -> None:
    """Have nothing to send."""


class Parts(NamedTuple):
    """The classes of which an instance consists, and what sends the last spans when it stops."""

    middleware: type[RequestMiddleware] = RequestMiddleware
    database: type[Database] = Database
    scheduler: type[Scheduler] = Scheduler
    stop: Callable[[], Awaitable[None]] = _nothing


def choose(settings: Settings, environment: Mapping[str, str]) -> Parts:
    """Return the classes for an environment; log why there are no traces if it wants some."""
    exporters = wanted(environment)
    if not exporters:
        return Parts()
    try:
        from balance_app import traced  # noqa: PLC0415 - only if it is wanted

        parts = Parts(*traced.begin(settings, exporters))
    except ModuleNotFoundError:
        reason = "The SDK of OpenTelemetry is missing: install balance-app[otel]."
    except Exception as error:  # noqa: BLE001 - no reason not to serve
        reason = mask_of(settings)(f"{type(error).__name__}: {error}")
    else:
        log.info("spans are sent", exporters=exporters)
        return parts
    log.warning("no traces", reason=reason)
    return Parts()


def wanted(environment: Mapping[str, str]) -> list[str]:
    """Return the exporters of traces that are configured, by their names as entry points."""

    def value(name: str) -> str:
        return environment.get(f"OTEL_{name}", "").strip().lower()

    names = [each.strip() for each in value("TRACES_EXPORTER").split(",") if each.strip()]
    if value("SDK_DISABLED") == "true" or "none" in names:
        return []
    if not names and (value("EXPORTER_OTLP_ENDPOINT") or value("EXPORTER_OTLP_TRACES_ENDPOINT")):
        names = ["otlp"]
    protocol = value("EXPORTER_OTLP_TRACES_PROTOCOL") or value("EXPORTER_OTLP_PROTOCOL")
    otlp = {"grpc": "otlp_proto_grpc"}.get(protocol, "otlp_proto_http")
    return [otlp if name == "otlp" else name for name in dict.fromkeys(names)]
