"""What would be done, as values: passes decide in `inspect`, and only then write in `apply`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_accel_patch.display import Shown
from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.families import View
from hf_accel_patch.journal import Journal

ON = "it is on already"
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Pass(Protocol):
    """One feature. Its fields are its options; undo is the journal's."""

    @property
    def name(self) -> str: ...

    def inspect(self, view: View) -> Step | Skip:
        """Decide what would be done. Reads the model only. Raises UnsupportedModel where the pass was asked for by
        name and this model cannot have it."""
        ...

    def apply(self, step: Step, journal: Journal) -> None:
        """Do it, through the journal only."""
        ...


@dataclass(frozen=True)
class Step:
    """A pass that will run. `facts` is plain data for the report; `work` is the pass's own list of what to change."""

    by: Pass
    facts: dict[str, Any]
    work: Sequence[Any] = field(default=(), repr=False)
    reshapes: bool = False  # whether the passes after it have to look at the model again
    of_weights: bool = True  # whether the bytes in `facts` are those of the model's weights, measured when it is done


@dataclass(frozen=True)
class Skip:
    """A pass that will not run, and why, in words for its user."""

    by: Pass
    reason: str
    bytes_now: int = 0
    refused: bool = False  # asked for by name, and this model cannot have it


@dataclass(frozen=True)
class Plan(Shown):
    """The decisions for one model, in the order in which they are carried out. Prints as a table."""

    subject: str
    decisions: tuple[Step | Skip, ...]
    memory: Any = None  # a planning.overview.Memory: what it takes, and what would take less

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(decision for decision in self.decisions if isinstance(decision, Step))

    @property
    def skips(self) -> tuple[Skip, ...]:
        return tuple(decision for decision in self.decisions if isinstance(decision, Skip))

    @property
    def title(self) -> str:
        return f"plan for {self.subject}"

    def shown_rows(self) -> tuple[dict[str, Any], ...]:
        return tuple(described(decision) for decision in self.decisions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"model": ..., "passes": [{"pass": "quantize", "exact": False, ...}, ...], "memory": {...}}`."""
        found: dict[str, Any] = {"model": self.subject, "passes": list(self.shown_rows())}
        return found if self.memory is None else found | {"memory": self.memory.to_dict()}

    def text(self) -> str:
        return super().text() if self.memory is None else f"{super().text()}\n\n{self.memory.text()}"

    def __rich__(self) -> Any:
        from rich.console import Group

        return super().__rich__() if self.memory is None else Group(super().__rich__(), "", self.memory)

    def _repr_html_(self) -> str:
        return super()._repr_html_() + ("" if self.memory is None else self.memory._repr_html_())


def build(view: View, passes: Iterable[Pass], *, lenient: bool = False) -> Plan:
    """Ask every pass. Nothing is written."""
    return Plan(view.subject, tuple(inspected(each, view, lenient=lenient) for each in passes))


def on_already(view: View, passes: Iterable[Pass], rows: Iterable[dict[str, Any]]) -> Plan:
    """Nothing to do, for a model of which these are the rows of its report: each pass is on, or was left out."""
    by, size = {each.name: each for each in passes}, view.weight_bytes()
    return Plan(view.subject, tuple(Skip(by[row["pass"]], row.get("reason", ON), size) for row in rows))


def inspected(by: Pass, view: View, *, lenient: bool = False) -> Step | Skip:
    """Ask one pass. `lenient`: one that this model cannot have is a Skip, though it was asked for by name."""
    try:
        return by.inspect(view)
    except (HfAccelError, ValueError) as error:
        if not lenient:
            raise
        return Skip(by, str(error).partition("\n\nhint: ")[0], view.weight_bytes(), refused=True)


def described(decision: Step | Skip) -> dict[str, Any]:
    """One decision as plain data."""
    if isinstance(decision, Step):
        return {"pass": decision.by.name, **decision.facts}
    same = {"bytes_before": decision.bytes_now, "bytes_after": decision.bytes_now}
    return {"pass": decision.by.name, "exact": True, **same, "reason": decision.reason}


def size_in_bytes(size: int | str) -> int:
    """2147483648 or "2GiB" as bytes. Raises ValueError."""
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?[iI]?[bB]?)\s*", size)
        if found is None or found[2].upper() not in UNITS:
            raise ValueError(f"a size of {size!r}; give a number of bytes, or a text such as '2GiB' or '500MB'")
        size = int(float(found[1]) * UNITS[found[2].upper()])
    if size <= 0:
        raise ValueError(f"a size of {size} bytes; give a positive one")
    return size
