"""joblib to skops, in a process that can do little: only when asked for by name.

A pickle runs code when it is read. The reading process has an empty environment, the
file as its standard input, a temporary folder as its working folder and home, and limits: no further processes, 60 s of CPU
time, 8 GiB of memory, files of at most 1 GiB. On Linux it has no network (a namespace without
interfaces), and root becomes `nobody` first; where the kernel refuses the namespace, reading is
refused. It may still read and write files that its user may read and write (as `nobody`: what all may
write), since it has no file system of its own. So: files of strangers do not belong here,
sandbox or not. Its result is a skops file, whose types the caller then trusts by name.
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
                [sys.executable, "-c", _READER, str(target)],
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
