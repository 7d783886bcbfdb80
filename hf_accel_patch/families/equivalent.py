"""A converted model as one of another class that knows its key/value heads, so that it needs no package of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families.heads import shared_heads

# Model type with one key/value head: the type that computes the same, and what its configuration says beside
MULTI_QUERY: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt_bigcode", {"multi_query": True, "attention_softmax_in_fp32": False}),
}
GIVEN: tuple[str, ...] = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "dtype",
)
GIVEN += ("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "scale_attn_weights", "use_cache")
GIVEN += ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype")


@torch.no_grad()
def export(model: PreTrainedModel) -> PreTrainedModel:
    """A stock model of another class that computes the same as a converted one: GPT-2 with one key/value head as
    GPTBigCode, on copies of its weights.

    Raises UnsupportedModel where no stock class does.
    """
    config: Any = model.config
    found, odd = MULTI_QUERY.get(config.model_type), getattr(config, "scale_attn_by_inverse_layer_idx", False)
    if found is None or shared_heads(config) != 1 or odd or config.add_cross_attention:
        known = ", ".join(f"{ours} with one as {theirs}" for ours, (theirs, _) in MULTI_QUERY.items())
        raise UnsupportedModel(
            f"{type(model).__name__} with {shared_heads(config)} key/value heads is no other class of transformers",
            f"there is {known}; save_pretrained writes a checkpoint that loads with this package",
        )
    kind, more = found
    given = {name: getattr(config, name) for name in GIVEN if hasattr(config, name)}
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**given | more))
    transposed = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Conv1D)}
    state: dict[str, Tensor] = {
        name: (value.T.contiguous() if name in transposed else value.clone())
        for name, value in model.state_dict().items()
    }
    other.load_state_dict(state, strict=True, assign=True)
    other.tie_weights()
    other.generation_config = model.generation_config
    return other.train(model.training)
