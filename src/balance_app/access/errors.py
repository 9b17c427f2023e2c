"""The problems of requests that their sender may not make."""

import math
from collections.abc import Iterable
from typing import ClassVar

from balance_app.errors import Applied, Problem


class _NotAdmitted:
    """Refused before anybody looked for an earlier try with the request's idempotency key."""

    applied: Applied

    def under(self, key: str | None) -> None:
        """Make `applied` cover all tries with the key."""
        if key is not None:
            self.applied = "unknown"


class Unauthorized(_NotAdmitted, Problem):
    """The request has no valid key.

    Nothing was changed by it. Send `Authorization: Bearer ba_...` with a key that `balance-app keys
    create` has made, and that is neither expired nor revoked.
    """

    status, code, title = 401, "unauthorized", "Unauthorized"

    def __init__(self, detail: str = "An API key is needed.") -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class InsufficientScope(_NotAdmitted, Problem):
    """The key is valid, but not for this.

    Nothing was changed by it. `needs` names the scopes, of which the key needs one.
    """

    status, code, title = 403, "insufficient-scope", "Insufficient scope"
    sample: ClassVar = {"scopes": ["change"]}

    def __init__(self, scopes: Iterable[str]) -> None:
        needs = sorted(scopes)
        super().__init__(f"The key lacks the scope {' or '.join(needs)}.", needs=needs)


class CrossSiteRequest(_NotAdmitted, Problem):
    """A page of another site sent the request.

    Nothing was changed by it. Only pages of this service may send requests that change something
    from a browser.
    """

    status, code, title = 403, "cross-site-request", "Cross-site request"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("The request comes from a page of another site.")


class MisdirectedRequest(_NotAdmitted, Problem):
    """The Host header names no host of this service.

    Nothing was changed by it. Without keys only names of this machine are accepted, as any page
    could otherwise reach the service through a name of its own (DNS rebinding). `ALLOWED_HOSTS`
    lists further names; with keys every name is accepted.
    """

    status, code, title = 421, "misdirected-request", "Misdirected request"
    sample: ClassVar = {}

    def __init__(self) -> None:
        super().__init__("The Host header names no host of this service (see ALLOWED_HOSTS).")


class TooManyRequests(_NotAdmitted, Problem):
    """The client sends more requests than it may.

    Nothing was changed by it. Wait `Retry-After` seconds.
    """

    status, code, title = 429, "too-many-requests", "Too many requests"
    sample: ClassVar = {"detail": "Too many wrong keys came from this address.", "seconds": 1}

    def __init__(self, detail: str, *, seconds: float) -> None:
        super().__init__(detail, headers={"Retry-After": str(math.ceil(seconds))})
