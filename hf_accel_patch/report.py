"""What was done to a model, in measured numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_accel_patch.display import Shown


@dataclass(frozen=True)
class Report(Shown):
    """The facts of one patched model, pass by pass. Prints as a table; `to_dict` is plain data for programs."""

    subject: str
    rows: tuple[dict[str, Any], ...]
    incomplete: str = ""  # what an exception left half done, where the originals were already discarded
    discarded: tuple[str, ...] = ()  # names of the weights that this has changed for good

    @property
    def title(self) -> str:
        return self.subject if self.rows else f"{self.subject} is not patched"

    def shown_rows(self) -> tuple[dict[str, Any], ...]:
        return self.rows

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"incomplete: {self.incomplete}",) if self.incomplete else ()

    def to_dict(self) -> dict[str, Any]:
        """`{"model": ..., "patched": ..., "passes": [{"pass": ..., "exact": ..., "bytes_before": ...}, ...]}`; after a
        failure half way also "incomplete", what it was, and "discarded", the weights that are changed for good."""
        described: dict[str, Any] = {"model": self.subject, "patched": bool(self.rows), "passes": list(self.rows)}
        return described | (
            {"incomplete": self.incomplete, "discarded": list(self.discarded)} if self.incomplete else {}
        )
