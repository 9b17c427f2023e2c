"""The problems of requests that their sender may not make."""

import math
from collections.abc import Iterable
from typing import ClassVar

from balance_app.errors import Problem


class Unauthorized(Problem):
    """The request has no valid key.

    Nothing was changed. Send `Authorization: Bearer ba_...` with a key that `balance-app keys
    create` has made, and that is neither expired nor revoked.
    """

    status, code, title = 401, "unauthorized", "Unauthorized"

    def __init__(self, detail: str = "This service needs a key.") -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class InsufficientScope(Problem):
    """The key is valid, but not for this.

    Nothing was changed. `needs` names the scopes, of which the key needs one.
    """

    status, code, title = 403, "insufficient-scope", "Insufficient scope"
    sample: ClassVar = {"scopes": ["change"]}

    def __init__(self, scopes: Iterable[str]) -> None:
        needs = sorted(scopes)
        super().__init__(
            f"The key has not the scope {' or '.join(needs)}, which this needs.", needs=needs
        )


class CrossSiteRequest(Problem):
    """A page of another site sent the request.

    Nothing was changed. Only pages of this service may send requests that change something from a
    browser.
    """

    status, code, title = 403, "cross-site-request", "Cross-site request"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("The request comes from a page of another site.")


class MisdirectedRequest(Problem):
    """The Host header names no host of this service.

    Nothing was changed. Without keys only names of this machine are accepted, as any page could
    otherwise reach the service through a name of its own (DNS rebinding). `ALLOWED_HOSTS` lists
    further names; with keys every name is accepted.
    """

    status, code, title = 421, "misdirected-request", "Misdirected request"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("The Host header names no host of this service (see ALLOWED_HOSTS).")


class TooManyRequests(Problem):
    """The client sends more requests than it may.

    Nothing was changed. Wait `Retry-After` seconds.
    """

    status, code, title = 429, "too-many-requests", "Too many requests"
    sample: ClassVar = {"detail": "Too many wrong keys came from this address.", "seconds": 1}

    def __init__(self, detail: str, *, seconds: float) -> None:
        super().__init__(detail, headers={"Retry-After": str(math.ceil(seconds))})
