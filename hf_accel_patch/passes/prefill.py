"""Prefill in pieces, for attention that stores all scores and for experts that repeat the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from hf_accel_patch.compat import CACHE
from hf_accel_patch.families import CHUNKABLE, View
from hf_accel_patch.families.weights import linear_weights
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.experts import Routed, in_pieces
from hf_accel_patch.passes.attention import Attention
from hf_accel_patch.passes.quantize import Quantize
from hf_accel_patch.plan import Skip, Step

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Prefill:
    """What a long prompt takes in memory, where it is not attention that is linear by itself.

    Experts under transformers' contract take some tokens at a time, in every forward without gradients: stock repeats
    all tokens for each of their experts, and holds the hidden features of all of them. Quantized experts go one by one
    and stay as they are.

    Where attention is hand-written and stays so, `generate` reads a prompt in chunks, so that memory grows with chunk x
    length instead of length x length. transformers has this (`prefill_chunk_size`) and never uses it by itself. Here it
    is decided per call, on the configuration that `generate` makes for that call, so nothing is left in
    `generation_config` or in a saved checkpoint; calls that it does not fit (no cache, a static or quantized cache,
    assisted decoding) run as before.

    Outputs equal stock's up to floating-point rounding.
    """

    besides: Quantize | None = None  # whose experts are not float any more

    name = "prefill"

    def inspect(self, view: View) -> Step | Skip:
        size = view.weight_bytes()
        facts: dict[str, Any] = {"exact": True, "bytes_before": size, "bytes_after": size}
        experts = self._experts(view)
        if experts:
            facts["modules"] = len(experts)
        linear = bool(view.attention_modules()) or isinstance(Attention().inspect(view), Step)
        chunks = not linear and view.config.model_type in CHUNKABLE
        if chunks:
            facts["chunk_tokens"] = CHUNK_TOKENS
        if experts or chunks:
            return Step(self, facts, (view.model if chunks else None, experts))
        if linear:
            return Skip(self, "its attention is linear in memory without chunks", size)
        return Skip(self, "reading its prompt in chunks is not known to be exact", size)

    def apply(self, step: Step, journal: Journal) -> None:
        model, experts = step.work
        for module, routed in experts:
            journal.set_attribute(module, "routed", routed)
            kind: Any = type(module)
            journal.change_class(module, in_pieces(kind))
        if model is not None:
            journal.bind_method(model, "_prefill", _prefill)

    def _experts(self, view: View) -> list[tuple[nn.Module, Routed]]:
        """The modules of float experts, each with what the size of a piece depends on."""
        taken, found = self.besides.modules(view) if self.besides else set(), []
        for _, module in view.named_modules():
            known = linear_weights(module) if module not in taken else ""
            if not isinstance(known, str) and known[0] == "experts":
                into = known[1][0]
                found.append((module, Routed(into.experts, sum(into.shape))))
        return found


def _prefill(
    self: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: Any,
    *rest: Any,
    **kw: Any,
) -> Any:
    """`generate`'s own prefill, told to go in chunks if the prompt is long, the cache can grow, and nobody asked for
    what only the whole prompt at once returns."""
    growing = type(model_kwargs.get(CACHE)) is DynamicCache and model_kwargs.get("inputs_embeds") is None
    whole = generation_config.output_attentions or generation_config.output_hidden_states
    if generation_config.prefill_chunk_size is None and growing and not whole and input_ids.shape[1] > CHUNK_TOKENS:
        generation_config.prefill_chunk_size = CHUNK_TOKENS
    return type(self)._prefill(self, input_ids, generation_config, model_kwargs, *rest, **kw)
