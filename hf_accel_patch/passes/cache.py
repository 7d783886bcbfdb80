"""The k/v cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import CacheRow, View, cache_rows, context_tokens, dtype_of, first_cached_module
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.kv import BLOCK, Bits, block_bytes
from hf_accel_patch.passes.layers import IN_PLACE
from hf_accel_patch.passes.quantized_layers import QUANTIZED
from hf_accel_patch.plan import Skip, Step

Kind = Literal["exact", "int8", "int4"]
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
RECENT = {"int8": 0, "int4": 64}  # tokens
MARK = "_hf_accel_patch"  # on a cache whose layers are ours


@dataclass(frozen=True)
class KVCache:
    """How keys and values are kept. "exact", on by default: written in place, into buffers with some room.

    "int8" and "int4": keys in blocks of 64 tokens with a scale per channel, values with one per token (arXiv
    2402.02750); the latest `recent` tokens, and the block that is not full, stay as they are. Attention reads the
    blocks directly. A prompt attends to itself in full precision, so only what is read from the cache is changed.

    Nothing is new to its users: caches are `DynamicCache` objects, whoever makes them; their layers change when a
    model's first layer meets them. A cache that crops, reorders, repeats or resets its tokens goes on doing that.
    """

    kind: Kind = "exact"
    recent: int | None = None  # tokens; None: 0 for int8, 64 for int4

    name = "cache"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"cache: unknown kind {self.kind!r}; allowed: {', '.join(map(repr, get_args(Kind)))}")
        if self.recent is not None and (self.kind == "exact" or self.recent < 0):
            raise ValueError(f"cache: recent={self.recent}; a number of tokens, for int8 and int4 only")

    def inspect(self, view: View) -> Step | Skip:
        reason = self._why_not(view)
        module = first_cached_module(view)
        if reason or module is None:
            reason = reason or "no layer of it takes a cache"
            if self.kind != "exact":
                raise UnsupportedModel(f"cache={self.kind!r}: {reason}", "leave the keyword out")
            return Skip(self, reason)
        return Step(self, {"exact": self.kind == "exact", **self._facts(view)}, (module,), of_weights=False)

    def apply(self, step: Step, journal: Journal) -> None:
        (module,) = step.work
        journal.add_forward_pre_hook(module, Converting(self))

    def layer_classes(self) -> Mapping[type, type]:
        """What a layer of each of transformers' classes becomes."""
        return IN_PLACE if self.kind == "exact" else {**IN_PLACE, **QUANTIZED}

    def _why_not(self, view: View) -> str:
        if view.config.is_encoder_decoder:
            return "it is an encoder-decoder, with a cache for each"
        if not view.model._supports_default_dynamic_cache():
            return "transformers gives it no k/v cache"
        try:
            kinds = {type(layer) for layer in DynamicCache(config=view.config).layers}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return f"transformers makes no cache from its configuration: {error}"
        if not kinds & set(self.layer_classes()):
            return f"its cache holds no keys and values: {', '.join(sorted(kind.__name__ for kind in kinds))}"
        return ""

    def _facts(self, view: View) -> dict[str, Any]:
        """Bytes of the cache of one sequence of the model's full context, without and with this pass."""
        context, rows = context_tokens(view.config), cache_rows(view)
        width = dtype_of(view.model).itemsize
        before = after = 0
        for row in rows if context else ():
            tokens = min(context, row.window - 1) if row.window else context
            exact = tokens * row.heads * (row.key_size + row.value_size) * width
            before += exact
            after += exact if self.kind == "exact" else self._packed_bytes(tokens, row, width)
        facts = {"bytes_before": before, "bytes_after": after, "kind": self.kind, "layers": len(rows)}
        return facts | {"context": context} if context else facts

    def _packed_bytes(self, tokens: int, row: CacheRow, width: int) -> int:
        blocks = max(0, tokens - self.latest) // BLOCK
        rest = max(tokens - blocks * BLOCK, self.latest + BLOCK)
        latest = min(rest, tokens) * (row.key_size + row.value_size) * width
        return row.heads * (blocks * block_bytes(row.key_size, row.value_size, self.bits) + latest)

    @property
    def bits(self) -> Bits:
        """Of a packed number."""
        return BITS[self.kind]

    @property
    def latest(self) -> int:
        """Tokens that are never packed."""
        return RECENT.get(self.kind, 0) if self.recent is None else self.recent


@dataclass(frozen=True)
class Converting:
    """The hook on the first layer that meets a cache: whatever made it, its layers become ours, once."""

    options: KVCache

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((each for each in (*kwargs.values(), *args) if isinstance(each, Cache)), None)
        if cache is None or torch.compiler.is_compiling() or vars(cache).get(MARK) == self.options:
            return
        classes = self.options.layer_classes()
        for layer in cache.layers:
            if type(layer) in classes:
                self._convert(layer, classes[type(layer)])
        if cache.layer_class_to_replicate in classes:
            cache.layer_class_to_replicate = partial(self._new, classes[cache.layer_class_to_replicate])
        vars(cache)[MARK] = self.options

    def _convert(self, layer: Any, kind: type) -> None:
        keys, values = (vars(layer).pop(name, None) for name in ("keys", "values"))
        layer.__class__ = kind
        layer.tell(self.options)
        if keys is not None and keys.numel():
            layer.take(keys, values)

    def _new(self, kind: type) -> Any:
        layer = kind()
        layer.tell(self.options)
        return layer
