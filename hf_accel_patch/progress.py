"""A bar on stderr for work in stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stages(total: int, *, on: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar, where stderr is a terminal; the function it gives names the stage that begins."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    stage_name, count = TextColumn("{task.description}"), MofNCompleteColumn()
    columns = (SpinnerColumn(), stage_name, BarColumn(), count, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (on and console.is_terminal)) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def advance(stage: str) -> None:
            bar.update(task, advance=1, description=f"{stage:<32}")

        yield advance
