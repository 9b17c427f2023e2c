"""Whether a request may pass: by its key, its scope, and, without keys, by its host."""

import asyncio
import ipaddress
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from math import inf
from time import monotonic
from typing import Final

import structlog

from balance_app.access.errors import (
    CrossSiteRequest,
    InsufficientScope,
    MisdirectedRequest,
    TooManyRequests,
    Unauthorized,
)
from balance_app.access.keys import ANONYMOUS, ANYBODY, Principal, digest_of, is_token
from balance_app.access.rates import TokenBuckets
from balance_app.access.repository import KeyRepository
from balance_app.access.routes import OPEN, methods_of, needs_of
from balance_app.errors import (
    SAFE_METHODS,
    DatabaseUnavailable,
    MethodNotAllowed,
    NotFound,
    Problem,
)
from balance_app.metrics import Metrics
from balance_app.proxies import prefix_of
from balance_app.settings import Settings

log = structlog.get_logger(__name__)

REFRESH_SECONDS: Final = 1.0
# For how long the keys of the last refresh are valid while the database is unavailable.
TRUST_SECONDS: Final = 60.0
# Keys that are not known are looked for in the database at most this often.
EARLY_SECONDS: Final = 1.0
# Wrong keys of one address in a second, and addresses that are remembered.
WRONG_RATE: Final = 10
ADDRESSES: Final = 10_000
HOSTS: Final = 1_000

# The one that only this host can have set over TLS counts before the other. A comma separates
# nothing here: it may stand in the value of a cookie that a neighbouring host has set.
_COOKIES: Final = [
    re.compile(rb"(?:^|;)[ \t]*%b=([^;, \t]*)" % name) for name in (b"__Host-ba", b"ba")
]
_BEARER: Final = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([^ \t]+)")

_HOST: Final = re.compile(r"(?:\[([^][]*)\]|([^][:]*))(?::[0-9]*)?")

_DEFAULT_PORTS: Final = {b"http": b":80", b"https": b":443"}

_AWAY: Final = "The keys could not be read from the database."


class OpenToNetworkError(Exception):
    """The instance would serve anybody who can reach its address; the message says what to do."""


class Gate:
    """The keys of an instance, and its decision about each request."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._keys: KeyRepository | None = None
        # why this instance may not start, if so
        self.open_to_network: str | None = None
        self._posture_is_checked = False
        # of the last refresh; None until the first one
        self._keys_required: bool | None = None
        self._generation: int | None = None
        self._refreshed_at = 0.0
        # by digest: who it is, and until when (monotonic); and by the ids of key and session
        self._valid: dict[bytes, tuple[Principal, float]] = {}
        self._ends: dict[tuple[str | None, str | None], float] = {}
        # of the valid keys that were used, by their Authorization header
        self._digests: dict[bytes, bytes] = {}
        self._early_at = 0.0
        self._refreshing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._when_changed: list[Callable[[], None]] = []
        # which keys were used, and on which day that is noted
        self._used: set[str] = set()
        self._noted: tuple[object, set[str]] = (None, set())
        self._wrong = TokenBuckets(rate=WRONG_RATE, burst=WRONG_RATE, most=ADDRESSES)
        rate = settings.rate_per_key
        self._rates = None if rate is None else TokenBuckets(rate=rate, burst=rate, most=ADDRESSES)
        names = settings.allowed_hosts.split(",")
        self._allowed_hosts = {name.strip().lower().rstrip(".") for name in names} - {""}
        self._good_hosts: set[bytes] = set()

    # -- the keys ----------------------------------------------------------------------------

    async def start(self, keys: KeyRepository) -> None:
        """Read the keys, and go on once a second.

        Raises:
            OpenToNetworkError: there are no keys, and others can reach this instance.
        """
        self._keys = keys
        try:
            await self._refresh()
        except Problem as problem:
            log.warning("keys not read", reason=problem.detail)
        except Exception:
            log.exception("keys not read")
        self._check_posture()
        self._task = asyncio.create_task(self._refresh_always())

    async def stop(self) -> None:
        """Stop reading the keys."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def when_changed(self, call: Callable[[], None]) -> None:
        """Call this whenever a key or session is new or has ended; for streams."""
        self._when_changed.append(call)

    def _check_posture(self) -> None:
        """Check, once it is known, whether others can reach this instance without a key.

        Raises:
            OpenToNetworkError: they can, and that was not allowed.
        """
        if self._keys_required is None or self._posture_is_checked:
            return
        self._posture_is_checked = True
        settings = self._settings
        if self._keys_required or settings.is_loopback:
            return
        if not settings.allow_anonymous:
            self.open_to_network = open_to_network(settings)
            raise OpenToNetworkError(self.open_to_network)
        log.warning("anonymous", reason=f"HOST={settings.host}, and no key is needed.")

    async def _refresh_always(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self._refresh()
                await self._note_use()
                self._check_posture()
            except OpenToNetworkError as error:
                # It was not known when this instance started: requests are refused.
                log.error("open to the network", reason=str(error))  # noqa: TRY400
            except Problem as problem:
                log.debug("keys not read", reason=problem.detail)
            except Exception:
                log.exception("keys not read")

    async def _refresh(self, *, since: float | None = None) -> None:
        """Read the keys anew if one has changed; with `since` unless they were read after that.

        Raises:
            DatabaseUnavailable: they can't be read.
        """
        assert self._keys is not None  # noqa: S101 - `start` came before
        async with self._refreshing:
            began = monotonic()
            if since is not None and self._refreshed_at >= since:
                return
            generation, keys_required = await self._keys.state()
            if generation != self._generation and keys_required:
                valid = await self._keys.valid()
                now = monotonic()
                ends = [inf if each.seconds is None else now + each.seconds for each in valid]
                self._valid = {
                    each.digest: (each.principal, until)
                    for each, until in zip(valid, ends, strict=True)
                }
                self._digests = {}
                self._ends = {
                    (principal.key_id, principal.session_id): until
                    for principal, until in self._valid.values()
                }
            is_changed = generation != self._generation
            self._generation, self._keys_required = generation, keys_required
            self._refreshed_at = began
        if is_changed:
            for call in self._when_changed:
                call()

    async def _note_use(self) -> None:
        # ast-grep-ignore: instance-clock - how often the statement is sent; its day is the server's
        today = datetime.now(UTC).date()
        noted = self._noted[1] if self._noted[0] == today else set()
        new = self._used - noted
        self._used = set()
        if new:
            assert self._keys is not None  # noqa: S101 - `start` came before
            await self._keys.note_use(sorted(new))
        self._noted = (today, noted | new)

    @property
    def is_anonymous(self) -> bool:
        """Whether nobody is asked for a key."""
        return self._keys_required is False

    @property
    def shows_details(self) -> bool:
        """Whether whoever reads an open route may see all, as a user of this machine may."""
        if self._keys_required is None:
            return self._settings.is_loopback
        return not self._keys_required

    def is_valid(self, principal: Principal) -> bool:
        """Return whether a key, or a session, that was valid still is; for streams."""
        if principal.key_id is None:
            return principal is ANYBODY or self.is_anonymous
        return self._ends.get((principal.key_id, principal.session_id), 0.0) > monotonic()

    # -- requests ----------------------------------------------------------------------------

    def admit_known(
        self, method: str, path: str, headers: Mapping[bytes, bytes]
    ) -> Principal | None:
        """Return whose request it is; None: its key is not known here, `admit` looks for it.

        Raises:
            MisdirectedRequest, CrossSiteRequest, InsufficientScope, TooManyRequests, NotFound:
                it is refused.
            DatabaseUnavailable: the keys are not known.
        """
        needs = needs_of(method, path)
        if needs == OPEN:
            self._check_site(method, headers)
            return ANYBODY
        if self._keys_required is None:
            return None
        if self._keys_required:
            found = self._find(self._digest_in(headers))
            if found is not None:
                return self._allow(found, needs, method, path, headers)
            return None
        self._check_anonymous(headers)
        return self._allow(ANONYMOUS, needs, method, path, headers)

    async def admit(
        self,
        method: str,
        path: str,
        headers: Mapping[bytes, bytes],
        client: tuple[str, int] | None,
    ) -> Principal:
        """As `admit_known`, after a look into the database for a key that is new.

        Raises:
            Unauthorized: there is no valid key in the request.
        """
        if self._keys_required is None:
            # The database was not there when this instance started.
            await self._refresh(since=monotonic())
            known = self.admit_known(method, path, headers)
            if known is not None:
                return known
        token = _token_of(headers)
        if token is None:
            raise Unauthorized
        found = await self.identify(token, client)
        return self._allow(found, needs_of(method, path), method, path, headers)

    async def identify(self, token: bytes, client: tuple[str, int] | None) -> Principal:
        """Return whose key or session this is, after a look into the database for one that is new.

        Raises:
            Unauthorized: it is not valid.
            TooManyRequests: too many wrong ones came from this address.
            DatabaseUnavailable: the keys can't be read.
        """
        digest = digest_of(token)
        found = self._find(digest)
        if found is not None:
            return found
        now = monotonic()
        wait = self._wrong.take(prefix_of(client[0]) if client else "", now)
        if wait > 0:
            raise TooManyRequests("Too many wrong keys came from this address.", seconds=wait)
        if is_token(token):
            await asyncio.sleep(self._early_at + EARLY_SECONDS - now)
            if self._refreshed_at < now:
                self._early_at = monotonic()
                await self._refresh(since=now)
        found = self._find(digest)
        if found is None:
            self._metrics.refused_keys.inc()
            raise Unauthorized("The key is wrong, expired or revoked.")
        return found

    def sender(self, headers: Mapping[bytes, bytes]) -> Principal:
        """Return whose valid key a request has, whatever it may do; for pages that are open."""
        principal, until = self._valid.get(self._digest_in(headers) or b"", (ANYBODY, 0.0))
        return principal if until > monotonic() else ANYBODY

    def _digest_in(self, headers: Mapping[bytes, bytes]) -> bytes | None:
        """Return the digest of the key or session in a request."""
        authorization = headers.get(b"authorization", b"")
        digest = self._digests.get(authorization)
        if digest is None:
            token = _token_of(headers)
            if token is None:
                return None
            digest = digest_of(token)
            # Of a valid key, in the one form in which it is usual: there are no more than keys.
            if digest in self._valid and authorization == b"Bearer " + token:
                self._digests[authorization] = digest
        return digest

    def _find(self, digest: bytes | None) -> Principal | None:
        """Return whose valid key or session this is.

        Raises:
            DatabaseUnavailable: the keys were read too long ago.
            TooManyRequests: it is used too often.
        """
        now = monotonic()
        if now - self._refreshed_at > TRUST_SECONDS:
            raise DatabaseUnavailable(_AWAY, applied="no")
        if digest is None:
            return None
        principal, until = self._valid.get(digest, (None, 0.0))
        if principal is None or until <= now:
            return None
        if principal.key_id is not None:
            self._used.add(principal.key_id)
        if self._rates is not None and principal.name is not None:
            wait = self._rates.take(principal.name, now)
            if wait > 0:
                raise TooManyRequests("The key is used too often.", seconds=wait)
        return principal

    def _allow(
        self,
        principal: Principal,
        needs: tuple[str, ...] | None,
        method: str,
        path: str,
        headers: Mapping[bytes, bytes],
    ) -> Principal:
        if needs is None:
            methods = methods_of(path)
            if methods:
                raise MethodNotAllowed(methods)
            raise NotFound("There is nothing at this address.")
        self._check_site(method, headers)
        if principal.scopes.isdisjoint(needs):
            raise InsufficientScope(needs)
        return principal

    def _check_anonymous(self, headers: Mapping[bytes, bytes]) -> None:
        settings = self._settings
        if not (settings.is_loopback or settings.allow_anonymous):
            raise Unauthorized(open_to_network(settings))
        host = headers.get(b"host", b"")
        if host not in self._good_hosts:
            if not self._is_own_host(host):
                raise MisdirectedRequest
            if len(self._good_hosts) < HOSTS:
                self._good_hosts.add(host)

    def _is_own_host(self, host: bytes) -> bool:
        """Return whether no page of another site can have this name for its own."""
        allowed = self._allowed_hosts
        if "*" in allowed or not host:  # HTTP/1.0 has no Host, nor has it browsers
            return True
        parts = _HOST.fullmatch(host.decode("latin-1").lower())
        if parts is None:
            return False
        name = (parts[1] or parts[2]).rstrip(".")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost" or name.endswith(".localhost") or name in allowed
        return True

    def _check_site(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Refuse what a page of another site sends: a form needs no permission of this one.

        Raises:
            CrossSiteRequest: it is.
        """
        if method in SAFE_METHODS:
            return
        site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
        # Without TLS browsers send no Sec-Fetch-Site, only Origin.
        if site is not None:
            if site not in {b"same-origin", b"none"}:
                raise CrossSiteRequest
        elif origin is not None and not _is_of(origin, headers.get(b"host", b"")):
            raise CrossSiteRequest


def _is_of(origin: bytes, host: bytes) -> bool:
    """Return whether a page of this origin is one of this host."""
    scheme, _, named = origin.partition(b"://")
    # Some proxies name the port that a browser leaves out.
    return host in {named, named + _DEFAULT_PORTS.get(scheme, b"")}


def _token_of(headers: Mapping[bytes, bytes]) -> bytes | None:
    """Return the key or session in a request."""
    authorization = headers.get(b"authorization")
    if authorization is not None:
        bearer = _BEARER.fullmatch(authorization.strip(b" \t"))
        if bearer is not None:
            return bearer[1]
        # That of another scheme may be for a proxy.
    cookie = headers.get(b"cookie")
    if cookie is not None:
        for pattern in _COOKIES:
            if (named := pattern.search(cookie)) is not None:
                return named[1]
    return None


def open_to_network(settings: Settings) -> str:
    """Return the sentence about an instance that would serve anybody."""
    if settings.proxy_networks:
        return (
            "By TRUSTED_PROXIES others reach this instance, and there are no keys: create one "
            "(`balance-app keys create`), or set ALLOW_ANONYMOUS=true if the proxy authenticates "
            "users."
        )
    return (
        f"HOST={settings.host} is open to the network and there are no keys: create one "
        "(`balance-app keys create`), or set HOST=127.0.0.1, or ALLOW_ANONYMOUS=true behind "
        "a proxy that authenticates users."
    )
