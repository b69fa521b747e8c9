"""The addresses that a host stands for, for those that listen there."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from forebay.settings import is_loopback


@dataclass(frozen=True, slots=True)
class Address:
    """One address; its text is `address:port`, as URLs have it."""

    family: int
    #: As Python's sockets take it.
    place: tuple[Any, ...]

    def __str__(self) -> str:
        host, port, *more = self.place
        if self.family != socket.AF_INET6:
            return f"{host}:{port}"
        scope = more[1] if len(more) > 1 else 0
        return f"[{host.partition('%')[0]}{f'%{scope}' if scope else ''}]:{port}"

    def at(self, port: int) -> Address:
        """The same address with another port."""
        return Address(self.family, (self.place[0], port, *self.place[2:]))


def name_of(host: str) -> str:
    """The name or address of a `host:port`, in small letters; empty where there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:  # as of "["
        return ""


def is_here(name: str) -> bool:
    """Whether a name means this machine whoever asks: no other site's can be made to (DNS rebinding)."""
    return is_loopback(name) or name.endswith(".localhost")


def listening(host: str, port: int) -> list[Address]:
    """All addresses of a host, each once. Of several, those are left out that this machine does not
    have: many a machine says that `localhost` is ::1 too, and has no IPv6.

    Raises:
        OSError: the host is unknown.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise OSError(f"cannot listen on {host}:{port}: {e}") from e
    known = list(dict.fromkeys(Address(family, place) for family, _, _, _, place in found))
    return [a for a in known if len(known) == 1 or _is_here(a)] or known


def _is_here(address: Address) -> bool:
    with contextlib.suppress(OSError), socket.socket(address.family) as s:
        s.bind(address.at(0).place)
        return True
    return False
