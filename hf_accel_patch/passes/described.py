"""Masks for the package's attention: described where they would be large, and as stock stores them where not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hf_accel_patch.families.handwritten import CHANGES_MASKS
from hf_accel_patch.ops.decode import MOST_TOKENS
from hf_accel_patch.ops.mask import Carried, DescribedMask, contiguous_runs

DENSE_ELEMENTS = 1 << 18  # masks up to this size, or of few queries, are stored: to describe them saves little


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function behind our key: what stock's `sdpa` gets, or a description of it where that would be large.

    None stands for plain causal attention, as it does under `sdpa`. A model that does something with its mask first
    gets it wrapped.
    """
    if getattr(kwargs.get("config"), "model_type", None) in CHANGES_MASKS:
        return _carried(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device, **kwargs)
    both_ways = kwargs.pop("allow_is_bidirectional_skip", False)  # None stands for attention to everything
    dense = partial(sdpa_mask, batch_size=batch_size, attention_mask=attention_mask, device=device, **kwargs)
    small = q_length <= MOST_TOKENS or batch_size * q_length * kv_length <= DENSE_ELEMENTS
    if small or traced() or isinstance(q_offset, Tensor):
        options = {"local_size": local_size, "allow_is_causal_skip": allow_is_causal_skip}
        options |= {"allow_is_bidirectional_skip": True} if both_ways else {}
        return dense(q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, **options)
    windowed = local_size is not None and kv_length >= local_size
    square = q_length == kv_length and not windowed and allow_is_causal_skip and q_offset == 0
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    whole = attention_mask is None or (attention_mask.shape[-1] >= kv_length and bool(attention_mask.all()))
    if (square or (both_ways and not windowed)) and whole:  # keys beyond the end of a mask are not seen
        return None

    aligned = square and plain and attention_mask is not None and attention_mask.shape == (batch_size, q_length)

    def build(start: int, stop: int, first: int, last: int) -> Tensor:
        return dense(
            q_length=stop - start,
            kv_length=last - first,
            q_offset=q_offset + start,
            kv_offset=kv_offset + first,
            allow_is_causal_skip=False,
        )

    def runs() -> list[tuple[int, int]] | None:
        return contiguous_runs(attention_mask) if aligned and attention_mask is not None else None

    return DescribedMask(
        (batch_size, 1, q_length, kv_length),
        torch.device(device),
        build,
        offset=q_offset - kv_offset,
        causal=allow_is_causal_skip,
        window=local_size if windowed else None,
        runs=runs,
        square=aligned,
        padding=attention_mask if aligned else None,
    )


def _carried(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
    **kwargs: Any,
) -> Tensor:
    """The mask of a model that converts it (MPT) or adds ALiBi to it (Falcon) before its attention gets it: a tensor
    [B, T, S], which both leave alone."""
    recorded = traced()
    skip = not isinstance(q_offset, Tensor) and not recorded
    if q_length == 1 and not isinstance(q_offset, Tensor):  # the first of a static cache, whose other places are empty
        skip = skip and q_offset + 1 >= kv_offset + kv_length
    rest = {name: value for name, value in kwargs.items() if name != "config"}
    sizes = batch_size, q_length, kv_length, q_offset, kv_offset
    content = describe_mask(*sizes, attention_mask, allow_is_causal_skip=skip, device=device, **rest)
    if recorded and content is not None:
        return content[:, 0]
    return Carried(content, (batch_size, q_length, kv_length), torch.device(device))


def fitting(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A mask that a user gave, [B or 1, H or 1, T or 1, S] for these scores; one column may stand for all keys. Raises
    RuntimeError for another shape, as adding it to scores does: kernels read what they expect there."""
    if type(mask) is not Tensor or traced():
        return mask
    given = mask.shape
    if len(given) == 4 and given[-1] == shape[-1] and all(a in (1, b) for a, b in zip(given, shape, strict=True)):
        return mask
    return mask.broadcast_to(shape)


def traced() -> bool:
    """Whether operators are recorded instead of run."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
