"""`patch(model, context=TOKENS)`: positions for so many tokens, by whatever a model needs for that."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass

from hf_accel_patch.errors import HfAccelError, UnsupportedModel
from hf_accel_patch.families import View, context_tokens
from hf_accel_patch.families.positions import has_alibi, length_limit, uses_learned_positions
from hf_accel_patch.journal import Journal
from hf_accel_patch.passes.rope import Changes, Frequencies, write
from hf_accel_patch.passes.scaling import RopeScaling
from hf_accel_patch.passes.self_extend import SelfExtend
from hf_accel_patch.plan import Pass, Skip, Step


@dataclass(frozen=True)
class Context:
    """Positions for texts of `tokens`.

    A model that was trained on as many stays as it is. Rotary positions are scaled by YaRN, with the least whole factor
    that reaches so far: of the methods that cost nothing and that a saved checkpoint can hold, it has the lowest
    perplexity at the full length (benchmarks/long_context.py). Where a configuration does not take it, SelfExtend does,
    if `attention` is ours and the cache exact. ALiBi needs no scaling, and its limit, where there is one, is lifted. A
    method that was given wins, if it reaches so far.
    """

    tokens: int
    given: Frequencies | SelfExtend
    attention: bool = True  # whether it may be replaced

    name = "rope"

    def inspect(self, view: View) -> Step | Skip:
        """Raises UnsupportedModel, for what was asked for by name, and ValueError for a method that does not reach."""
        view.expect(self.tokens)
        trained = context_tokens(view.config)
        if self.given.scaling is not None:
            return self._as_given(view, self.given.scaling, trained)
        if has_alibi(view.config):
            return self._without_limit(view)
        if trained is None or trained >= self.tokens:
            reason = (
                f"it is trained on {trained} tokens" if trained else "nothing in its configuration limits its length"
            )
            return Skip(self, f"{reason}: no scaling is needed for context={self.tokens}", view.weight_bytes())
        if uses_learned_positions(view):
            raise self._unsupported(
                f"it has learned a vector for each of {trained} positions, and none for those beyond them"
            )
        return self._scaled(view, trained)

    def apply(self, step: Step, journal: Journal) -> None:
        changes: Changes = step.work[0]
        write(changes, journal)

    def _as_given(self, view: View, scaling: RopeScaling, trained: int | None) -> Step | Skip:
        decision = self.given.inspect(view)
        if isinstance(decision, Step) and (reach := decision.facts["context"]) < self.tokens:
            least = math.ceil(self.tokens / (scaling.original or trained or reach))
            raise ValueError(
                f"rope={scaling.type!r} with factor {scaling.factor:g} reaches {reach} tokens of "
                f"context={self.tokens}; it takes a factor of {least}"
            )
        return decision

    def _without_limit(self, view: View) -> Step | Skip:
        """Biases of the scores go on for ever, but a configuration may say where they end."""
        reason, name = "its positions are biases of the scores (ALiBi): no scaling is needed", length_limit(view.config)
        size, tokenizer = view.weight_bytes(), view.tokenizer
        changes = Changes(view, view.config, context=self.tokens)
        if name is not None and getattr(view.config, name) < self.tokens:
            changes.config = copy.copy(view.config)
            setattr(changes.config, name, self.tokens)
        elif tokenizer is None or tokenizer.model_max_length >= self.tokens:
            return Skip(self, reason, size)
        facts = {"exact": True, "bytes_before": size, "bytes_after": size, "context": self.tokens, "length": reason}
        return Step(self, facts, (changes,))

    def _scaled(self, view: View, trained: int) -> Step | Skip:
        factor = float(math.ceil(self.tokens / trained))
        packed = self.given.packed if isinstance(self.given, Frequencies) else ""
        ways: list[Pass] = [Frequencies(RopeScaling("yarn", factor), packed)]
        if self.attention and not packed:
            ways.append(SelfExtend(RopeScaling("self-extend", factor)))
        refused = []
        for way in ways:
            try:
                decision = way.inspect(view)
            except UnsupportedModel as error:
                refused.append(error)
            else:
                assert isinstance(decision, Step)  # what is asked for by name is done or refused
                facts = decision.facts | {"chosen": f"for context={self.tokens}"}
                return dataclasses.replace(decision, facts=facts)
        raise self._unsupported(str(refused[0]).partition("\n")[0].partition(": ")[2]) from refused[0]

    def _unsupported(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(f"context={self.tokens}: {reason}", "leave context out")


@dataclass(frozen=True)
class Unscaled:
    """The repairs of `Frequencies`, where nothing scales positions after all."""

    rope: Context  # what may scale them
    repairs: Frequencies

    name = "frequencies"

    def inspect(self, view: View) -> Step | Skip:
        try:
            scaled = isinstance(self.rope.inspect(view), Step)
        except (HfAccelError, ValueError):  # which the row of the scaling says
            scaled = False
        if scaled:
            return Skip(self, "they are those of rope", view.weight_bytes())
        return dataclasses.replace(self.repairs.inspect(view), by=self)

    def apply(self, step: Step, journal: Journal) -> None:
        self.repairs.apply(step, journal)
