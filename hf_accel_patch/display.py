"""What is shown as a table: as text, fitted to a terminal (rich), as HTML in a notebook, as JSON for programs."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """How one column of a table is shown."""

    head: str
    figures: bool = False  # to the right, so that digits stand below one another
    wraps: bool = False  # whether its texts may take several lines


class Tabular:
    """What is shown as a table. Subclasses give `title`, `columns`, `cells` and `to_dict`."""

    @property
    def title(self) -> str:
        raise NotImplementedError

    @property
    def columns(self) -> Sequence[Column]:
        raise NotImplementedError

    def cells(self) -> Sequence[Sequence[str]]:
        """The texts of each row, as `columns`. Without rows the title is all that is shown."""
        raise NotImplementedError

    def faded(self, row: Sequence[str]) -> bool:
        """Whether a row matters less than the others."""
        return False

    @property
    def notes(self) -> Sequence[str]:
        """Lines below the table."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for programs."""
        raise NotImplementedError

    def to_json(self) -> str:
        """`to_dict`, as text; what is no finite number is null there."""
        return json.dumps(_finite(self.to_dict()), indent=2)

    def text(self) -> str:
        """One line per row, however wide: for files, logs and programs."""
        rows = self.cells()
        if not rows:
            return self.title
        heads = [column.head for column in self.columns]
        widths = [max(map(len, texts)) for texts in zip(heads, *rows, strict=True)]
        lines = []
        for row in (heads, *rows):
            padded = zip(row, self.columns, widths, strict=True)
            lines.append("  ".join(f"{cell:{'>' if c.figures else '<'}{width}}" for cell, c, width in padded).rstrip())
        return "\n".join([self.title, *lines, *self.notes])

    def __str__(self) -> str:
        """Fitted to the terminal, where there is one."""
        return in_terminal(self) if sys.stdout.isatty() and self.cells() else self.text()

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text  # of which no bracket is taken for markup

        shown = Table(
            title=Text(self.title, style="bold"),
            title_justify="left",
            caption=Text("\n".join(self.notes)) if self.notes else None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in self.columns:
            shown.add_column(column.head, justify="right" if column.figures else "left", no_wrap=not column.wraps)
        for row in self.cells():
            shown.add_row(*map(Text, row), style="dim" if self.faded(row) else None)
        return shown

    def _repr_html_(self) -> str:
        title, rows = f"<p><b>{escape(self.title)}</b></p>", self.cells()
        if not rows:
            return title

        def line(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        head = line((column.head for column in self.columns), "th")
        body = "".join(line(row, "td") for row in rows)
        below = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"{title}<table><thead>{head}</thead><tbody>{body}</tbody></table>{below}"


PASSES = (Column("pass"), Column("state"), Column("output"), Column("bytes"), Column("", wraps=True))
HIDDEN = ("pass", "exact", "reason", "bytes_before", "bytes_after")  # have columns of their own
SKIPPED = "skipped"


class Shown(Tabular):
    """A plan or a report, with one row per pass. Subclasses give `title`, `shown_rows` and `to_dict`."""

    def shown_rows(self) -> Sequence[dict[str, Any]]:
        """What `to_dict` says of each pass."""
        raise NotImplementedError

    @property
    def columns(self) -> Sequence[Column]:
        return PASSES

    def cells(self) -> Sequence[Sequence[str]]:
        return [_cells(row) for row in self.shown_rows()]

    def faded(self, row: Sequence[str]) -> bool:
        return row[1] == SKIPPED

    def lines(self) -> Iterator[str]:
        """One line per pass, for logs."""
        for name, *said in self.cells():
            yield f"{name}: {', '.join(filter(None, said))}"


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """One pass: its name, on or skipped, exact or changed, bytes, what else it says."""
    if "reason" in row:
        return row["pass"], SKIPPED, "", "", row["reason"]
    before, after = row["bytes_before"], row["bytes_after"]
    size = f"{in_words(before)} -> {in_words(after)}" if before != after else "same"
    said = ", ".join(_fact(key, row[key]) for key in row if key not in HIDDEN and row[key] != [])
    return row["pass"], "on", "exact" if row["exact"] else "changed", size, said


def in_terminal(shown: Tabular) -> str:
    """What rich makes of it at the width of the terminal, as text."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=Console().width, color_system=None, highlight=False)
    console.print(shown)
    return text.getvalue().rstrip("\n")


def in_words(size_bytes: int) -> str:
    """1_234_567 -> '1.23 MB'."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= divisor:
            return f"{size_bytes / divisor:.2f} {unit}"
    return f"{size_bytes} B"


def _finite(value: Any) -> Any:
    """What JSON can say: a number that is not finite is None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fact(key: str, value: Any) -> str:
    """A long list is counted; `to_dict` has it whole. Bytes are put in words."""
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{key.removesuffix('_bytes')} {in_words(value)}"
    return f"{len(value)} {key}" if isinstance(value, list) and len(value) > 3 else f"{key} {value}"
