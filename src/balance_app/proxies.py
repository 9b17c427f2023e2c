"""Who is behind a proxy: `X-Forwarded-For`, `-Proto` and `-Host`, if a trusted proxy sends them.

Anybody can send these headers, so they count only on a connection from one of TRUSTED_PROXIES.
Each proxy adds what it has seen at the end of a list, or replaces the list. So lists are read from
the right, and only as far as trusted proxies have written them: the first address that is none of
theirs is the client, and what stands left of it is the client's own text.
"""

import re
from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final, NamedTuple, TypeAlias

Network: TypeAlias = IPv4Network | IPv6Network
Client: TypeAlias = tuple[str, int]

MAX_HOPS: Final = 32

# An address, or `address:port`; of version 6 the latter only in brackets.
_HOP: Final = re.compile(
    r"(?:\[(?P<bracketed>[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+))(?::(?P<port>[0-9]{1,5}))?"
    r"|(?P<v6>[0-9A-Fa-f:.]+)"
)
_INTERFACE_BITS: Final = 64
_MAPPED: Final = IPv6Network("::ffff:0:0/96")


class Forwarded(NamedTuple):
    """What trusted proxies say of a request; None where they say nothing that can be read."""

    client: Client | None
    scheme: str | None
    host: bytes | None


class Proxies:
    """The proxies that are believed."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._networks = tuple(networks)

    def trust(self, host: str) -> bool:
        """Return whether a connection, or a hop, from this address is one of a trusted proxy."""
        address = _address(host)
        return address is not None and self._contain(address)

    def read(self, headers: Iterable[tuple[bytes, bytes]]) -> Forwarded:
        """Return what the headers of a request say that came from a trusted proxy."""
        found: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            if name.startswith(b"x-forwarded-"):
                found.setdefault(name, []).append(value)
        client, hops = self._client(_from_the_right(found.get(b"x-forwarded-for")))
        scheme = _added_by(hops, _from_the_right(found.get(b"x-forwarded-proto")))
        host = _added_by(hops, _from_the_right(found.get(b"x-forwarded-host")))
        known = scheme is not None and scheme.lower() in {b"http", b"https"}
        return Forwarded(client, scheme.decode().lower() if scheme and known else None, host)

    def _client(self, hops: list[bytes]) -> tuple[Client | None, int]:
        """Return the client, and how many trusted proxies stand between it and the last one.

        What is no address ends the list: then the last proxy that is known counts as the client.
        """
        client, distance = None, 0
        for number, hop in enumerate(hops):
            parts = _HOP.fullmatch(hop.decode("latin-1"))
            address = parts and _address(parts["bracketed"] or parts["v4"] or parts["v6"])
            if not parts or address is None:
                break
            port = int(parts["port"] or 0)
            client, distance = (str(address), port if port <= _LAST_PORT else 0), number
            if not self._contain(address):
                break
        return client, distance

    def _contain(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


_LAST_PORT: Final = 65535


def networks(text: str) -> tuple[Network, ...]:
    """Return the addresses and networks of a list with commas.

    Raises:
        ValueError: one of them is neither, or is everybody's.
    """
    return tuple(_network(each.strip()) for each in text.split(",") if each.strip())


def _network(text: str) -> Network:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        network = None
    is_everybodys = network is not None and (network.prefixlen == 0 or network == _MAPPED)
    if text == "*" or is_everybodys:
        raise ValueError(f"must not be {text}: anybody could say who they are")
    if network is None or "%" in text:
        raise ValueError(
            f"{text!a} is no address, such as 10.0.0.7 or fd00::7, and no network, such as "
            "10.0.0.0/24 (names and ports are not taken)"
        )
    if "/" in text and _address(text.partition("/")[0]) != _plain(network.network_address):
        raise ValueError(f"{text} is no network: write {network}, or the address alone")
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        return IPv4Network((_plain(network.network_address), network.prefixlen - 96))
    return network


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return _plain(ip_address(text.partition("%")[0]))
    except ValueError:
        return None


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the address of version 4 that one of version 6 stands for, if it is such a one."""
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def prefix_of(address: str) -> str:
    """Return what limits of one client are counted by: an IPv4 address, or an IPv6 prefix of 64.

    A host may take any address of its network's prefix (RFC 4291, 2.5.4; RFC 8981).
    """
    found = _address(address)
    if isinstance(found, IPv6Address):
        return str(IPv6Network((int(found), _INTERFACE_BITS), strict=False))
    return address


def _from_the_right(values: list[bytes] | None) -> list[bytes]:
    """Return the last elements of a list that may be spread over several headers."""
    elements = b",".join(values or ()).rsplit(b",", MAX_HOPS)[-MAX_HOPS:]
    return [each.strip(b" \t") for each in reversed(elements) if each.strip(b" \t")]


def _added_by(hops: int, elements: list[bytes]) -> bytes | None:
    """Return what the proxy next to the client has said, or the one that has replaced the list."""
    return elements[min(hops, len(elements) - 1)] if elements else None
