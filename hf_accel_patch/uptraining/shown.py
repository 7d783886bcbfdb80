"""The progress of a run on stderr: a bar on a terminal, a line for each tenth of the steps elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[int, float], None]
SMOOTHED = 0.9  # of the mean before, in the loss that is shown


@contextmanager
def shown(steps: int, begun: int, on: bool) -> Iterator[Show]:
    """Gives a function of the number of whole steps and the objective of the last one."""
    if not on:
        yield lambda whole, loss: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("uptrain"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), *times)
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("", total=steps, completed=begun)
    start, mean = time.monotonic(), float("nan")

    def show(whole: int, loss: float) -> None:
        nonlocal mean
        mean = loss if mean != mean else SMOOTHED * mean + (1 - SMOOTHED) * loss
        bar.update(task, completed=whole, description=f"loss {mean:.3f}")
        tenth = (whole * 10) // steps > ((whole - 1) * 10) // steps
        if tenth and not console.is_terminal:
            seconds = time.monotonic() - start
            console.print(f"uptrain {whole}/{steps}  loss {mean:.3f}  {seconds:.0f} s", soft_wrap=True)

    with bar:
        yield show
