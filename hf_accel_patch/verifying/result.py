"""What a verification has measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_accel_patch.comparison import Comparison
from hf_accel_patch.display import in_words

MISSING = "n/a"


@dataclass(frozen=True)
class VerifyResult(Comparison):
    """The measured facts of one verification. Prints as a table; `to_dict` is plain data for programs.

    `before` is the unpatched model, `after` the patched one. KL divergences are in nats, of the patched model's
    predictions where the unpatched one's are right. `padded` and `cached` compare a model with itself: what the
    unpatched one loses there is rounding. None: not measured.
    """

    model: str
    original: str  # where the unpatched model is from
    streamed: bool  # whether its weights were read from the disk for every call
    tokens: int  # on which predictions are compared
    windows: int  # that they came in
    top1_agreement: float  # share of tokens
    mean_kl: float
    max_kl: float  # of the worst token
    perplexity_before: float
    perplexity_after: float
    greedy_common: int  # tokens up to the first other one
    greedy_tokens: int  # that were generated
    padded_before: dict[str, float] | None  # `top1`, a share of tokens, and `max_kl`; the same in the three below
    padded_after: dict[str, float] | None
    cached_before: dict[str, float] | None
    cached_after: dict[str, float] | None
    weight_bytes_before: int
    weight_bytes_after: int
    peak_memory_bytes_before: int | None = None  # weights, and what running takes beside them
    peak_memory_bytes_after: int | None = None
    prefill_speed_before: float | None = None  # tokens per second
    prefill_speed_after: float | None = None
    speed_before: float | None = None  # tokens per second of decode
    speed_after: float | None = None
    remarks: tuple[str, ...] = ()  # why something is not measured, and what to know of it

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.01 is one percent. NaN where either is."""
        return self.perplexity_after / self.perplexity_before - 1

    def to_dict(self) -> dict[str, Any]:
        """The fields and `perplexity_increase`."""
        return asdict(self) | {"perplexity_increase": self.perplexity_increase, "remarks": list(self.remarks)}

    @property
    def title(self) -> str:
        return f"{self.model} compared with {self.original}: {self.tokens} tokens in {self.windows} windows"

    @property
    def sides(self) -> Sequence[str]:
        return "unpatched", "patched"

    @property
    def notes(self) -> Sequence[str]:
        return self.remarks

    def cells(self) -> Sequence[Sequence[str]]:
        increase = self.perplexity_increase
        more = f" ({increase:+.2%})" if math.isfinite(increase) else ""
        return (
            ("top-1 agreement", "", _percent(self.top1_agreement)),
            ("KL divergence, mean", "", f"{self.mean_kl:.2e}"),
            ("KL divergence, worst", "", f"{self.max_kl:.2e}"),
            ("perplexity", f"{self.perplexity_before:.4f}", f"{self.perplexity_after:.4f}{more}"),
            ("greedy tokens in common", "", f"{self.greedy_common} of {self.greedy_tokens}"),
            *_by_itself("padded or not", self.padded_before, self.padded_after),
            *_by_itself("cached or not", self.cached_before, self.cached_after),
            ("prefill, tokens/s", _number(self.prefill_speed_before), _number(self.prefill_speed_after)),
            ("decode, tokens/s", _number(self.speed_before), _number(self.speed_after)),
            ("weights", in_words(self.weight_bytes_before), in_words(self.weight_bytes_after)),
            ("peak memory", _bytes(self.peak_memory_bytes_before), _bytes(self.peak_memory_bytes_after)),
        )


def _by_itself(
    name: str, before: dict[str, float] | None, after: dict[str, float] | None
) -> tuple[tuple[str, str, str], ...]:
    sides = before, after
    top1, worst = (
        [MISSING if each is None else words(each[key]) for each in sides]
        for key, words in (("top1", _percent), ("max_kl", "{:.2e}".format))
    )
    return (f"{name}: top-1", top1[0], top1[1]), (f"{name}: worst KL", worst[0], worst[1])


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _bytes(value: int | None) -> str:
    return MISSING if value is None else in_words(value)
