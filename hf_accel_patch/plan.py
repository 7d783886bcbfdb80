"""What would be done, as values: passes decide in `inspect`, and only then write in `apply`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_accel_patch.families import View
from hf_accel_patch.journal import Journal

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


@dataclass(frozen=True)
class Plan:
    """The decisions for one model, in the order in which they are carried out. Prints as a table."""

    subject: str
    decisions: tuple[Step | Skip, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(decision for decision in self.decisions if isinstance(decision, Step))

    @property
    def skips(self) -> tuple[Skip, ...]:
        return tuple(decision for decision in self.decisions if isinstance(decision, Skip))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"model": ..., "passes": [{"pass": "quantize", "exact": False, ...}, ...]}`."""
        return {"model": self.subject, "passes": [described(decision) for decision in self.decisions]}

    def __str__(self) -> str:
        return table(f"plan for {self.subject}", self.to_dict()["passes"])


def build(view: View, passes: Iterable[Pass]) -> Plan:
    """Ask every pass. Nothing is written."""
    return Plan(view.subject, tuple(each.inspect(view) for each in passes))


def described(decision: Step | Skip) -> dict[str, Any]:
    """One decision as plain data."""
    if isinstance(decision, Step):
        return {"pass": decision.by.name, **decision.facts}
    same = {"bytes_before": decision.bytes_now, "bytes_after": decision.bytes_now}
    return {"pass": decision.by.name, "exact": True, **same, "reason": decision.reason}


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, one line per pass: its name, on or skipped, exact or not, bytes, what else it says."""
    hidden = ("pass", "exact", "reason", "bytes_before", "bytes_after")
    cells = [("pass", "state", "output", "bytes", "")]
    for row in rows:
        said = row.get("reason") or ", ".join(
            _fact(key, row[key]) for key in row if key not in hidden and row[key] != []
        )
        before, after = row["bytes_before"], row["bytes_after"]
        size = f"{in_words(before)} -> {in_words(after)}" if before != after else "same"
        on = "reason" not in row
        cells.append((row["pass"], "on" if on else "skipped", _output(row) if on else "", size if on else "", said))
    widths = [max(len(cell[column]) for cell in cells) for column in range(4)]
    lines = ["  ".join(f"{text:<{width}}" for text, width in zip(cell, widths, strict=False)) for cell in cells]
    return "\n".join([title, *(f"{line}  {cell[4]}".rstrip() for line, cell in zip(lines, cells, strict=True))])


def in_words(size_bytes: int) -> str:
    """1_234_567 -> '1.23 MB'."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= divisor:
            return f"{size_bytes / divisor:.2f} {unit}"
    return f"{size_bytes} B"


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


def _output(row: dict[str, Any]) -> str:
    return "exact" if row["exact"] else "changed"


def _fact(key: str, value: Any) -> str:
    """A long list is counted; `to_dict` has it whole."""
    return f"{len(value)} {key}" if isinstance(value, list) and len(value) > 3 else f"{key} {value}"
