"""How plans and reports are shown: as lines, as a table in a terminal (rich), as HTML in a notebook."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("pass", "state", "output", "bytes", "")
HIDDEN = ("pass", "exact", "reason", "bytes_before", "bytes_after")  # have columns of their own
Cells = tuple[str, str, str, str, str]


class Shown:
    """What is shown as a table with one row per pass. Subclasses give `title`, `shown_rows` and `to_dict`."""

    @property
    def title(self) -> str:
        raise NotImplementedError

    def shown_rows(self) -> Sequence[dict[str, Any]]:
        raise NotImplementedError

    @property
    def notes(self) -> Sequence[str]:
        """Lines below the table."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json(self) -> str:
        """`to_dict`, as text."""
        return json.dumps(self.to_dict(), indent=2)

    def lines(self) -> Iterator[str]:
        """One line per pass, for logs."""
        for name, state, output, size, said in map(cells, self.shown_rows()):
            yield f"{name}: {', '.join(part for part in (state, output, size, said) if part)}"

    def __str__(self) -> str:
        """Fitted to the terminal, where there is one; else one line per pass, for files and programs."""
        rows = self.shown_rows()
        if not rows:
            return self.title
        if not sys.stdout.isatty():
            return "\n".join([self.title, *_aligned([COLUMNS, *map(cells, rows)]), *self.notes])
        return in_terminal(self)

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
        for name in COLUMNS:
            shown.add_column(name, no_wrap=bool(name))
        for row in self.shown_rows():
            shown.add_row(*map(Text, cells(row)), style="dim" if "reason" in row else None)
        return shown

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row)) + "</tr>" for row in self.shown_rows()
        )
        below = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        shown = (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}" if self.shown_rows() else ""
        )
        return f"<p><b>{escape(self.title)}</b></p>{shown}"


def cells(row: dict[str, Any]) -> Cells:
    """One pass: its name, on or skipped, exact or changed, bytes, what else it says."""
    if "reason" in row:
        return row["pass"], "skipped", "", "", row["reason"]
    before, after = row["bytes_before"], row["bytes_after"]
    size = f"{in_words(before)} -> {in_words(after)}" if before != after else "same"
    said = ", ".join(_fact(key, row[key]) for key in row if key not in HIDDEN and row[key] != [])
    return row["pass"], "on", "exact" if row["exact"] else "changed", size, said


def in_terminal(shown: Any) -> str:
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


def _aligned(rows: Sequence[Cells]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)] + [0]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _fact(key: str, value: Any) -> str:
    """A long list is counted; `to_dict` has it whole. Bytes are put in words."""
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{key.removesuffix('_bytes')} {in_words(value)}"
    return f"{len(value)} {key}" if isinstance(value, list) and len(value) > 3 else f"{key} {value}"
