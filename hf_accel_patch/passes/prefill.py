"""Prefill in chunks, for models whose attention stores all scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from hf_accel_patch.families import CHUNKABLE, View
from hf_accel_patch.journal import Journal
from hf_accel_patch.passes.attention import Attention
from hf_accel_patch.plan import Skip, Step

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Prefill:
    """Let `generate` read a long prompt in chunks: memory grows with chunk x length instead of length x length.

    transformers has this (`prefill_chunk_size`) and never uses it by itself. Here it is decided per call, on the
    configuration that `generate` makes for that call, so nothing is left in `generation_config` or in a saved
    checkpoint; calls that it does not fit (no cache, a static or quantized cache, assisted decoding) run as before.
    Used where attention is hand-written and stays so; the attention pass is linear in memory by itself. Outputs equal
    stock's up to floating-point rounding.
    """

    name = "prefill"

    def inspect(self, view: View) -> Step | Skip:
        size = view.weight_bytes()
        if view.attention_modules() or isinstance(Attention().inspect(view), Step):
            return Skip(self, "its attention is linear in memory without chunks", size)
        if view.config.model_type not in CHUNKABLE:
            return Skip(self, "reading its prompt in chunks is not known to be exact", size)
        facts = {"exact": True, "bytes_before": size, "bytes_after": size, "chunk_tokens": CHUNK_TOKENS}
        return Step(self, facts, (view.model,))

    def apply(self, step: Step, journal: Journal) -> None:
        (model,) = step.work
        journal.bind_method(model, "_prefill", _prefill)


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
    growing = type(model_kwargs.get("past_key_values")) is DynamicCache and model_kwargs.get("inputs_embeds") is None
    whole = generation_config.output_attentions or generation_config.output_hidden_states
    if generation_config.prefill_chunk_size is None and growing and not whole and input_ids.shape[1] > CHUNK_TOKENS:
        generation_config.prefill_chunk_size = CHUNK_TOKENS
    return type(self)._prefill(self, input_ids, generation_config, model_kwargs, *rest, **kw)
