"""One list out of a dense and a keyword one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: (slot, score), best first.
Ranking = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Fusion:
    """How to fuse. `rank_constant` is RRF's k."""

    method: Literal["rrf", "weighted"] = "rrf"
    dense_weight: float = 1.0
    keyword_weight: float = 1.0
    rank_constant: int = 60


def fuse(dense: Ranking, keyword: Ranking, how: Fusion) -> list[tuple[int, float]]:
    """Both rankings as one, best first; ties go to the lower slot, so that answers repeat."""
    scores: dict[int, float] = {}
    for ranking, weight in ((dense, how.dense_weight), (keyword, how.keyword_weight)):
        if not ranking or not weight:
            continue
        if how.method == "rrf":
            values = [weight / (how.rank_constant + i) for i in range(1, len(ranking) + 1)]
        else:
            best, worst = ranking[0][1], ranking[-1][1]
            spread = best - worst
            values = [weight * ((s - worst) / spread if spread > 0 else 1.0) for _, s in ranking]
        for (slot, _), value in zip(ranking, values, strict=True):
            scores[slot] = scores.get(slot, 0.0) + value
    return sorted(scores.items(), key=lambda x: (-x[1], x[0]))
