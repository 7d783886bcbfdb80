"""How far a pass over drafted tokens may reach.

Where rotary frequencies depend on the length of the text, each token of plain decoding is rotated, as are all cached
keys, with the frequencies of the text up to it. A pass has one length. So all its tokens must have the same
frequencies: those up to the trained length, or with longrope those beyond it. With dynamic NTK there are others for
every token beyond it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_accel_patch.families import context_tokens
from hf_accel_patch.families.positions import NO_LIMIT, length_dependent
from hf_accel_patch.families.rotary import SCALED

NONE = 1 << 31  # tokens: no bound
VARYING = ("dynamic", "longrope")
OFFSET = 4  # rows that a table of positions may have beside those

Bound = tuple[int, bool]  # the length up to which frequencies are the same, and whether they are so beyond it, too


def bounds(model: nn.Module) -> set[Bound]:
    """Those of its rotary modules, as they are now."""
    found: set[Bound] = set()
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


def reach(limits: set[Bound], input_ids: Tensor, model_kwargs: dict[str, Any]) -> int:
    """How many tokens may follow those of the next pass in it."""
    if not limits:
        return NONE
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    lengths = {input_ids.shape[1]}  # Phi-3 counts padding
    if positions is not None and positions.ndim == 2:
        lengths |= set((positions.amax(-1) + 1).tolist())
    elif mask is not None and mask.ndim == 2:
        lengths |= set(mask.sum(-1).tolist())
    return min(_within(length, *each) for length in lengths for each in limits)


def _within(length: int, limit: int, settles: bool) -> int:
    if length <= limit:
        return limit - length
    return NONE if settles and length > limit + 1 else 0  # Phi-3 reads all anew at the first beyond it


def table_tokens(model: nn.Module, config: PreTrainedConfig) -> int | None:
    """Where its table of learned positions ends; None without one."""
    context, words = context_tokens(config), model.get_input_embeddings()  # type: ignore[operator]
    tables = (each for each in model.modules() if isinstance(each, nn.Embedding) and each is not words)
    if context is not None and any(0 <= each.num_embeddings - context <= OFFSET for each in tables):
        return context
    return None
