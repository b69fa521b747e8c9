"""Measurements kept line by line, so that a run that is cut off goes on where it was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common

#: A measurement that failed so often is not tried again.
TRIES = 2


def commit() -> str:
    """The checkout's commit, with `+` where files differ from it."""
    ask = ["git", "-C", str(common.ROOT)]
    head = subprocess.run([*ask, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(
        [*ask, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


@dataclass
class State:
    """The records of one run: JSON objects, one a line.

    Attributes:
        facts: the machine, the commit and the options, which must stay the same within a run.
    """

    path: Path
    facts: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def open(path: Path, facts: Mapping[str, Any], new: bool) -> State:
        """Go on with what is there.

        Raises:
            ValueError: what is there was measured with other code, options or another machine.
        """
        state = State(path, dict(facts))
        if not new and path.exists():
            first, *state.records = _lines(path)
            if first != state.facts:
                keys = [k for k in state.facts if first.get(k) != state.facts[k]]
                raise ValueError(
                    f"{path} was begun with another {', '.join(keys)}; --new begins again"
                )
            text = path.read_text()
            if not text.endswith("\n"):  # a line that was cut off must not swallow the next one
                path.write_text(text[: text.rfind("\n") + 1])
            return state
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(state.facts) + "\n")
        return state

    @staticmethod
    def read(path: Path) -> State:
        """What is there, for a report.

        Raises:
            OSError: nothing is.
        """
        first, *records = _lines(path)
        return State(path, first, records)

    def add(self, **record: Any) -> None:
        """Keep a record, on disk at once."""
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def has(self, **key: Any) -> bool:
        """Whether a measurement is there, or has failed too often."""
        found = [r for r in self.records if all(r.get(k) == v for k, v in key.items())]
        faults = sum("fault" in r for r in found)
        return len(found) > faults or faults >= TRIES


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the last one, cut off
            return
