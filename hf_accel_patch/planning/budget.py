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
from hf_accel_patch.passes import GQA, Context, KVCache, Prefill, Quantize
from hf_accel_patch.passes.prefill import CHUNKS
from hf_accel_patch.plan import Pass, Skip, Step, inspected
from hf_accel_patch.planning.memory import Estimates, Size, tokens_of

COUNTED = (GQA, KVCache, Context)  # the passes that a size asks, and that may refuse a model
CHANGING = ("gqa", "rope", "quantize", "cache")  # the names of passes that may change outputs
POSITIONS = ("rope", "frequencies")
MOST_TOKENS = 8192  # that a budget is for where no context is given: long contexts are seldom used in full


@dataclass(frozen=True)
class Candidate:
    """One thing that could be done: what it is, in words, and the passes that do it. `exact`: nothing is chosen that
    changes outputs, whatever the user has asked for."""

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
    candidates = _possible(view, budget.candidates) if lenient else budget.candidates
    if not _exact(view, candidates[0].passes, quantized=quantized, lenient=lenient):
        candidates = tuple(map(_not_exact, candidates))
    tried: list[tuple[Candidate, Size]] = []
    hopeless: list[Candidate] = []  # in the smallest pieces: weights and cache do not fit

    def size(candidate: Candidate) -> Size:
        return estimates.of(one for one in candidate.passes if not (quantized and isinstance(one, Quantize)))

    for each in candidates:
        if fixed and each.label.startswith("weights"):
            continue
        try:
            needed = size(each)
        except UnsupportedModel:
            if not tried:  # what the user himself has asked for
                raise
            continue
        tried.append((each, needed))
        if needed.peak <= budget.limit:
            break
        ways = _in_pieces(view, each, estimates.tokens)
        if needed.weights + needed.cache > budget.limit:
            hopeless += ways[-1:]
            continue
        tried += [(way, size(way)) for way in ways[-1:]]
        if tried[-1][1].peak <= budget.limit:
            tried[-1] = next(pair for way in ways if (pair := (way, size(way)))[1].peak <= budget.limit)
            break
    else:
        raise _too_small(view, budget, [*tried, *((each, size(each)) for each in hopeless)], estimates)
    *before, (chosen, needed) = tried
    return Chosen(_facts(budget, chosen, needed, before, estimates)), *chosen.passes


def _possible(view: View, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates without what the first of them, which is what the user has asked for, cannot have."""
    decided = [inspected(each, view, lenient=True) for each in candidates[0].passes if isinstance(each, COUNTED)]
    refused = {
        each.by.name: Refused(each.by.name, each.reason) for each in decided if isinstance(each, Skip) and each.refused
    }
    return tuple(replace(each, passes=tuple(refused.get(one.name, one) for one in each.passes)) for each in candidates)


def _exact(view: View, passes: Sequence[Pass], *, quantized: bool, lenient: bool) -> bool:
    """Whether none of what the user has asked for changes outputs, on this model."""
    decided = (
        inspected(each, view, lenient=lenient)
        for each in passes
        if each.name in CHANGING and not (quantized and isinstance(each, Quantize))
    )
    return all(each.facts["exact"] for each in decided if isinstance(each, Step))


def _in_pieces(view: View, candidate: Candidate, tokens: int) -> list[Candidate]:
    """The same with prompts in pieces, from the largest on; nothing where these are not known to be the same function:
    pieces of a prompt would have frequencies of their own, or be read through a window with sinks."""
    prefill = next((each for each in candidate.passes if isinstance(each, Prefill)), None)
    if prefill is None or any(isinstance(each, KVCache) and each.kind == "sinks" for each in candidate.passes):
        return []
    positions = (inspected(each, view, lenient=True) for each in candidate.passes if each.name in POSITIONS)
    if any(isinstance(each, Step) and "by_length" in each.facts for each in positions):
        return []
    found, now = [], prefill.chunk(view) or tokens
    for chunk in CHUNKS:
        smaller = replace(prefill, chunk_tokens=chunk)
        if chunk < min(now, tokens) and smaller.chunk(view) == chunk:
            passes = tuple(smaller if each is prefill else each for each in candidate.passes)
            label = f"{candidate.label}, prompts in pieces of {chunk}"
            found.append(replace(candidate, label=label, passes=passes))
    return found


def _facts(
    budget: Budget, chosen: Candidate, size: Size, tried: Sequence[tuple[Candidate, Size]], estimates: Estimates
) -> tuple[tuple[str, Any], ...]:
    first = tried[0][1] if tried else size
    facts: dict[str, Any] = {"exact": chosen.exact, "bytes_before": first.peak, "bytes_after": size.peak}
    others = ", ".join(f"{each.label} needs {in_binary(needed.peak)}" for each, needed in _telling(tried))
    why = f"{others}; " if others else ""
    facts |= {"chosen": chosen.label, "why": f"{why}{chosen.label} needs {in_binary(size.peak)}"}
    prefill = next((each for each in chosen.passes if isinstance(each, Prefill)), None)
    if prefill is not None and prefill.chunk_tokens is not None:
        facts |= {"chunk_tokens": prefill.chunk_tokens, "holds_for": "generate"}
    facts |= {"budget_bytes": budget.limit, "context": estimates.tokens}
    facts |= {"batch": estimates.batch} if estimates.batch > 1 else {}
    facts |= {"weight_bytes": size.weights, "cache_bytes": size.cache, "activation_bytes": size.activations}
    return tuple((facts | ({"rule_of_thumb": estimates.problem} if estimates.problem else {})).items())


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
