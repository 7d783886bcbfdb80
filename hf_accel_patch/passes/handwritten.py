"""Hand-written attention on the attention function of transformers' registry.

A module's class is changed to a subclass of its own, made once per class, that replaces what computes the scores: the
method `_attn` where there is one, else the forward. What is particular to a model is data, in families/handwritten.py.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_accel_patch.compat import given_cache
from hf_accel_patch.families.handwritten import Layer, Scores, Slopes, Whole, handwritten, without_shared
from hf_accel_patch.families.tables import growing
from hf_accel_patch.ops.mask import Carried, DescribedMask, contiguous_runs, last_keys
from hf_accel_patch.ops.stored import Stored
from hf_accel_patch.passes.described import traced

KEY = "hf_accel_patch"  # in transformers' registries; names with "flash", "sdpa" or "/" mean something there
EXTENDED_KEY = f"{KEY}_extended"  # the same, for positions in groups


SHARED = "num_key_value_heads"  # on a module that was given fewer than its class knows

ELSEWHERE = ("key_value_states", "encoder_hidden_states", "attn_prompt")  # from where keys and values come as well


@dataclass(frozen=True)
class Asked:
    """A mask on its way through code that hands it on untouched, and the wish for attention weights with it."""

    mask: Tensor | None


class Replaced(nn.Module):
    """What the subclasses share."""

    made: tuple[type, Any]  # the module's own class, and how it is written
    fewer: bool  # whether it is for fewer key/value heads than the class knows
    names: tuple[str, ...]  # of the arguments of its forward

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made at run time are made again where a pickle is read."""
        state = super().__reduce_ex__(protocol)
        return _remake, type(self).recipe()[1], state[2]

    @classmethod
    def recipe(cls) -> tuple[Any, tuple[Any, ...]]:
        """A function and its arguments that make this class."""
        kind = cls.made[0]
        return _class, (getattr(kind, "grown_from", kind), hasattr(kind, "grown_from"), cls.fewer)


class Asking(Replaced):
    """A module whose forward hands its mask on: with the wish for weights, where there is one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if given.get("output_attentions"):
            given["attention_mask"] = Asked(given.get("attention_mask"))
        return super().forward(**given)


class WithScores(Asking):
    """A module whose `_attn` computes the scores."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, output_attentions: bool = False
    ) -> Any:
        how: Scores = self.made[1]
        mask, answer = _unwrapped(attention_mask, False)
        if how.listed:
            key = key.transpose(-1, -2)
            if mask is not None:  # [B, 1, 1, S], 0 or the lowest number of its dtype, and causality comes beside it
                mask = _causal(query.shape[2], query.shape[2], query.device, mask[:, 0, 0] >= 0)
        window = how.window(self)
        if type(mask) is Tensor and mask.is_floating_point():  # a user's
            mask = mask * how.mask_scale(self)
            if how.own_mask:
                mask, window = _under(mask, query.shape[2], key.shape[2], window), None
        if window is not None:
            key, value, mask = _windowed(query, key, value, mask, window)
        dropout = getattr(self, how.dropout).p
        output, weights = _attend(self, query, key, value, mask, None, how.scale(self), dropout, answer)
        output = output.transpose(1, 2)
        if how.listed:
            return [output, weights] if answer else [output]
        return output, weights


class WithForward(Replaced):
    """A module that computes scores in its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if any(given.get(name) is not None for name in ELSEWHERE):
            given["attention_mask"] = _additive(given.get("attention_mask"), given["hidden_states"].dtype)
            return super().forward(**given)
        how: Whole = self.made[1]
        hidden = given["hidden_states"]
        query, key, value = _projected(self, how, hidden)
        if how.rotate is not None:
            query, key, value = how.rotate(self, given, query, key, value)
        past = given_cache(given)
        if past is not None:
            past = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
            key, value = past.update(key, value, vars(self).get("layer_idx", vars(self).get("layer_id")))
        mask, answer = _unwrapped(given.get("attention_mask"), how.masked_is_true)
        window = how.window(self)
        if window is not None:
            key, value, mask = _windowed(query, key, value, mask, window)
        answer = answer or bool(given.get("output_attentions"))
        bias = _alibi(how, query, key, mask, given.get("alibi"))
        output, weights = _attend(self, query, key, value, mask, bias, how.scale(self), how.dropout(self), answer)
        output = output.flatten(2)
        output = getattr(self, how.output)(output) if how.output else output
        if how.residual is not None:
            probability = float(getattr(self, how.residual))
            output = given["residual"] + F.dropout(output, p=probability, training=self.training)
        output = getattr(self, how.dropped)(output) if how.dropped else output
        return output, weights


def replacement(kind: type, *, fewer: bool = False) -> type:
    """The class that modules of this class are changed to, or those with fewer key/value heads than it knows. It keeps
    the name, for those who look for it."""
    return _replacement(kind, fewer)


@cache
def _replacement(kind: type, fewer: bool) -> type:
    how = without_shared(kind) if fewer else handwritten(kind)
    assert how is not None
    bases: dict[type, type] = {Scores: WithScores, Whole: WithForward, Layer: Asking}
    forward: Any = vars(kind)["forward"]
    entries = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made = type(kind.__name__, (bases[type(how)], kind), {**entries, "made": (kind, how), "fewer": fewer})
    made.names = tuple(inspect.signature(forward).parameters)[1:]  # type: ignore[attr-defined]
    return made


def _class(kind: type, grown: bool, fewer: bool) -> type:
    return _replacement(growing(kind) if grown else kind, fewer)


def _remake(kind: type, grown: bool, fewer: bool) -> Any:
    made: Any = _class(kind, grown, fewer)
    return made.__new__(made)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    answer: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output [B, T, H, V], and the weights [B, H, T, S] if asked for. It is looked up as other models do it."""
    query, key = (each if each.dtype == value.dtype else each.to(value.dtype) for each in (query, key))
    function = ALL_ATTENTION_FUNCTIONS[KEY]
    dropout = dropout if module.training else 0.0
    options = {"dropout": dropout, "scaling": scale, "position_bias": bias, "output_attentions": answer}
    return cast(Any, function(module, query, key, value, mask, is_causal=True, **options))


def _projected(module: Any, how: Whole, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, H, T, D], key and value [B, K, T, D]."""
    B, T, _ = hidden.shape
    heads = getattr(module, how.heads, None) or getattr(module.config, how.heads)
    shared = getattr(module, how.shared or SHARED, heads)
    parts = [getattr(module, name)(hidden) for name in how.inputs]
    if how.limit is not None and (limit := getattr(module, how.limit)):
        parts = [part.clamp(min=-limit, max=limit) for part in parts]
    if how.grouped:
        (fused,) = parts
        fused = fused.view(B, T, shared, heads // shared + 2, -1)
        query, key, value = fused[:, :, :, :-2].flatten(2, 3), fused[:, :, :, -2], fused[:, :, :, -1]
    else:
        if len(parts) == 1:
            size = parts[0].shape[-1] // (heads + 2 * shared)
            parts = list(parts[0].split([heads * size, shared * size, shared * size], dim=-1))
        query, key, value = (
            part.unflatten(-1, (n, -1)) for part, n in zip(parts, (heads, shared, shared), strict=True)
        )
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _unwrapped(mask: Any, masked_is_true: bool) -> tuple[Tensor | None, bool]:
    """The mask as our attention takes it, and whether weights are asked for."""
    if isinstance(mask, Asked):
        return _unwrapped(mask.mask, masked_is_true)[0], True
    if isinstance(mask, Carried):
        return mask.content, False
    if mask is None or isinstance(mask, DescribedMask):
        return mask, False
    if mask.ndim == 3:  # of a graph that is being traced
        return mask[:, None], False
    return ~mask if masked_is_true and mask.dtype == torch.bool else mask, False


def _alibi(how: Whole, query: Tensor, key: Tensor, mask: Tensor | None, given: Tensor | None) -> Tensor | None:
    """The bias [B or 1, H, 1, S] in float32."""
    (B, H, _, D), S = query.shape, key.shape[2]
    if how.slopes is not None:
        seen = _seen(mask) if how.counts_padding else None
        if seen is None:
            positions = torch.arange(1 - S, 1, device=query.device)
        else:
            positions = (seen.cumsum(-1) - seen.sum(-1, keepdim=True))[:, None, None]
        slopes = torch.tensor(how.slopes(H), device=query.device) if traced() else _slopes(how.slopes, H, query.device)
        return slopes[None, :, None, None] * positions
    if given is None or given.ndim == 4:  # then it is in the mask already, which a user gave
        return None
    row = given.view(B, H, 1, -1).float() / math.sqrt(D)
    return F.pad(row, (0, S - row.shape[-1])) if row.shape[-1] < S else row  # room of a static cache, never seen


@cache
def _slopes(made: Slopes, heads: int, device: torch.device) -> Tensor:
    """Copied once: no CUDA graph records a copy from the host."""
    with torch.inference_mode(False):
        return torch.tensor(made(heads), device=device)


def _seen(mask: Tensor | None) -> Tensor | None:
    """The keys that the last query sees, [B or 1, S]; None: all."""
    if mask is None:
        return None
    if isinstance(mask, DescribedMask):
        T, S = mask.shape[-2:]
        return mask.block(T - 1, T, 0, S)[:, 0, 0]  # type: ignore[index]
    return (mask if mask.dtype == torch.bool else mask == 0)[:, 0, -1]


def _windowed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of a layer whose queries see the last `window` keys only."""
    T, S = query.shape[2], key.shape[2]
    if window >= S:
        return key, value, mask
    if isinstance(mask, DescribedMask):
        return key, value, mask.windowed(window)
    if mask is not None:
        if mask.dtype == torch.bool:
            return key, value, last_keys(mask, window)
        lowest = torch.finfo(mask.dtype).min
        return key, value, mask.masked_fill(~last_keys(mask > lowest / 2, window), lowest)
    if T == 1 and not isinstance(key, Stored):
        return key[:, :, -window:], value[:, :, -window:], None
    return _windowed(query, key, value, _causal(T, S, query.device), window)


def _causal(T: int, S: int, device: torch.device, padding: Tensor | None = None) -> Tensor:
    """Queries from the first key on, or one query at the last key, described, but for a graph that is being traced.
    `padding`: the keys that are seen, bool [B, S]."""
    offset = S - T if T == 1 else 0

    def build(start: int, stop: int, first: int, last: int) -> Tensor:
        rows = torch.arange(start, stop, device=device)[:, None] + offset
        seen = (torch.arange(first, last, device=device) <= rows)[None, None]
        return seen if padding is None else seen & padding[:, None, None, first:last]

    if traced():
        return build(0, T, 0, S)
    shape = (1 if padding is None else len(padding), 1, T, S)
    if padding is None:
        return DescribedMask(shape, device, build, offset=offset, causal=True)
    runs = partial(contiguous_runs, padding)
    return DescribedMask(shape, device, build, causal=True, runs=runs, square=True, padding=padding)


def _under(mask: Tensor, T: int, S: int, window: int | None) -> Tensor:
    """An additive mask for the last T of S keys, where each also sees none after itself, and of those before it only
    the last `window`."""
    places, keys = torch.arange(S - T, S, device=mask.device)[:, None], torch.arange(S, device=mask.device)
    seen = keys <= places
    if window is not None:
        seen = seen & (keys > places - window)
    return torch.where(seen, mask, torch.finfo(mask.dtype).min)


def _additive(mask: Any, dtype: torch.dtype) -> Any:
    """As eager code takes it."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
