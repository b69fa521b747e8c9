"""The addresses of hosts, as servers listen on them."""

from __future__ import annotations

import socket

import pytest
from forebay.addresses import Address, listening

from tests.names import resolve_to


def texts(host: str) -> list[str]:
    return [str(a) for a in listening(host, 7)]


@pytest.mark.parametrize(
    ("host", "text"),
    [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7"), ("[::1]", "[::1]:7"), ("::", "[::]:7")],
)
def test_an_address_stands_for_itself(host: str, text: str) -> None:
    assert texts(host) == [text]


def test_a_name_stands_for_all_its_addresses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, {"two.test": ["127.0.0.2", "127.0.0.1", "127.0.0.2"]})
    assert texts("two.test") == ["127.0.0.2:7", "127.0.0.1:7"]


def test_addresses_of_other_machines_are_left_out_unless_they_are_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """203.0.113.0/24 is nobody's (RFC 5737)."""
    names = {"some.test": ["203.0.113.1", "127.0.0.1"], "none.test": ["203.0.113.1", "203.0.113.2"]}
    resolve_to(monkeypatch, names)
    assert texts("some.test") == ["127.0.0.1:7"]
    assert texts("none.test") == ["203.0.113.1:7", "203.0.113.2:7"]


def test_a_link_local_address_keeps_its_interface() -> None:
    address = Address(socket.AF_INET6, ("fe80::1%eth0", 7, 0, 2))
    assert str(address) == "[fe80::1%2]:7"
    assert str(address.at(8)) == "[fe80::1%2]:8"


@pytest.mark.parametrize("host", ["no such host", "a..b"])
def test_a_host_that_is_unknown_is_named(host: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {host}:7: "):
        listening(host, 7)
