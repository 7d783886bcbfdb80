"""What differs between the supported versions of transformers. Nothing else in the package asks for a version.

Each entry names the first version that has the newer form, and is found by looking, not by comparing versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:
    _collector = None

# 5.24 says `cache` where models and `generate` said `past_key_values`, in what they take and in what they return. The
# old name still works, with a warning.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
CACHE_NAMES = tuple(dict.fromkeys((CACHE, "past_key_values", "layer_past")))  # layer_past: hand-written attention


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model, of one of its modules or of `generate`, or None."""
    return next((found for name in CACHE_NAMES if (found := arguments.get(name)) is not None), None)


def weights_collected() -> bool:
    """Whether the current call of a model gathers attention weights, which not every model tells its attention. Since
    5.2 hooks gather them."""
    return _collector is not None and "attentions" in (_collector.get() or {})


def returned_cache(outputs: Any) -> Any:
    """The cache in what a model returned."""
    return getattr(outputs, CACHE)


# Since 5.15 windows can be told to keep what leaves them, so that tokens can be taken back, and `crop` counts tokens
# that go, as a negative number. Before, a positive number, and before 5.14 also 0, were the tokens that stay.
RECORDS_PAST = hasattr(DynamicSlidingWindowLayer, "activate_past_recording")


# As late as that, models with recurrent states and convolutions go on from those of a first part of a prompt when more
# than one token comes: at 5.17 nearly all do, at 5.5 none.
GOES_ON = RECORDS_PAST


def record_past(cache: Any) -> None:
    """Let all layers of a cache keep what may be taken back."""
    if RECORDS_PAST:
        cache.activate_past_recording()


def to_remove(argument: int, length: int) -> int:
    """How many of `length` tokens an argument of `crop` takes away. ValueError for one that means two things."""
    if argument > 0 and RECORDS_PAST:
        raise ValueError(f"crop({argument}): give the number of tokens to remove, as a negative number")
    return max(0, length - argument) if argument > 0 else min(length, -argument)


def take_back(held: Any, tokens: int) -> None:
    """Let a cache or one of its layers forget its last tokens; windows that kept more go back to their size."""
    if tokens or RECORDS_PAST:
        held.crop(-tokens)


def _layer(name: str) -> Any:
    """One of transformers' cache layers, or where it does not have it, a class that no cache uses."""
    return getattr(cache_utils, name, None) or type(name, (DynamicLayer,), {})


DynamicIndexedLayer = _layer("DynamicIndexedLayer")  # since 5.11
LinearAttentionLayer = _layer("LinearAttentionLayer")  # since 5.5
LinearAttentionAndFullAttentionLayer = _layer("LinearAttentionAndFullAttentionLayer")  # since 5.5
LinearAttentionAndSlidingWindowAttentionLayer = _layer("LinearAttentionAndSlidingWindowAttentionLayer")  # since 5.13
