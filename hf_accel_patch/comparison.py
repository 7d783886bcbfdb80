"""Figures side by side."""

from __future__ import annotations

from collections.abc import Sequence

from hf_accel_patch.display import Column, Tabular


class Comparison(Tabular):
    """A table with a name and one figure per side in each row. Subclasses give `title`, `sides`, `cells` and `to_dict`.

    What belongs side by side is printed so, however narrow a terminal is.
    """

    @property
    def sides(self) -> Sequence[str]:
        """The heads of the columns of figures."""
        raise NotImplementedError

    @property
    def columns(self) -> Sequence[Column]:
        return (Column(""), *(Column(side, figures=True) for side in self.sides))

    def __str__(self) -> str:
        return self.text()
