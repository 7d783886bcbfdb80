"""The tables that the contract is tested over: families, passes, and a tiny model of any causal LM type.

Sizes are found, not listed per model: a rule shrinks every configuration field whose name says what it measures. Rows
are for what no rule can know: fields that must fit each other, and configurations with several kinds of layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.gptj import modeling_gptj

CLASS_NAMES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # model type -> name of its causal LM class
TYPES: tuple[str, ...] = tuple(CLASS_NAMES)
VOCABULARY = 256
NEWER_GPTJ = hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS")  # since transformers 5.24, and so in CodeGen


@dataclass(frozen=True)
class Family:
    """One architecture as the contract tests it."""

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    registry: bool = True  # it looks its attention up itself, in transformers' registry; else a patch makes it do so


FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "mistral": Family("mistral"),  # a sliding window of 16 in every layer
    "qwen2": Family("qwen2"),  # biases on q, k and v
    "qwen3": Family("qwen3"),  # norms on q and k
    "gemma2": Family("gemma2"),  # soft caps, a window in every other layer, a scaled embedding
    "gpt_oss": Family("gpt_oss"),  # sinks, a window in every other layer, stacked experts
    "gpt2": Family("gpt2"),  # Conv1D instead of nn.Linear, learned positions
    "gpt_neox": Family("gpt_neox"),  # fused q, k, v; parallel residual
    "gptj": Family("gptj", registry=NEWER_GPTJ),
    "codegen": Family("codegen", registry=NEWER_GPTJ),
    "gpt_neo": Family("gpt_neo", registry=False),  # a window in every other layer, by a buffer
    "bloom": Family("bloom", registry=False),  # ALiBi
    "mpt": Family("mpt", registry=False),  # ALiBi
    "falcon_alibi": Family("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}, registry=False),
    "falcon_mqa": Family("falcon", {"alibi": False, "multi_query": True}, registry=False),
    "falcon_new": Family("falcon", {"alibi": False, "new_decoder_architecture": True}, registry=False),
    "gpt_bigcode": Family("gpt_bigcode", {"multi_query": True}),
    "opt": Family("opt"),
    "phi3": Family("phi3"),  # fused q, k, v and gate, up
    "mixtral": Family("mixtral"),
    "deepseek_v3": Family("deepseek_v3"),  # latent attention: values are smaller than keys
}

PASSES: dict[str, dict[str, Any]] = {
    "exact": {}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}, "nf4": {"quantize": "nf4"},
    "cache": {"cache": "int8"}, "gqa": {"gqa": 1},
}  # fmt: skip
REFUSED = {"gqa": ("codegen", "deepseek_v3")}  # pass: the families that cannot have it


def options(label: str, originals: str = "keep") -> dict[str, Any]:
    """The keywords of `patch` for a row of PASSES. Quantization keeps what undo needs, unless told to discard it."""
    from hf_accel_patch import Quantize  # a test of the import itself uses this file before it

    given: dict[str, Any] = dict(PASSES[label])
    return given | {name: Quantize(scheme, originals=originals) for name, scheme in given.items() if name == "quantize"}


# What a configuration field measures, by its whole name, and the size that it gets. The first rule that fits counts.
RULES: tuple[tuple[str, int], ...] = (
    (r"(decoder_|unpadded_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(original_)?max_position_embeddings|max_(source|target)_positions|n_(positions|ctx)", 512),
    (r"max_seq_len|model_max_length|context_length", 512),
    # depth and heads
    (r"num_(key_value|kv)_heads|linear_num_(key|value)_heads", 2),
    (r"(num_|n_)?(en|de)coder_layers|(num_|n_)(hidden_)?layers?|num_blocks|depth", 4),
    (r"((mamba|index|linear)_)?(num_|n_)?((en|de)coder_)?(attention_)?heads?", 4),
    # experts
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|index_topk_blocks", 2),
    (r"n_group|topk_group|num_expert_group|(n|num|moe_num)_shared_experts|(mamba_)?n_?groups", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(moe|shared_experts?|moe_shared_expert)_intermediate_size|expert_ffn_hidden_size", 32),
    # per head
    (r"qk_rope_head_dim|rotary_dim|index_topk", 8),
    (r"((attention|linear|linear_key|linear_value|mamba|index|v|qk|qk_nope)_)?head_dim|d_head|dim_head", 16),
    (r"attention_head_size|kv_channels|linear_head_dim|query_pre_attn_scalar|mamba_(d_head|headdim)", 16),
    # low ranks, recurrent states, windows
    (r"q_lora_rank", 32),
    (r"kv_lora_rank|adapter_rank|time_step_rank|mamba_dt_rank", 16),
    (r"(mamba_d|ssm)_state(_size)?|state_size|(mamba_)?chunk_size", 16),
    (r"(attention_|keep_|sliding_)?window_size|sliding_window(_size)?|local_attention|attention_chunk_size", 16),
    # widths
    (r"((attention|router)_)?hidden_size(_per_layer_input)?|n_embd|d_model|lru_width", 64),
    (r"emb(edding)?_(dim|size)|word_embed_proj_dim|(in|out)put_embedding_size", 64),
    (r"((dense|shared)_)?intermediate_size(_mlp)?|((en|de)coder_)?ffn_dim|dim_ff|dff|n_inner|d_inner", 128),
    (r"ffn_hidden_size|feed_forward_size|mamba_d_ssm", 128),
    (r"pretraining_tp|num_codebooks", 1),
)

TOKENS = {
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "cls_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "eod_token_id"), 2),
    **dict.fromkeys(("mask_token_id", "image_token_id"), 3),
    "forced_eos_token_id": None,
    "is_decoder": True,  # what can be an encoder is a causal LM only so
}

ROWS: dict[str, dict[str, Any]] = {  # model type: what no rule can know
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"per_layer_config": {}, "num_key_value_heads": 4, "head_dim": 24, "swa_head_dim": 24},
    "falcon_h1": {"mamba_n_heads": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "xlstm": {"chunk_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"n_mamba_heads": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


@cache
def _size(name: str) -> int | None:
    return next((size for pattern, size in RULES if re.fullmatch(pattern, name)), None)


def configuration(config_class: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """A configuration of this class with every size made small, and so are the configurations inside it."""
    fields = {each.name for each in dataclasses.fields(config_class)}
    values: dict[str, Any] = {name: size for name in sorted(fields) if (size := _size(name)) is not None}
    values |= {name: token for name, token in TOKENS.items() if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]  # one latent serves all heads
    values |= ROWS.get(config_class.model_type, {}) | overrides
    inner = config_class.sub_configs.keys() - values.keys()
    if inner:
        default = config_class()
        found = {name: getattr(default, name, None) for name in sorted(inner)}
        values |= {name: configuration(type(part)) for name, part in found.items() if part is not None}
    return config_class(**values)


def build(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny random float32 causal LM of this type, in eval mode, the same one on every call. `overrides` are fields of
    its configuration. Raises whatever the type raises that cannot be built from its configuration alone."""
    model_class = getattr(transformers, CLASS_NAMES[model_type])
    config = configuration(CONFIG_MAPPING[model_type], **overrides)
    if not isinstance(config, model_class.config_class):  # a composite whose causal LM is the text part
        config = config.get_text_config(decoder=True)
    torch.manual_seed(0)  # buffers and the constants of some layers are drawn where the model is made
    capped = getattr(config, "attn_logit_softcapping", None) is not None  # which older transformers' sdpa leaves out
    eager = {"attn_implementation": "eager"} if capped else {}
    return randomise(model_class._from_config(config, dtype=torch.float32, **eager))


def tiny(family: str) -> PreTrainedModel:
    """The tiny model of a row of FAMILIES."""
    row = FAMILIES[family]
    return build(row.model_type, **row.overrides)


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Values under which a fault shows: attention that is not uniform, no bias or sink that is zero, no norm of one.
    Embeddings are small, so that a tied model does not repeat its last token, and no end token stops `generate`."""
    generator = torch.Generator().manual_seed(seed)
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        drawn = torch.empty(parameter.shape).normal_(generator=generator).to(parameter.dtype)
        if parameter.ndim < 2:
            parameter += 0.1 * drawn
        else:
            gain = 0.25 if parameter in tables else 1.5
            parameter.copy_(drawn * (gain / parameter.shape[-1] ** 0.5))
    if model.can_generate():
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def prompt(length: int = 40, batch: int = 1, seed: int = 0) -> Tensor:
    """Random token ids [batch, length], none of them special."""
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(*lengths: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of prompts of these lengths (by default 40, 23 and 9), padded on the left."""
    lengths = lengths or (40, 23, 9)
    width = max(lengths)
    attention_mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return {"input_ids": prompt(width, len(lengths)) * attention_mask, "attention_mask": attention_mask}


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Logits [B, T, V]; zero at padded positions, where models may answer anything. The seed is for models that hash
    at random."""
    torch.manual_seed(0)
    scores = model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits
    return scores if attention_mask is None else scores * attention_mask[..., None]


@torch.no_grad()
def greedy(model: PreTrainedModel, input_ids: Tensor, tokens: int = 12, **kwargs: Any) -> Tensor:
    """The new tokens [B, tokens] of greedy `generate`."""
    torch.manual_seed(0)
    return model.generate(input_ids, max_new_tokens=tokens, do_sample=False, **kwargs)[:, input_ids.shape[1] :]


def relative_error(ours: Tensor, stock: Tensor) -> float:
    """The largest difference of logits, in standard deviations of the stock logits."""
    return ((ours.double() - stock.double()).abs().max() / stock.double().std()).item()


def entry(described: dict[str, Any], name: str) -> dict[str, Any]:
    """What the plain data of a report or a plan says of one pass. KeyError if it does not speak of it."""
    return {row["pass"]: row for row in described["passes"]}[name]
