"""Models in which a pass over several tokens is not the same as passes over one, and how far it is in the others.

Where rotary frequencies depend on the length of the text, each token of plain decoding is rotated, as are all cached
keys, with the frequencies of the text up to it. A pass has one length. So all its tokens must have the same
frequencies: those up to the trained length, or with longrope those beyond it. With dynamic NTK there are others for
every token beyond it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_accel_patch.families import context_tokens
from hf_accel_patch.families.positions import NO_LIMIT, length_dependent
from hf_accel_patch.families.rotary import SCALED

ONE_BY_ONE = {  # what is different, by type of model
    "cpmant": "its positions are relative to the whole pass",
    "git": "it pads otherwise where a pass has several tokens",
    "moshi": "beyond its window it sees other tokens where a pass has several",
    "paligemma": "tokens of a prompt see those behind them",
    "prophetnet": "it takes one token at a time with a cache",
}
VARYING = ("dynamic", "longrope")
OFFSET = 4  # rows that a table of positions may have beside those
NONE = 1 << 31  # tokens: no bound


@dataclass(frozen=True)
class Bounds:
    """How far a pass over several tokens may reach."""

    positions: int | None = None  # of a table: how long a text with its drafts may be
    lengths: frozenset[tuple[int, bool]] = frozenset()  # up to which frequencies are the same, and whether beyond, too

    def within(self, texts: Iterable[int]) -> int:
        """How many tokens may follow those of the next pass in it, with which texts have these lengths."""
        return min((_within(text, *each) for text in texts for each in self.lengths), default=NONE)


def bounds(model: PreTrainedModel) -> Bounds:
    """Those of a model, as it is now."""
    return Bounds(_table(model, model.config.get_text_config(decoder=True)), frozenset(_lengths(model)))


def why_one_by_one(config: PreTrainedConfig) -> str:
    """Why drafts would change the tokens of such a model."""
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "tokens of a pass see those behind them"
    return ONE_BY_ONE.get(config.model_type, "")


def _table(model: PreTrainedModel, config: PreTrainedConfig) -> int | None:
    """Where its table of learned positions ends; None without one."""
    context, words = context_tokens(config), model.get_input_embeddings()
    tables = (each for each in model.modules() if isinstance(each, nn.Embedding) and each is not words)
    if context is not None and any(0 <= each.num_embeddings - context <= OFFSET for each in tables):
        return context
    return None


def _lengths(model: PreTrainedModel) -> set[tuple[int, bool]]:
    found: set[tuple[int, bool]] = set()
    for module in model.modules():
        if (scaled := vars(module).get(SCALED)) is not None:
            lengths = scaled.lengths
        else:
            types = vars(module).get("rope_type")
            if not any(kind in VARYING for kind in (types.values() if isinstance(types, dict) else [types])):
                continue
            lengths = length_dependent(module, vars(module)["config"])
            if not lengths:
                found.add((0, False))  # on what they depend is not known
        found |= {(each.limit, each.longer is not None) for each in lengths.values() if each.limit < NO_LIMIT}
    return found


def _within(text: int, limit: int, settles: bool) -> int:
    if text <= limit:
        return limit - text
    return NONE if settles and text > limit + 1 else 0  # Phi-3 reads all anew at the first beyond it
