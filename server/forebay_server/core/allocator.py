"""glibc's malloc, kept from holding on to what models leave. Nothing happens with another C library."""

from __future__ import annotations

import contextlib
import ctypes
import os

#: Of mallopt.
_M_ARENA_MAX = -8


def bound_arenas() -> None:
    """One arena a core, unless the operator says otherwise. Before the process has threads.

    Who says so: MALLOC_ARENA_MAX, or arena_max in GLIBC_TUNABLES.

    glibc takes eight a core, and a thread that loads a model gets the one that few others use: after 90
    loads and unloads of MiniLM the server held 100 MB more than after the first, spread over sixteen
    arenas with something small at the end of each. With two it held what it did at first.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in tunables:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, max(2, os.cpu_count() or 1))


def trim() -> None:
    """Give memory that loading freed back to the system: 70 MB with the starter models."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
