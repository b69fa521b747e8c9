"""Parsing in a process of its own, with limits: a hostile document costs only itself."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from forebay_server.knowledge.parsers import Parsed, ParseError


@dataclass(frozen=True, slots=True)
class ParseLimits:
    """Of one document. `wall_s` is real time, `cpu_s` the process's own."""

    wall_s: float = 120.0
    cpu_s: int = 60
    memory_bytes: int = 2 << 30


async def parse_file(
    path: Path, name: str, password: str = "", limits: ParseLimits | None = None
) -> Parsed:
    """The text of a stored file.

    Raises:
        ParseError: with the reason that the caller sees; TIMEOUT, MEMORY and CRASHED among them.
    """
    limits = limits or ParseLimits()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "forebay_server.knowledge.parse_worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    order = {
        "path": str(path),
        "name": name,
        "password": password,
        "memory_bytes": limits.memory_bytes,
        "cpu_s": limits.cpu_s,
    }
    try:
        async with asyncio.timeout(limits.wall_s):
            out, _ = await process.communicate(json.dumps(order).encode() + b"\n")
    except TimeoutError:
        raise ParseError("TIMEOUT", f"it took longer than {limits.wall_s:g} s to read") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        reply = json.loads(out)
    except ValueError:
        if process.returncode in (-24, -9):  # SIGXCPU, and SIGKILL a second later
            raise ParseError("TIMEOUT", f"it took more than {limits.cpu_s} s of CPU") from None
        raise ParseError("CRASHED", "the parser ended on it") from None
    if "error" in reply:
        raise ParseError(reply["error"], reply["message"])
    reply["headings"] = [(a, b, c) for a, b, c in reply["headings"]]
    return Parsed(**reply)
