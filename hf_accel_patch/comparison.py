"""Figures side by side: as text, as a table in a terminal (rich), as HTML in a notebook, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


class Comparison:
    """What is shown as a table with a name and one figure per side in each row. Subclasses give `title`, `columns`,
    `shown_rows` and `to_dict`."""

    @property
    def title(self) -> str:
        raise NotImplementedError

    @property
    def columns(self) -> Sequence[str]:
        """The heads of the columns, that of the names included."""
        raise NotImplementedError

    def shown_rows(self) -> Sequence[Sequence[str]]:
        raise NotImplementedError

    @property
    def notes(self) -> Sequence[str]:
        """Lines below the table."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json(self) -> str:
        """`to_dict`, as text; what is no finite number is null there."""
        return json.dumps(_finite(self.to_dict()), indent=2)

    def __str__(self) -> str:
        rows = [self.columns, *self.shown_rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.columns))]
        lines = []
        for name, *figures in rows:
            cells = [f"{name:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(figures, widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([self.title, *lines, *self.notes])

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        shown = Table(
            title=Text(self.title),
            title_justify="left",
            title_style="bold",
            caption=Text("\n".join(self.notes)) if self.notes else None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for number, name in enumerate(self.columns):
            shown.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in self.shown_rows():
            shown.add_row(*map(Text, row))
        return shown

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.shown_rows()
        )
        below = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<p><b>{escape(self.title)}</b></p>{table}{below}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
