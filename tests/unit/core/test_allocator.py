"""Malloc's arenas are bounded, as seen by malloc itself."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

#: Prints how many arenas there are after more threads than glibc would give arenas of their own.
ARENAS = """
import ctypes, os, threading
from forebay_server.core.allocator import bound_arenas
bound_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
count = 9 * os.cpu_count()
here = threading.Barrier(count + 1)
def body():
    libc.malloc(ctypes.c_size_t(1000))
    here.wait()
for _ in range(count):
    threading.Thread(target=body).start()
here.wait()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the bound is glibc's; here is another C library"
)
@pytest.mark.parametrize(
    "said", [{}, {"MALLOC_ARENA_MAX": "3"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=3"}]
)
def test_arenas_are_one_a_core_unless_the_operator_says_otherwise(said: dict[str, str]) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    env |= said
    done = subprocess.run(
        [sys.executable, "-c", ARENAS], env=env, capture_output=True, text=True, check=True
    )
    arenas = done.stdout.count("<heap ")
    cores = os.cpu_count() or 1
    assert arenas == 3 if said else 2 <= arenas <= max(2, cores)
