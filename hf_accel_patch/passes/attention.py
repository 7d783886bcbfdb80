"""Attention: one exact function for every model that looks its attention up in transformers' registry."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_accel_patch.compat import weights_collected
from hf_accel_patch.families import UNSUITABLE_ATTENTION, View
from hf_accel_patch.families.classes import branches_on_name, unknown_arguments
from hf_accel_patch.families.handwritten import (
    CACHE_OFF_BY_DEFAULT,
    CHANGES_MASKS,
    Layer,
    handwritten_modules,
    why_as_it_is,
)
from hf_accel_patch.journal import Journal
from hf_accel_patch.kernels.noting import notes
from hf_accel_patch.ops.attended import attended
from hf_accel_patch.ops.attention import attend, scored
from hf_accel_patch.ops.backends import BACKENDS, DECODED_ROWS, Asked, Backend, attend_by, missing
from hf_accel_patch.ops.case import Dense, Variant
from hf_accel_patch.ops.decode import MOST_TOKENS, attend_cached, attend_stored
from hf_accel_patch.ops.fused import fused_attention
from hf_accel_patch.ops.graphs import recording
from hf_accel_patch.ops.latent import Latent, attend_latents
from hf_accel_patch.ops.mask import DescribedMask, mask_of
from hf_accel_patch.ops.stored import Stored
from hf_accel_patch.ops.unattended import unattended, unattended_biased, unattended_parts
from hf_accel_patch.passes.attention_backend import BACKEND, asked_by, chosen, refuse, used
from hf_accel_patch.passes.batching import init_continuous_batching, refuse_continuous_batching
from hf_accel_patch.passes.described import describe_mask, fitting, traced
from hf_accel_patch.passes.handwritten import EXTENDED_KEY, KEY, Replaced, replacement
from hf_accel_patch.passes.latent import absorb, latent_modules
from hf_accel_patch.plan import Skip, Step

SCORE_ELEMENTS = 1 << 18  # plain attention that no fused kernel takes (unequal head sizes) goes in blocks above this:
GPU_SCORE_ELEMENTS = 1 << 24  # on a CPU they are up to three times as fast as PyTorch's kernel that stores all scores
SELECTED = "_attn_implementation_internal"  # where a transformers configuration keeps the name


@dataclass(frozen=True)
class Attention:
    """Exact attention in memory linear in the length. On by default.

    No mask of length x length for padded batches, sliding windows and chunks; grouped keys and values are not copied
    per query head; soft caps (Gemma 2) and sinks (gpt-oss), for which transformers falls back to storing all scores,
    go block by block; a window's keys outside a block are not computed. `output_attentions` is answered, at the price
    of the full scores. Outputs equal stock's up to floating-point rounding.

    `backend`: who computes. "auto" goes by the device and the case: PyTorch's and the compiled kernels on a CPU; on
    CUDA PyTorch's where attention is plain, else the package's Triton kernels ("triton") or flash-attn, whichever is
    there. "flex" is PyTorch's FlexAttention. What one that is asked for by name cannot do (head sizes, dtypes, dropout)
    "torch" does, and `report` says why; one that is not installed is an error. Under torch.compile it is "torch".

    >>> model = patch(model, attention=Attention(backend="torch"))
    """

    backend: Backend = "auto"

    name = "attention"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            allowed = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"attention: unknown backend {self.backend!r}; allowed: {allowed}")

    def inspect(self, view: View) -> Step | Skip:
        found, written = view.attention_modules(), handwritten_modules(view)
        skip = partial(Skip, self, bytes_now=view.weight_bytes())
        if reason := UNSUITABLE_ATTENTION.get(view.config.model_type):
            return skip(reason)
        if not found and not written:
            return skip("no module takes its attention from transformers' registry: hand-written, or no attention")
        kinds: set[Any] = {type(module) for _, module in found}
        if any(map(branches_on_name, kinds)):
            return skip("its attention chooses its path by the names of transformers' own implementations")
        if unknown := sorted({name for kind in kinds for name in unknown_arguments(kind)}):
            return skip(f"its attention function takes what ours does not know: {', '.join(unknown)}")
        if not view.model._supports_sdpa and any(getattr(module, "is_causal", True) is False for _, module in found):
            return skip("its attention is not marked as causal, so nothing but the dense mask says so")
        if written and (reason := why_as_it_is(view.config)):
            return skip(reason)
        was = vars(view.config).get(SELECTED)
        if was not in (None, "eager", "sdpa"):
            return skip(f"it was loaded with attn_implementation={was!r}, which stays in place")
        if view.config.is_encoder_decoder:
            return skip("it is an encoder-decoder, whose masks are its own")
        size = view.weight_bytes()
        latent, count = latent_modules(view), len(found) + sum(not isinstance(how, Layer) for _, how in written)
        facts: dict[str, Any] = {"exact": True, "bytes_before": size, "bytes_after": size, "modules": count}
        facts["was"] = "hand-written" if written else was or "eager"
        by_hand = [module for module, _ in written]
        facts |= {"latent": len(latent)} if latent else {}
        refuse(self.backend)
        using = [*by_hand, *(module for _, module in found)]
        return Step(self, facts | chosen(self.backend, view.model), (view, latent, by_hand, using))

    def apply(self, step: Step, journal: Journal) -> None:
        """Select our function for this model only: it gets its own copy of the configuration, because the
        configuration object may be shared with models that nobody patched."""
        view, latent, by_hand, using = step.work
        config = copy.copy(view.config)
        if vars(config).get(SELECTED) != EXTENDED_KEY:  # the pass for positions may have chosen that
            vars(config)[SELECTED] = KEY
        for _, module in view.named_modules():
            if vars(module).get("config") is view.config:
                journal.set_attribute(module, "config", config)
        absorb(latent, KEY, journal)
        for module in by_hand:
            kind: Any = type(module)
            if not issubclass(kind, Replaced):
                journal.change_class(module, replacement(kind))
        if view.config.model_type in CHANGES_MASKS:
            journal.bind_method(view.model, "create_masks_for_generate", _mask_for_generate)
        if view.config.model_type in CACHE_OFF_BY_DEFAULT:
            journal.bind_method(view.model, "_prepare_generation_config", _with_cache)
        asked = Asked(self.backend)
        for module in using:
            journal.set_attribute(module, BACKEND, asked)
        batching = refuse_continuous_batching if by_hand else init_continuous_batching
        journal.bind_method(view.model, "init_continuous_batching", batching)

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """The backend where the model is now, and which ones have computed so far."""
        return chosen(self.backend, model) | used(model)


def register() -> None:
    """Add our functions to transformers' registries, under a key that no unpatched model selects."""
    AttentionInterface.register(KEY, attention_forward)
    AttentionMaskInterface.register(KEY, describe_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function behind our key, as transformers calls it.

    query [B, H, T, D], key and value [B, K, S, D or V], mask [B or 1, H or 1, T, S]; returns the output [B, T, H, V]
    and the weights [B, H, T, S] if `output_attentions` asks for them. Sinks are one more logit without a value:
    `s_aux` [H], or `sinks` [B, H, T, 1] where they depend on the query.
    """
    T, S = query.shape[2], key.shape[2]
    attention_mask = fitting(attention_mask, (*query.shape[:3], S))
    config = getattr(module, "config", None)
    told = kwargs.get("output_attentions")
    answer = told or getattr(config, "output_attentions", False) or (told is None and weights_collected())
    latents = key.latents if isinstance(key, Latent) and isinstance(value, Latent) else None
    if latents is not None and (answer or dropout or (T > 1 and attention_mask is None) or not latents.stay(T)):
        (key, value), latents = latents.expanded, None
    stored = key.content if isinstance(key, Stored) and isinstance(value, Stored) and not answer else None
    if query.is_meta and not answer:  # only planned
        plain = softcap is None and sinks is None and (s_aux is None or position_bias is None)
        if stored is not None:
            mask = mask_of(attention_mask, S, False, query.device)
            return unattended_parts(query, stored, mask, softcap), None
        if isinstance(attention_mask, DescribedMask) and not attention_mask.square and plain:
            if position_bias is not None and key.shape[-1] == value.shape[-1]:
                return unattended_biased(query, key, value, position_bias), None
        masked = isinstance(attention_mask, DescribedMask) or position_bias is not None
        return unattended(query, key, value, plain, masked), None
    if T > 1 and attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if (
            causal and S > T and stored is None
        ):  # the prefill of a static cache: what is behind the queries is not written yet
            key, value, S = key[:, :, :T], value[:, :, :T], T
            position_bias = position_bias if position_bias is None else position_bias[..., :T]
    else:
        causal = False
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1)
    variant = Variant(scale, dropout, softcap, sinks, position_bias)
    if latents is not None:
        return attend_latents(query, latents, mask_of(attention_mask, S, causal, query.device), variant), None
    if stored is not None:
        return attend_stored(query, stored, mask_of(attention_mask, S, causal, query.device), variant), None
    asked = asked_by(module)
    if recording() and T <= MOST_TOKENS and not answer and attention_mask is not None:
        if (output := _split(asked, query, key, value, attention_mask, variant)) is not None:
            return output, None
        asked = Asked("torch")  # others wait for the device, to learn what a mask says
    elsewhere = query.is_cuda and T > MOST_TOKENS if asked.backend == "auto" else asked.backend != "torch"
    if elsewhere and not answer and not traced():
        mask = mask_of(attention_mask, S, causal, query.device)
        if (output := attend_by(asked, query, key, value, mask, variant)) is not None:
            return output, None
    if T <= MOST_TOKENS and not causal and not answer and not isinstance(attention_mask, DescribedMask):
        output = attend_cached(query, key, value, attention_mask, variant)
        if output is not None:
            return output, None
    if softcap is None and sinks is None and position_bias is None and not answer:
        described = isinstance(attention_mask, DescribedMask)
        elements = SCORE_ELEMENTS if query.is_cpu else GPU_SCORE_ELEMENTS
        if not described and (key.shape[-1] == value.shape[-1] or T * S * query.shape[1] <= elements):
            return _direct(query, key, value, attention_mask, dropout, scale, causal), None
    graph = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if graph and not (answer or dropout or torch.is_grad_enabled()):
        return attended(query, key, value, attention_mask, causal, scale, softcap, sinks, position_bias), None
    mask = mask_of(attention_mask, S, causal, query.device)
    if answer:
        output, weights = scored(query, key, value, mask.block(0, T, 0, S), position_bias, variant)
        return output.transpose(1, 2).contiguous(), weights
    return attend(query, key, value, mask, variant).transpose(1, 2).contiguous(), None


def _direct(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float, causal: bool
) -> Tensor:
    """One call of PyTorch's fused attention. Returns [B, T, H, V]."""
    B, H, T, D = query.shape
    K = key.shape[1]
    if T == 1 and H != K and (mask is not None or query.device.type == "cpu"):
        # the heads of a group become rows, so their keys are read once; up to ten times faster than enable_gqa on a CPU
        if mask is not None and mask.shape[1] != 1:
            mask = mask.reshape(mask.shape[0], K, H // K, -1)
        output = F.scaled_dot_product_attention(query.reshape(B, K, H // K, D), key, value, mask, dropout, scale=scale)
        return output.reshape(B, 1, H, -1)
    if H != K and mask is not None and not query.is_cpu:
        return attend(query, key, value, Dense(mask), Variant(scale, dropout)).transpose(1, 2).contiguous()
    output = fused_attention(query, key, value, mask, dropout, scale, causal=causal)
    return output.transpose(1, 2).contiguous()


def _split(asked: Asked, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, variant: Variant) -> Tensor | None:
    """Of a step that is recorded, with a mask over more keys than there are tokens: by the Triton kernel that splits
    the keys, if it is there and takes the case, for PyTorch's kernels leave most of a GPU idle at few queries."""
    if notes() is not None:
        return None
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    suits = mask.dtype == torch.bool and rows <= DECODED_ROWS and variant.bias is None
    if asked.backend not in ("auto", "triton") or not suits or missing("triton") is not None:
        return None
    return attend_by(Asked("triton"), query, key, value, Dense(mask), variant)


def _mask_for_generate(self: PreTrainedModel, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """What `generate` hands on with a static cache: the padding, of which the model makes its mask."""
    return attention_mask


def _with_cache(self: PreTrainedModel, generation_config: GenerationConfig | None, **kwargs: Any) -> Any:
    """The settings of one call of `generate`: with a cache, unless the caller says otherwise. Tokens are the same."""
    prepared = type(self)._prepare_generation_config(self, generation_config, **kwargs)
    if kwargs.get("use_cache", getattr(generation_config, "use_cache", None)) is None:
        prepared[0].use_cache = True
    return prepared
