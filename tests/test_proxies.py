"""Which proxies are believed, and how what they say is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balance_app.proxies import Proxies, networks
from balance_app.settings import BadSettingsError, load_settings

TRUSTED = "10.0.0.0/8, fd00::/8,127.0.0.1, ::ffff:192.168.0.0/112"


def read(*lists: str, proto: str = "", host: str = "") -> tuple[str | None, str | None, str | None]:
    """Return address, scheme and host of a request with these headers."""
    headers = [(b"x-forwarded-for", each.encode("latin-1")) for each in lists]
    headers += [(b"x-forwarded-proto", proto.encode())] if proto else []
    headers += [(b"x-forwarded-host", host.encode())] if host else []
    client, scheme, named = Proxies(networks(TRUSTED)).read(headers)
    return client and client[0], scheme, None if named is None else named.decode()


@pytest.mark.parametrize(
    ("sent", "client"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("6.6.6.6, 203.0.113.9", "203.0.113.9"),
        ("6.6.6.6, 203.0.113.9, 10.0.0.2, 10.1.0.3", "203.0.113.9"),
        ("10.0.0.9, 203.0.113.9, 10.0.0.2", "203.0.113.9"),
        ("10.0.0.3,10.0.0.2", "10.0.0.3"),
        ("192.168.0.7", "192.168.0.7"),
        (" , 203.0.113.9 ,, ", "203.0.113.9"),
        ("203.0.113.9:4711", "203.0.113.9"),
        ("203.0.113.9:99999", "203.0.113.9"),
        ("2001:DB8:0::9", "2001:db8::9"),
        ("[2001:db8::9]", "2001:db8::9"),
        ("[2001:db8::9]:4711, [fd00::2]:80", "2001:db8::9"),
        ("::ffff:203.0.113.9, ::ffff:10.0.0.2", "203.0.113.9"),
        # what is no address ends the list: the last hop that is known counts
        ("6.6.6.6, unknown, 10.0.0.2", "10.0.0.2"),
        ("6.6.6.6, unknown", None),
        ("fe80::1%eth0", None),
        ("010.0.0.1", None),
        ("203.0.113.9:", None),
        ("[203.0.113.9", None),
        ("\u00b203.0.113.9", None),
        ("", None),
    ],
)
def test_the_client_is_the_first_from_the_right_that_is_no_proxy(
    sent: str, client: str | None
) -> None:
    assert read(sent)[0] == client


def test_several_headers_are_one_list() -> None:
    assert read("6.6.6.6", "203.0.113.9, 10.0.0.2")[0] == "203.0.113.9"


@pytest.mark.parametrize(
    ("hops", "proto", "host", "expected"),
    [
        ("203.0.113.9", "https", "a.example", ("https", "a.example")),
        ("203.0.113.9", "http, https", "evil.example, a.example", ("https", "a.example")),
        # the proxy next to the client, not the inner one
        ("203.0.113.9, 10.0.0.2", "https, http", "a.example, app1:3000", ("https", "a.example")),
        ("203.0.113.9, 10.0.0.2", "http, https, http", "evil, a, b", ("https", "a")),
        ("203.0.113.9, 10.0.0.2", "HTTPS", "a.example", ("https", "a.example")),
        ("203.0.113.9", "gopher", "", (None, None)),
        ("203.0.113.9", ",", ",", (None, None)),
    ],
)
def test_scheme_and_host_are_from_the_proxy_next_to_the_client(
    hops: str, proto: str, host: str, expected: tuple[str | None, str | None]
) -> None:
    """Where each adds to the lists; one that replaces them leaves a single value."""
    assert read(hops, proto=proto, host=host)[1:] == expected


def test_what_the_client_writes_never_counts() -> None:
    """Whatever stands left of what the proxy has added, it is the same client."""

    @given(st.text(st.characters(max_codepoint=255)), st.integers(0, 5))
    def holds(spoofed: str, proxies: int) -> None:
        hops = ", ".join(["203.0.113.9", *["10.0.0.2"] * proxies])
        assert read(f"{spoofed}, {hops}")[0] == "203.0.113.9"
        assert read(spoofed, hops)[0] == "203.0.113.9"
        read(spoofed, proto=spoofed, host=spoofed)

    holds()


@pytest.mark.parametrize(
    ("host", "is_trusted"),
    [
        *(("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("fd00::1%eth0", True)),
        *(("192.168.0.1", True), ("192.169.0.1", False), ("11.0.0.1", False), ("::1", False)),
        ("", False),
    ],
)
def test_a_peer_is_trusted_by_its_address(host: str, *, is_trusted: bool) -> None:
    """Also one of version 4 on a socket of version 6."""
    assert Proxies(networks(TRUSTED)).trust(host) == is_trusted


@pytest.mark.parametrize("everybody", ["*", "0.0.0.0/0", "::/0", "::ffff:0:0/96", "10.0.0.1, *"])
def test_everybody_is_not_trusted(everybody: str) -> None:
    with pytest.raises(BadSettingsError, match=r"TRUSTED_PROXIES: must not be .*anybody"):
        load_settings(trusted_proxies=everybody)


@pytest.mark.parametrize(
    "wrong",
    [
        *("unix:", "unix:/run/proxy.sock", "app1", "localhost", "10.0.0.1:80", "[::1]", "10.0.0"),
        *("10.0.0.1/33", "10.0.0.1 10.0.0.2", "fe80::1%eth0", "\x1b[31m", "10.0.0.1;10.0.0.2"),
        "10.0.0.1, nothing",
    ],
)
def test_what_is_no_address_is_refused(wrong: str) -> None:
    """A sentence names it, and what would be right."""
    with pytest.raises(
        BadSettingsError, match=r"TRUSTED_PROXIES: '.*' is no address, such as"
    ) as e:
        load_settings(trusted_proxies=wrong)
    assert "\x1b" not in str(e.value)


def test_a_network_is_named_by_its_first_address() -> None:
    """An address with the length of a prefix may be a slip: which of them was meant?"""
    with pytest.raises(BadSettingsError, match=r"10\.0\.0\.7/8 is no network: write 10\.0\.0\.0/8"):
        load_settings(trusted_proxies="10.0.0.7/8")
    assert len(load_settings(trusted_proxies="10.0.0.7/32, fd00::/8,").proxy_networks) == 2
    assert load_settings(trusted_proxies=" , ").proxy_networks == ()


def test_behind_a_proxy_an_instance_is_open_to_the_network() -> None:
    """Although it listens on a loopback address."""
    assert load_settings(host="127.0.0.1").is_loopback
    assert not load_settings(host="127.0.0.1", trusted_proxies="127.0.0.1").is_loopback
