"""Prompts in pieces: for attention that stores all scores, for experts that repeat the tokens, and for a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from hf_accel_patch.compat import CACHE
from hf_accel_patch.families import View
from hf_accel_patch.families.chunkable import CHUNKABLE
from hf_accel_patch.families.weights import linear_weights
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.experts import Routed, in_pieces
from hf_accel_patch.passes.attention import Attention
from hf_accel_patch.passes.prefixes import PLAIN
from hf_accel_patch.passes.quantize import Quantize
from hf_accel_patch.plan import Skip, Step

CHUNK_TOKENS = 1024  # where attention stores all scores
CHUNKS = (4096, 2048, 1024, 512, 256)  # tokens; of these a budget takes the largest that fits


@dataclass(frozen=True)
class Prefill:
    """What a long prompt takes in memory, where it is not attention that is linear by itself.

    Experts under transformers' contract take some tokens at a time, in every forward without gradients: stock repeats
    all tokens for each of their experts, and holds the hidden features of all of them. Quantized experts go one by one
    and stay as they are.

    `generate` reads a prompt in chunks where attention is hand-written and stays so, so that memory grows with chunk x
    length instead of length x length; and where a budget asks for it, with `chunk_tokens`: then what is alive beside
    weights and cache is that of a chunk. transformers has this (`prefill_chunk_size`) and never uses it by itself. Here
    it is decided per call, on the configuration that `generate` makes for that call, so nothing is left in
    `generation_config` or in a saved checkpoint; calls that it does not fit (no cache, a static or quantized cache of
    transformers', assisted decoding, inputs beside the tokens) run as before.

    Outputs equal stock's up to floating-point rounding. With a quantized cache a chunk reads the ones before it from
    there, where a whole prompt attends to itself in full precision.
    """

    besides: Quantize | None = None  # whose experts are not float any more
    chunk_tokens: int | None = None  # None: as attention needs it

    name = "prefill"

    def inspect(self, view: View) -> Step | Skip:
        size = view.weight_bytes()
        facts: dict[str, Any] = {"exact": True, "bytes_before": size, "bytes_after": size}
        experts, chunk = self._experts(view), self.chunk(view)
        facts |= {"modules": len(experts)} if experts else {}
        facts |= {"chunk_tokens": chunk} if chunk else {}
        if experts or chunk:
            return Step(self, facts, (view.model, chunk, experts))
        if _linear(view):
            return Skip(self, "its attention is linear in memory without chunks", size)
        return Skip(self, "reading its prompt in chunks is not known to be exact", size)

    def apply(self, step: Step, journal: Journal) -> None:
        model, chunk, experts = step.work
        for module, routed in experts:
            journal.set_attribute(module, "routed", routed)
            kind: Any = type(module)
            journal.change_class(module, in_pieces(kind))
        if chunk is not None:
            journal.bind_method(model, "_prefill", InChunks(chunk))

    def chunk(self, view: View) -> int | None:
        """Of how many tokens the chunks are in which `generate` reads a longer prompt. None: it reads it at once."""
        if not {view.config.model_type, view.model.config.model_type} <= CHUNKABLE:
            return None
        if _linear(view):
            return self.chunk_tokens
        return min(CHUNK_TOKENS, self.chunk_tokens or CHUNK_TOKENS)

    def _experts(self, view: View) -> list[tuple[nn.Module, Routed]]:
        """The modules of float experts, each with what the size of a piece depends on."""
        taken, found = self.besides.modules(view) if self.besides else set(), []
        for _, module in view.named_modules():
            known = linear_weights(module) if module not in taken else ""
            if not isinstance(known, str) and known[0] == "experts":
                into = known[1][0]
                found.append((module, Routed(into.experts, sum(into.shape))))
        return found


@dataclass(frozen=True)
class InChunks:
    """`generate`'s own prefill, told to go in chunks if the prompt is long and nothing but its tokens, the cache can
    grow, and nobody asked for what only the whole prompt at once returns. A model whose inputs somebody else prepares,
    as PEFT does to put vectors of its own before a prompt, is read at once: a later chunk would lack them."""

    tokens: int

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: Any,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        cache = model_kwargs.get(CACHE)
        given = {name for name, value in model_kwargs.items() if value is not None}
        whole = generation_config.output_attentions or generation_config.output_hidden_states
        own = "prepare_inputs_for_generation" not in vars(model)
        fits = type(cache) is DynamicCache and given <= PLAIN and not whole and own
        if generation_config.prefill_chunk_size is None and fits and input_ids.shape[1] > self.tokens:
            unread = input_ids.shape[1] - cache.get_seq_length()
            generation_config.prefill_chunk_size = self.size(unread, model_kwargs.get("logits_to_keep"))
        return type(model)._prefill(model, input_ids, generation_config, model_kwargs, *rest, **kw)

    def size(self, unread: int, wanted: Any) -> int | None:
        """The longest chunk with which the last one of `unread` tokens has all those whose logits are wanted: a draft
        is verified with the prompt."""
        least = wanted if isinstance(wanted, int) and wanted > 1 else 1
        return next((size for size in range(self.tokens, 0, -1) if (unread - 1) % size + 1 >= least), None)


def _linear(view: View) -> bool:
    """Whether its attention, or ours in its place, stores no scores of length x length."""
    return bool(view.attention_modules()) or isinstance(Attention().inspect(view), Step)
