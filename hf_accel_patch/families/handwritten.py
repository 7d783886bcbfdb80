"""Attention that models compute by hand instead of taking it from transformers' registry, as data.

The classes of the modules are listed by name, because nothing else tells how they are written. There are three ways:
scores in a method of their own (`Scores`), scores in the middle of the forward (`Whole`), and a layer that does not
tell its attention that its weights are asked for (`Layer`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_accel_patch.families import View

# Model types that convert their mask or add to it before their attention gets it
CHANGES_MASKS = frozenset({"falcon", "mpt"})

# Model types whose configuration switches the cache off by default, so `generate` computes every token again each time
CACHE_OFF_BY_DEFAULT = frozenset({"mpt"})

# Since transformers 5.24 GPT-J and CodeGen take their attention from the registry. What they had before and have since:
SCORES, NEWER = "_attn", "attention_dropout"
HOME = "transformers.models."  # where the classes below are; one of the same name elsewhere may be another

Rotate = Callable[[Any, dict[str, Any], Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Slopes = Callable[[int], tuple[float, ...]]  # of ALiBi (arXiv 2108.12409), by the number of heads


@dataclass(frozen=True)
class Scores:
    """A module whose `_attn(query, key, value, mask)` computes the output [B, H, T, D] and the weights."""

    scale: Callable[[Any], float]
    dropout: str  # the nn.Dropout
    window: Callable[[Any], int | None] = lambda module: None  # keys that a query sees
    listed: bool = False  # keys come transposed, causality is the method's own, and it answers a list (OpenAI GPT)
    own_mask: bool = False  # causal, by places in the cache: additive masks come on top of it and of the window
    mask_scale: Callable[[Any], float] = lambda module: 1.0  # of additive masks


@dataclass(frozen=True)
class Whole:
    """A module that computes scores in its forward, which begins with projections and ends with one."""

    inputs: tuple[str, ...]  # one projection for query, key and value, or three
    output: str  # empty: it comes in another module
    heads: str
    scale: Callable[[Any], float]
    dropout: Callable[[Any], float]
    shared: str | None = None  # where the number of key/value heads is, if it may be another than that of the heads
    grouped: bool = False  # the one projection has head after head of keys: the queries of its group, key, value
    limit: str | None = None  # what bounds the outputs of the projection
    slopes: Slopes | None = None  # of an ALiBi that is made anew, in float32 and relative to the last key
    counts_padding: bool = False  # positions of that ALiBi count the tokens that are seen
    residual: str | None = None  # the probability of the dropout before the residual is added here
    dropped: str | None = None  # the nn.Dropout of the output
    window: Callable[[Any], int | None] = lambda module: None  # keys that a query sees
    masked_is_true: bool = False  # in a mask [B, 1, T, S] that a user gives
    rotate: Rotate | None = None  # query, key and value to their positions
    causal: Callable[[Any], bool] = lambda module: True


@dataclass(frozen=True)
class Layer:
    """A module that hands its mask on and `output_attentions` not."""


Handwritten = Scores | Whole | Layer


def bloom_slopes(heads: int) -> tuple[float, ...]:
    """Powers of 2 ** (-8 / n) for the largest power of two n, and for the heads beyond it odd powers of its root."""
    n = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    return tuple(first + [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)])


def mpt_slopes(heads: int) -> tuple[float, ...]:
    """Powers of 2 ** (-8 / n) for the next power of two n; where there are fewer heads, every second one first."""
    n = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    return tuple(slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads])


def _by_scale_attn(module: Any) -> float:
    return float(module.scaling) if NEWER in vars(module) else 1 / float(module.scale_attn)


def _by_codegen(module: Any) -> float:
    """CodeGen scales scores and mask together."""
    return 1.0 if NEWER in vars(module) else _by_scale_attn(module)


def _gptj_dropout(module: Any) -> float:
    return float(vars(module)[NEWER]) if NEWER in vars(module) else float(module.attn_dropout.p)


def _by_file(module: Any, given: dict[str, Any], *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the function beside the class; with ALiBi, by none."""
    query, key, value = parts
    if given.get("alibi") is None:
        rotate = vars(sys.modules[type(module).__module__])["apply_rotary_pos_emb"]
        query, key = rotate(query, key, *given["position_embeddings"])
    return query, key, value


def _by_table(module: Any, given: dict[str, Any], *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By a table of sines, on the first channels (GPT-J)."""
    query, key, value = parts
    rotate = vars(sys.modules[type(module).__module__])["apply_rotary_pos_emb"]
    if NEWER in vars(module):
        sin, cos = given["position_embeddings"]
    else:
        table = module.embed_positions.to(query.device)[given["position_ids"]].to(key.dtype)
        sin, cos = table.chunk(2, dim=-1)
    size = module.rotary_dim or query.shape[-1]

    def turned(x: Tensor) -> Tensor:
        first = rotate(x[..., :size].transpose(1, 2), sin, cos).transpose(1, 2)
        return torch.cat((first, x[..., size:]), dim=-1)

    return turned(query), turned(key), value


def _by_method(module: Any, given: dict[str, Any], *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By a method of the module, which may rotate values as well."""
    angles, count = given.get("sinusoidal_pos"), 3 if module.rotary_value else 2
    if angles is None:
        return parts  # type: ignore[return-value]
    return (*module.apply_rotary_position_embeddings(angles, *parts[:count]), *parts[count:])


def _masks_itself(module: Any) -> bool:
    """Whether its model makes a causal mask. In transformers 5.17 some have none, and see everything."""
    return "create_causal_mask" in vars(sys.modules[type(module).__module__])


BART = Whole(  # the decoders that came from it
    inputs=("q_proj", "k_proj", "v_proj"),
    output="out_proj",
    heads="num_heads",
    scale=lambda module: float(module.scaling),
    dropout=lambda module: float(module.dropout),
)
BERT = Whole(
    inputs=("query", "key", "value"),
    output="",
    heads="num_attention_heads",
    scale=lambda module: float(module.attention_head_size) ** -0.5,
    dropout=lambda module: float(module.dropout.p),
    causal=lambda module: bool(module.is_decoder) and _masks_itself(module),
)


CLASSES: dict[str, Handwritten] = {
    "GPTJAttention": Scores(_by_scale_attn, "attn_dropout"),
    "CodeGenAttention": Scores(_by_scale_attn, "attn_dropout", mask_scale=_by_codegen),
    "GPTNeoSelfAttention": Scores(
        scale=lambda module: 1.0,
        dropout="attn_dropout",
        window=lambda module: module.config.window_size if module.attention_type == "local" else None,
        own_mask=True,
    ),
    "GPTNeoXJapaneseAttention": Scores(lambda module: 1 / float(module.norm_factor), "attention_dropout"),
    "openai.Attention": Scores(
        scale=lambda module: (module.split_size // module.n_head) ** -0.5 if module.scale else 1.0,
        dropout="attn_dropout",
        listed=True,
    ),
    "BloomAttention": Whole(
        inputs=("query_key_value",),
        output="dense",
        heads="num_heads",
        scale=lambda module: float(module.inv_norm_factor),
        dropout=lambda module: float(module.attention_dropout.p),
        grouped=True,
        slopes=bloom_slopes,
        counts_padding=True,
        residual="hidden_dropout",
    ),
    "MptAttention": Whole(
        inputs=("Wqkv",),
        output="out_proj",
        heads="n_heads",
        scale=lambda module: float(module.softmax_scale),
        dropout=lambda module: float(module.attn_dropout_p),
        limit="clip_qkv",
        slopes=mpt_slopes,
        masked_is_true=True,
    ),
    "MptBlock": Layer(),
    "FalconAttention": Whole(
        inputs=("query_key_value",),
        output="dense",
        heads="num_heads",
        shared="num_kv_heads",
        scale=lambda module: float(module.inv_norm_factor),
        dropout=lambda module: float(module.attention_dropout.p) if module.config.alibi else 0.0,
        grouped=True,
        rotate=_by_file,
    ),
    "XGLMAttention": BART,
    "TrOCRAttention": BART,
    "MvpAttention": BART,
    "MegatronBertSelfAttention": BERT,
    "RemBertSelfAttention": BERT,
    "RoFormerSelfAttention": replace(BERT, rotate=_by_method),
}


# Modules whose class knows no key/value heads, as they are written when they get fewer than query heads
WITHOUT_SHARED: dict[str, Whole] = {
    "GPT2Attention": Whole(
        inputs=("c_attn",),
        output="c_proj",
        heads="num_heads",
        scale=lambda module: float(module.scaling),
        dropout=lambda module: float(module.attn_dropout.p),
        dropped="resid_dropout",
    ),
    "GPTNeoXAttention": Whole(
        inputs=("query_key_value",),
        output="dense",
        heads="num_attention_heads",
        scale=lambda module: float(module.scaling),
        dropout=lambda module: float(module.attention_dropout),
        grouped=True,
        rotate=_by_file,
    ),
    "GPTJAttention": Whole(
        inputs=("q_proj", "k_proj", "v_proj"),
        output="out_proj",
        heads="num_attention_heads",
        scale=_by_scale_attn,
        dropout=_gptj_dropout,
        dropped="resid_dropout",
        rotate=_by_table,
    ),
    "GPTNeoSelfAttention": Whole(
        inputs=("q_proj", "k_proj", "v_proj"),
        output="out_proj",
        heads="num_heads",
        scale=lambda module: 1.0,
        dropout=lambda module: float(module.attn_dropout.p),
        dropped="resid_dropout",
        window=lambda module: module.config.window_size if module.attention_type == "local" else None,
    ),
    "OPTAttention": BART,
    "BioGptAttention": BART,
}


def without_shared(kind: type) -> Whole | None:
    """How a module of this class is written when it gets fewer key/value heads than its class knows."""
    if not kind.__module__.startswith(HOME):
        return None
    how = WITHOUT_SHARED.get(kind.__name__) or handwritten(kind)
    return how if isinstance(how, Whole) and how.output else None


def handwritten(kind: type) -> Handwritten | None:
    """How this class is written, if it is one of those."""
    made: Any = vars(kind).get("made")  # of a class that a patch has made from it
    if isinstance(made, tuple) and isinstance(made[1], Scores | Whole | Layer):
        return made[1]
    if not kind.__module__.startswith(HOME):
        return None
    how = CLASSES.get(kind.__name__) or CLASSES.get(f"{kind.__module__.split('.')[2]}.{kind.__name__}")
    return None if isinstance(how, Scores) and not hasattr(kind, SCORES) else how


def why_as_it_is(config: PreTrainedConfig) -> str:
    """Why hand-written attention with this configuration stays as it is, or nothing."""
    if not getattr(config, "is_causal", True):
        return "it is hand-written for one direction, and its configuration asks for both"
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        return "slow_but_exact leaves out biases of its layers, in attention and elsewhere"  # BLOOM
    return ""


def handwritten_modules(view: View) -> list[tuple[nn.Module, Handwritten]]:
    """The modules of the model that are written so."""
    found = [(module, handwritten(type(module))) for _, module in view.named_modules()]
    if any(isinstance(how, Whole) and not how.causal(module) for module, how in found):
        return []
    return [(module, how) for module, how in found if how is not None]
