"""Evaluations over a restart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from forebay_server.knowledge.bases import Base, KnowledgeBases
from forebay_server.knowledge.evaluation_jobs import EvaluationJobs


class Bases:
    """Of KnowledgeBases, what EvaluationJobs asks for: one base and its folder."""

    def __init__(self, folder: Path) -> None:
        self.base = cast(Base, SimpleNamespace(row=SimpleNamespace(id=1)))
        self._folder = folder

    def all(self) -> list[Base]:
        return [self.base]

    def folder(self, base_id: int) -> Path:
        return self._folder


async def test_a_file_that_cannot_be_read_is_left_out_and_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bases = Bases(tmp_path)
    of = cast(KnowledgeBases, cast(Any, bases))
    good = await EvaluationJobs(of).add(bases.base, "e", "k", [], 1, b"")
    (tmp_path / "evaluations" / "broken.json").write_bytes(b"{")
    jobs = EvaluationJobs(of)
    await jobs.start()
    await jobs.close()
    assert [j.id for j in jobs.of(bases.base)] == [good.id]
    assert "broken.json" in caplog.text
