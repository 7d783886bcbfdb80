"""Well-known shapes as data: models with random weights, built from a configuration without network.

Speed and memory depend on shapes, dtypes and kernels, not on what the weights have learned. One has learned, the model
that the package brings along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

import hf_accel_patch

BUNDLED = Path(hf_accel_patch.__file__).parent / "models" / "code-llama-8m"
LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-5,
}
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama-160m": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": SMOLLM2
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "smollm2-360m": SMOLLM2
    | {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "pythia-410m": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "octocoder": {
        "model_type": "gpt_bigcode",
        "vocab_size": 49152,
        "hidden_size": 6144,
        "n_inner": 24576,
        "num_hidden_layers": 40,
        "num_attention_heads": 48,
        "max_position_embeddings": 8192,
        "multi_query": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "multi-head": {  # no published model: as many key/value heads as query heads, to be made fewer
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "tiny": {  # no published model: seconds instead of minutes, to try the benchmark itself
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    BUNDLED.name: json.loads((BUNDLED / "config.json").read_text(encoding="utf-8")),
}

_LAYER = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 256, "num_attention_heads": 8}
_ONE = _LAYER | {"num_hidden_layers": 1, "max_position_embeddings": 32768}
_FALCON = _ONE | {"model_type": "falcon", "ffn_hidden_size": 256}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
LAYERS: dict[str, dict[str, Any]] = {
    # Attention almost alone: one layer, or one of each kind, with 8 heads of the size that published models of the type
    # have, grouped alike; a narrow MLP and a small vocabulary
    "llama-layer": _ONE | {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 64},
    "mistral-layer": _ONE | {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 128, "sliding_window": 512},
    "gemma2-layers": _ONE
    | {
        "model_type": "gemma2",
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    },
    "gpt-oss-layers": _LAYER
    | {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "bloom-layer": {"model_type": "bloom", "vocab_size": 1024, "hidden_size": 512, "n_layer": 1, "n_head": 8},
    "mpt-layer": {
        "model_type": "mpt",
        "vocab_size": 1024,
        "d_model": 1024,
        "n_layers": 1,
        "n_heads": 8,
        "expansion_ratio": 1,
        "max_seq_len": 32768,
    },
    "falcon-alibi-layer": _FALCON | {"alibi": True, "multi_query": False},
    "falcon-multi-query-layer": _FALCON | {"alibi": False, "multi_query": True},
    "gptj-layer": {
        "model_type": "gptj",
        "bos_token_id": None,
        "eos_token_id": None,
        "vocab_size": 1024,
        "n_embd": 2048,
        "n_inner": 256,
        "n_layer": 1,
        "n_head": 8,
        "rotary_dim": 64,
        "n_positions": 32768,
    },
    "gpt-neo-layers": {
        "model_type": "gpt_neo",
        "bos_token_id": None,
        "eos_token_id": None,
        "vocab_size": 1024,
        "hidden_size": 1024,
        "intermediate_size": 256,
        "num_layers": 2,
        "num_heads": 8,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 256,
        "max_position_embeddings": 16384,
    },
    "deepseek-v3-layer": _ONE
    | _LATENT
    | {"model_type": "deepseek_v3", "num_key_value_heads": 8, "q_lora_rank": None, "first_k_dense_replace": 1},
}


def build(shape: str, *, dtype: str, device: str, layers: int | None = None) -> Any:
    """A causal LM of this shape, of SHAPES or LAYERS, for inference, with random weights or, of the bundled model, its
    own; `layers` cuts it to that many.

    Random weights repeat one block of normal numbers: drawing them all would take five times as long. The model has no
    end-of-sequence token, so `generate` gives exactly as many tokens as it is asked for.
    """
    fields = dict((SHAPES | LAYERS)[shape])
    if layers is not None:
        fields["num_hidden_layers"] = min(layers, fields["num_hidden_layers"])
    config = AutoConfig.for_model(**fields)
    if shape == BUNDLED.name and device != "meta":
        model = AutoModelForCausalLM.from_pretrained(str(BUNDLED), config=config, dtype=getattr(torch, dtype)).to(
            device
        )
    else:
        with torch.device(device), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        model.tie_weights()
        _fill(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def _fill(model: Any) -> None:
    """Random matrices; norms of one, biases of zero."""
    block = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            same = block.to(parameter)  # once, not piece by piece over the bus of a GPU
            for part in parameter.view(-1).split(len(block)):
                part.copy_(same[: len(part)])
