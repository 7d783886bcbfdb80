"""What an uptraining has measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_accel_patch.comparison import Comparison


@dataclass(frozen=True)
class Uptrained(Comparison):
    """The measured facts of one run. Prints as a table; `to_dict` is plain data for programs.

    Losses are nats per token on `held_out_tokens` tokens that were not trained on. `loss_original` is that of the model
    before it was converted, None where it was not given.
    """

    model: str
    steps: int
    resumed_at: int  # the step at which this process took up a run, 0 for one from the start
    tokens: int  # trained on, in all steps and processes
    seconds: float  # in all steps, those before a resumption included
    processes: int
    parameters: int  # trained
    held_out_tokens: int
    loss_before: float
    loss_after: float
    loss_original: float | None = None

    @property
    def recovered(self) -> float | None:
        """The share of the lost loss that is back; None where it is not known what was lost, or nothing was."""
        lost = self.loss_before - self.loss_original if self.loss_original is not None else 0.0
        return (self.loss_before - self.loss_after) / lost if lost > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """The fields and `recovered`."""
        return asdict(self) | {"recovered": self.recovered}

    @property
    def title(self) -> str:
        parts = [f"{self.steps} steps", f"{self.tokens} tokens", f"{self.seconds:.0f} s"]
        parts += [f"{self.processes} processes"] if self.processes > 1 else []
        parts += [f"resumed at step {self.resumed_at}"] if self.resumed_at else []
        return f"uptrained {self.model}: {', '.join(parts)}"

    @property
    def sides(self) -> Sequence[str]:
        return "loss", "perplexity"

    def cells(self) -> Sequence[Sequence[str]]:
        rows = (("original", self.loss_original), ("before", self.loss_before), ("after", self.loss_after))
        return [(name, f"{loss:.3f}", f"{math.exp(loss):.2f}") for name, loss in rows if loss is not None]

    @property
    def notes(self) -> Sequence[str]:
        share = [] if self.recovered is None else [f"{self.recovered:.0%} of the lost loss is recovered"]
        return [*share, f"measured on {self.held_out_tokens} tokens that were not trained on"]
