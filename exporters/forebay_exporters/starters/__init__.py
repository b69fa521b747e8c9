"""The starter models: made on first start, kept afterwards."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

from forebay_exporters.artefact import is_whole

Progress = Callable[[str, float], None]
NAMES = ("housing", "iris", "digits", "minilm", "minilm-int8", "sentiment")


def missing(root: Path) -> list[str]:
    """Starter models that are not in a repository yet, or not whole: a disk was full, say."""
    return [n for n in NAMES if not is_whole(root / n / "1")]


def make_starters(
    root: Path,
    cache: Path,
    data: Path | None = None,
    progress: Progress = lambda text, share: None,
    only: tuple[str, ...] = NAMES,
) -> dict[str, str]:
    """Make what is missing. Waits for another process that does.

    Args:
        root: the model repository.
        cache: folder for weights and data that are fetched.
        data: folder with `tabular/california_housing.csv.gz`; None = fetch it, or do without.
        progress: gets what is being done, and which share of it is.

    Returns:
        What went wrong, by model: one that cannot be made hinders no other.
    """
    from forebay_exporters.artefact import ExportError
    from forebay_exporters.starters import minilm, sentiment, tables

    makers: dict[str, Callable[[], object]] = {
        "housing": partial(tables.make_housing, root, cache, data, progress),
        "iris": partial(tables.make_classifier, root, "iris", progress),
        "digits": partial(tables.make_classifier, root, "digits", progress),
        "minilm": partial(minilm.make, root, cache, progress),
        "minilm-int8": partial(minilm.make_int8, root, cache, progress),
        "sentiment": partial(sentiment.make, root, cache, progress),
    }
    faults: dict[str, str] = {}

    def wanted() -> list[str]:
        return [n for n in missing(root) if n in only]

    if not wanted():
        return faults
    try:
        lock = _lock(cache)
    except OSError as e:
        return dict.fromkeys(wanted(), str(e))
    with lock:
        for name in wanted():
            progress(f"making {name}", 0.0)
            try:
                if (
                    root / name / "1" / "manifest.json"
                ).exists():  # one of ours: its files are known
                    shutil.rmtree(root / name / "1")
                makers[name]()
            except (ExportError, OSError, ValueError, RuntimeError) as e:
                faults[name] = str(e)
    return faults


def _lock(cache: Path) -> IO[str]:
    """Held until it is closed: of two that begin at once, the second finds the models of the first."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = (cache / "starters.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock
