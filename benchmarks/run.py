"""`make bench`: every benchmark of the repository, one after the other."""

from __future__ import annotations

from benchmarks import embedding_overhead, tabular

if __name__ == "__main__":
    embedding_overhead.main()
    tabular.main()
