"""Memory in pages of 2 MB, where the kernel leaves that to programs (as Debian, Ubuntu and most clouds do).

A model's weights and a vector index are read all over for every call. In pages of 4 kB the processor
looks up where each page lies about as long as it reads it, in a virtual machine twice as long. glibc
asks for large pages when it is told so before a program starts (docs/adr/0027).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ensure() -> None:
    """Start this program again with large pages, unless it has them, or cannot or shall not have them.

    Shall not: GLIBC_TUNABLES is set, to whatever value.
    """
    if VARIABLE in os.environ or not optional():
        return
    os.environ[VARIABLE] = VALUE
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - no shell


def optional() -> bool:
    """Whether this kernel gives large pages to those who ask, and to no others."""
    try:
        return "[madvise]" in ENABLED.read_text()
    except OSError:
        return False
