"""joblib to skops, in a process that can do little: only when asked for by name.

A pickle runs code when it is read. The reading process has an empty environment, the file as its
standard input, a temporary folder as its working folder and home, and limits: no further processes,
60 s of CPU time, 8 GiB of memory, files of at most 1 GiB. On Linux it has no network (a namespace
without interfaces), root becomes `nobody` first, and Landlock lets it write below its own folder
only, and read only that, Python's own files and the system's libraries. Where the kernel gives no
such namespace or no Landlock (before 5.13), reading is refused. Its result is a skops file, whose
types the caller then trusts by name.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from forebay_exporters.artefact import ExportError

TIMEOUT_S = 120

_READER = """
import ctypes, os, resource, sys
target = sys.argv[1]
import joblib, skops.io, sklearn.pipeline, sklearn.ensemble, sklearn.compose  # before the doors shut
root = os.geteuid() == 0
flags = 0x40000000 | (0 if root else 0x10000000)  # CLONE_NEWNET, and CLONE_NEWUSER to be allowed to
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(flags) != 0:
    raise SystemExit("this kernel gives no network namespace: " + os.strerror(ctypes.get_errno()))
if root:
    os.chown(os.getcwd(), 65534, 65534)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

class Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64)]

class Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("parent", ctypes.c_int32)]

EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
abi = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset, asking for its version
if abi < 1:
    raise SystemExit("this kernel has no Landlock")
every = (1 << (13 if abi < 2 else 14 if abi < 3 else 15)) - 1  # REFER and TRUNCATE came later
rules = Ruleset(every)
ruleset = libc.syscall(444, ctypes.byref(rules), ctypes.sizeof(rules), 0)
readable = [sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/proc", "/sys", *sys.path]
for path, access in [(os.getcwd(), every), *((p, EXECUTE | READ_FILE | READ_DIR) for p in readable)]:
    try:
        folder = os.open(path or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        continue  # not on this system
    rule = Beneath(access, folder)
    libc.syscall(445, ruleset, 1, ctypes.byref(rule), 0)  # landlock_add_rule
    os.close(folder)
if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(446, ruleset, 0):  # no new rights; restrict_self
    raise SystemExit("Landlock refused its rules: " + os.strerror(ctypes.get_errno()))
for what, most in (
    (resource.RLIMIT_CPU, 60),
    (resource.RLIMIT_AS, 8 << 30),
    (resource.RLIMIT_FSIZE, 1 << 30),
    (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(what, (most, most))
with os.fdopen(0, "rb") as source:
    model = joblib.load(source)
skops.io.dump(model, target)
"""


def joblib_to_skops(path: Path) -> Path:
    """Read a joblib file in the sandbox; gives a skops file beside nothing else of it.

    Raises:
        ExportError: it could not be read within the limits.
    """
    folder = Path(tempfile.mkdtemp(prefix="forebay-joblib-"))
    target = folder / (path.stem + ".skops")
    try:
        with path.open("rb") as source:  # opened here: the process itself may not be let to
            done = subprocess.run(
                [sys.executable, "-P", "-c", _READER, str(target)],
                cwd=folder,
                env={"HOME": str(folder), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=source,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
    except subprocess.TimeoutExpired:
        raise ExportError(f"{path.name} was not read within {TIMEOUT_S} s") from None
    if done.returncode or not target.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"{path.name} could not be read in the sandbox: {last}")
    return target
