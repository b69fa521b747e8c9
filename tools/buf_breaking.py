"""`buf breaking` against main, or against the commit before when this is main.

The first commit with a contract has nothing to compare with, and says so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(*args: str) -> subprocess.CompletedProcess[str]:
    """Run git in the repository."""
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)


def base() -> str | None:
    """The commit to compare with."""
    head = git("rev-parse", "HEAD").stdout.strip()
    for ref in ("origin/main", "main"):
        found = git("rev-parse", "--verify", "--quiet", ref)
        commit = found.stdout.strip()
        if found.returncode == 0 and commit != head:
            return commit
    before = git("rev-parse", "--verify", "--quiet", "HEAD~1")
    return before.stdout.strip() if before.returncode == 0 else None


def main() -> int:
    """Exit status of buf, 0 when there is nothing to compare with."""
    commit = base()
    if commit is None or git("cat-file", "-e", f"{commit}:buf.yaml").returncode:
        print("buf breaking: no earlier contract to compare with")
        return 0
    buf = Path(sys.executable).parent / "buf"
    return subprocess.run(
        [str(buf), "breaking", "--against", f".git#ref={commit}"], cwd=ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
