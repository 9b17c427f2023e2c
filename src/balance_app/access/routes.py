"""Which scope a request needs: the one table of it. A route that is not in it is refused."""

import re
from collections.abc import Iterator
from typing import Final, TypeAlias

from balance_app.access.keys import Scope

# A request needs one of these scopes; OPEN: nobody is asked.
Needs: TypeAlias = tuple[Scope, ...]
OPEN: Final[Needs] = ()
READ: Final[Needs] = ("read",)
# Money that leaves an account, or is reserved for that.
WITHDRAW: Final[Needs] = ("change", "withdraw")
CHANGE: Final[Needs] = ("change",)
# What makes money: new accounts have an opening balance, a floor may be below 0.
MAKE: Final[Needs] = ("open",)
OPERATE: Final[Needs] = ("operate",)

# The last part of a template that ends in `:text` or `:path` may have slashes.
NEEDS: Final[dict[tuple[str, str], Needs]] = {
    # open: probes, and what explains the service without its data
    ("GET", "/livez"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("GET", "/health"): OPEN,
    ("GET", "/static/{name}"): OPEN,
    ("GET", "/login"): OPEN,
    ("POST", "/login"): OPEN,
    ("POST", "/logout"): OPEN,
    ("GET", "/problems"): OPEN,
    ("GET", "/problems/{code}"): OPEN,
    ("GET", "/docs"): OPEN,
    ("GET", "/docs/assets/{file:path}"): OPEN,
    ("GET", "/openapi.json"): OPEN,
    # balances
    ("POST", "/api/balance"): WITHDRAW,
    ("POST", "/api/transfers"): CHANGE,
    ("GET", "/api/transfers/{transferId}"): READ,
    ("POST", "/api/users/{userId}/entries/{version}/reverse"): CHANGE,
    # who may send a key may ask for its outcome; for that of others only with `read`
    ("GET", "/api/users/{userId}/changes/{key:text}"): ("read", "change", "withdraw"),
    ("POST", "/api/holds"): WITHDRAW,
    ("GET", "/api/holds/{holdId}"): READ,
    ("POST", "/api/holds/{holdId}/capture"): WITHDRAW,
    ("POST", "/api/holds/{holdId}/void"): WITHDRAW,
    ("GET", "/api/users/{userId}/holds"): READ,
    ("POST", "/api/users"): MAKE,
    ("GET", "/api/users"): READ,
    ("PUT", "/api/users/by-external-id/{externalId:text}"): MAKE,
    ("GET", "/api/users/{userId}"): READ,
    ("PATCH", "/api/users/{userId}"): MAKE,
    ("GET", "/api/users/{userId}/settings"): READ,
    ("GET", "/api/users/{userId}/entries"): READ,
    ("GET", "/api/users/{userId}/daily-balances"): READ,
    # jobs
    ("GET", "/api/cron/status"): READ,
    ("GET", "/api/cron/events"): READ,
    ("GET", "/api/cron/history"): READ,
    ("GET", "/api/cron/runs/{run}/log"): READ,
    ("POST", "/api/cron/jobs/{name}/run"): OPERATE,
    ("POST", "/api/cron/jobs/{name}/pause"): OPERATE,
    ("POST", "/api/cron/jobs/{name}/resume"): OPERATE,
    ("POST", "/api/cron/jobs/{name}/cancel"): OPERATE,
    ("PUT", "/api/cron/jobs/{name}/schedule"): OPERATE,
    ("DELETE", "/api/cron/jobs/{name}/schedule"): OPERATE,
    ("POST", "/api/cron/jobs/{name}/forget"): OPERATE,
    ("POST", "/api/cron/instances/{instance}/dismiss"): OPERATE,
    ("GET", "/api/verdict"): READ,
    ("POST", "/api/verdict/dismiss"): OPERATE,
    ("GET", "/api/actions"): READ,
    ("GET", "/metrics"): ("metrics",),
    # the page
    ("GET", "/"): READ,
    ("GET", "/live"): READ,
    ("GET", "/jobs"): READ,
    ("GET", "/jobs/{name}"): READ,
    ("GET", "/jobs/{name}/cancel"): OPERATE,
    ("GET", "/jobs/{name}/forget"): OPERATE,
    ("GET", "/jobs/{name}/runs/{run}"): READ,
    ("GET", "/runs"): READ,
    ("GET", "/runs/{run}"): READ,
    ("POST", "/jobs/{name}/run"): OPERATE,
    ("POST", "/jobs/{name}/pause"): OPERATE,
    ("POST", "/jobs/{name}/resume"): OPERATE,
    ("POST", "/jobs/{name}/cancel"): OPERATE,
    ("POST", "/jobs/{name}/schedule"): OPERATE,
    ("POST", "/jobs/{name}/schedule/reset"): OPERATE,
    ("POST", "/jobs/{name}/forget"): OPERATE,
    ("POST", "/instances/{instance}/dismiss"): OPERATE,
    ("POST", "/verdict/dismiss"): OPERATE,
    ("GET", "/actions"): READ,
    ("GET", "/users"): READ,
    ("POST", "/users"): MAKE,
    ("GET", "/users/{user_id}"): READ,
    # one form of them for each movement, and for the settings: the form's handler asks further
    ("POST", "/change"): WITHDRAW,
    ("POST", "/users/{user_id}"): ("change", "withdraw", "open"),
}

_EXACT: Final = {route: needs for route, needs in NEEDS.items() if "{" not in route[1]}
_METHODS: Final = frozenset(method for method, _ in NEEDS)
_PARAMETER: Final = re.compile(r"\{\w+(:\w+)?\}")


def _compile(template: str) -> re.Pattern[str]:
    parts = _PARAMETER.split(template)
    # `split` returns the texts, and between them the groups
    kinds = [(".*" if kind else "[^/]+") for kind in parts[1::2]]
    texts = [re.escape(text) for text in parts[::2]]
    return re.compile("".join(a + b for a, b in zip(texts, [*kinds, ""], strict=True)), re.DOTALL)


_PATTERNS: Final = [
    (method, _compile(template), template) for method, template in NEEDS if "{" in template
]


def needs_of(method: str, path: str) -> Needs | None:
    """Return what a request needs; None: there is no such route, or not for this method."""
    if method == "HEAD":
        method = "GET"
    needs = _EXACT.get((method, path))
    if needs is not None:
        return needs
    template = next(_matching(method, path), None)
    return None if template is None else NEEDS[method, template]


def template_of(method: str, path: str) -> str | None:
    """Return the route of a request, such as `/api/users/{userId}`; None: there is none."""
    if method == "HEAD":
        method = "GET"
    if (method, path) in _EXACT:
        return path
    template = next(_matching(method, path), None)
    return None if template is None else template.replace(":text", "").replace(":path", "")


def methods_of(path: str) -> set[str]:
    """Return the methods that the path has, none if there is no such path."""
    found = {method for method in _METHODS if needs_of(method, path) is not None}
    return found | {"HEAD"} if "GET" in found else found


def _matching(method: str, path: str) -> Iterator[str]:
    return (
        template for of, pattern, template in _PATTERNS if of == method and pattern.fullmatch(path)
    )
