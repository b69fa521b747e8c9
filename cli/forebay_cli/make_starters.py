"""`python -m forebay_cli.make_starters MODELS CACHE [DATA]`: with a progress bar."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Exit status 1 when some model could not be made."""
    from forebay_exporters.starters import make_starters, missing
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    root, cache = Path(sys.argv[1]), Path(sys.argv[2])
    data = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    todo = missing(root)
    done = 0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starter models", total=max(1, len(todo)))

        def progress(text: str, share: float) -> None:
            nonlocal done
            if text.startswith("making "):
                done += 1
            bar.update(task, description=text, completed=done - 1 + share)
            if not console.is_terminal:
                console.print(f"{text} ...")

        faults = make_starters(root, cache, data, progress)
        bar.update(task, description="starter models are ready", completed=len(todo))
    for name, fault in faults.items():
        console.print(f"[red]{name}[/red]: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
