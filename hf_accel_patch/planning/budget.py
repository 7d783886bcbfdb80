"""A memory budget: of what could be done, the least lossy that fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_accel_patch.errors import HfAccelError, UnsupportedModel
from hf_accel_patch.families import View
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.passes import GQA, Context, KVCache, Quantize
from hf_accel_patch.plan import Pass, Skip, Step, inspected
from hf_accel_patch.planning.memory import Estimates, Size, tokens_of

COUNTED = (GQA, KVCache, Context)  # the passes that a size asks, and that may refuse a model
MOST_TOKENS = 8192  # that a budget is for where no context is given: long contexts are seldom used in full


@dataclass(frozen=True)
class Candidate:
    """One thing that could be done: what it is, in words, and the passes that do it."""

    label: str
    exact: bool
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Budget:
    """What was asked for: bytes for the weights, the cache and the activations of `batch` sequences of `tokens`, and
    what may be done to stay below, from the least lossy on. It stands before the passes that hold whatever is chosen.
    """

    limit: int  # bytes
    tokens: int | None  # None: what the model was made for, at most MOST_TOKENS
    batch: int
    candidates: tuple[Candidate, ...] = field(repr=False)
    keeps: bool = False  # whether originals are kept, so that quantizing frees nothing

    name = "budget"

    def inspect(self, view: View) -> Step | Skip:
        raise NotImplementedError("a budget is replaced by what fits into it before passes are asked")

    def apply(self, step: Step, journal: Journal) -> None:
        raise NotImplementedError("a budget is replaced by what fits into it before passes are asked")

    def counted(self, view: View) -> int:
        """Tokens."""
        return self.tokens or min(tokens_of(view, None), MOST_TOKENS)


@dataclass(frozen=True)
class Chosen:
    """What a budget has decided, as a row of plans and reports. It changes nothing itself."""

    facts: tuple[tuple[str, Any], ...]

    name = "budget"

    def inspect(self, view: View) -> Step | Skip:
        return Step(self, dict(self.facts), of_weights=False)

    def apply(self, step: Step, journal: Journal) -> None:
        """Nothing: the passes after it do what was decided."""


@dataclass(frozen=True)
class Refused:
    """In the place of a pass that a model cannot have, in whatever a lenient budget chooses."""

    name: str
    reason: str

    def inspect(self, view: View) -> Step | Skip:
        return Skip(self, self.reason, view.weight_bytes(), refused=True)

    def apply(self, step: Step, journal: Journal) -> None:
        raise NotImplementedError(f"{self.name} is refused, and never plans a step")


def fitted(
    view: View,
    passes: tuple[Pass, ...],
    estimates: Estimates | None = None,
    *,
    quantized: bool = False,
    lenient: bool = False,
) -> tuple[Pass, ...]:
    """The passes themselves; or, if a budget stands before them, what it decides for this model and the passes that it
    has chosen. `quantized`: the weights came quantized and stay as they are. `lenient`: a pass that the user has asked
    for and this model cannot have is refused in a row of its own, and the others are chosen without it.

    Raises HfAccelError where nothing fits, naming the smallest size that can be reached; UnsupportedModel where the
    model cannot have what the user has asked for.
    """
    budget = passes[0] if passes else None
    if not isinstance(budget, Budget):
        return passes
    estimates = estimates or Estimates(view, budget.counted(view), budget.batch)
    fixed = quantized or any(isinstance(module, QuantizedModule) for _, module in view.named_modules())
    tried: list[tuple[Candidate, Size]] = []
    for each in _possible(view, budget.candidates) if lenient else budget.candidates:
        if fixed and each.label.startswith("weights"):
            continue
        try:
            size = estimates.of(one for one in each.passes if not (quantized and isinstance(one, Quantize)))
        except UnsupportedModel:
            if not tried:  # what the user himself has asked for
                raise
            continue
        if size.peak <= budget.limit:
            return Chosen(_facts(budget, each, size, tried, estimates)), *each.passes
        tried.append((each, size))
    raise _too_small(view, budget, tried, estimates)


def _possible(view: View, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates without what the first of them, which is what the user has asked for, cannot have."""
    decided = [inspected(each, view, lenient=True) for each in candidates[0].passes if isinstance(each, COUNTED)]
    refused = {
        each.by.name: Refused(each.by.name, each.reason) for each in decided if isinstance(each, Skip) and each.refused
    }
    return tuple(replace(each, passes=tuple(refused.get(one.name, one) for one in each.passes)) for each in candidates)


def _facts(
    budget: Budget, chosen: Candidate, size: Size, tried: Sequence[tuple[Candidate, Size]], estimates: Estimates
) -> tuple[tuple[str, Any], ...]:
    first, exact = tried[0][1] if tried else size, chosen.exact and not _scaled(estimates.view, chosen.passes)
    if chosen.exact and not exact:
        tried = [(_not_exact(each), needed) for each, needed in tried]
        chosen = _not_exact(chosen)
    facts: dict[str, Any] = {"exact": exact, "bytes_before": first.peak, "bytes_after": size.peak}
    others = ", ".join(f"{each.label} needs {in_binary(needed.peak)}" for each, needed in _telling(tried))
    why = f"{others}; " if others else ""
    facts |= {"chosen": chosen.label, "why": f"{why}{chosen.label} needs {in_binary(size.peak)}"}
    facts |= {"budget_bytes": budget.limit, "context": estimates.tokens}
    facts |= {"batch": estimates.batch} if estimates.batch > 1 else {}
    facts |= {"weight_bytes": size.weights, "cache_bytes": size.cache, "activation_bytes": size.activations}
    return tuple((facts | ({"rule_of_thumb": estimates.problem} if estimates.problem else {})).items())


def _scaled(view: View, passes: tuple[Pass, ...]) -> bool:
    """Whether `context=` changes positions."""
    asked = next((each for each in passes if isinstance(each, Context)), None)
    decided = asked.inspect(view) if asked is not None else None
    return isinstance(decided, Step) and not decided.facts["exact"]


def _not_exact(candidate: Candidate) -> Candidate:
    label = candidate.label.replace("exact", "what was asked for", 1) if candidate.exact else candidate.label
    return replace(candidate, label=label, exact=False)


def _telling(tried: Sequence[tuple[Candidate, Size]]) -> list[tuple[Candidate, Size]]:
    """The first that did not fit, and the last."""
    return [*tried[:1], *tried[1:][-1:]]


def _too_small(
    view: View, budget: Budget, tried: Sequence[tuple[Candidate, Size]], estimates: Estimates
) -> HfAccelError:
    least, size = min(tried, key=lambda pair: pair[1].peak)
    counted = f"{estimates.tokens} tokens" + (f" of {estimates.batch} sequences" if estimates.batch > 1 else "")
    kept = ", since the originals of quantized weights would be kept beside the codes" if budget.keeps else ""
    parts = f"weights {in_binary(size.weights)}, cache {in_binary(size.cache)}"
    parts += f", activations {in_binary(size.activations)}"
    return HfAccelError(
        f"budget={in_binary(budget.limit)} is too small for {view.subject}: it needs at least {in_binary(size.peak)} "
        f"({size.peak} bytes) for {counted}, with {least.label} ({parts}){kept}",
        "give a larger budget, or fewer tokens with context=",
    )


def in_binary(size_bytes: int) -> str:
    """1610612736 -> '1.50 GiB'. Rounded up, so that what is named is enough."""
    for unit, divisor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= divisor:
            return f"{math.ceil(100 * size_bytes / divisor) / 100:.2f} {unit}"
    return f"{size_bytes} bytes"
