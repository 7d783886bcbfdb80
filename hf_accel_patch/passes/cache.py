"""The k/v cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import (
    CacheRow,
    View,
    cache_rows,
    context_tokens,
    dtype_of,
    first_cached_module,
    rotary_tokens,
)
from hf_accel_patch.families.rotation import Moves, moves
from hf_accel_patch.families.tables import table_modules
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.kv import BLOCK, Bits, block_bytes
from hf_accel_patch.passes.graphs import asked, by_default, counted, install
from hf_accel_patch.passes.hybrid_layers import QUANTIZED
from hf_accel_patch.passes.layers import IN_PLACE
from hf_accel_patch.passes.offloaded_layers import HOST, OFFLOADED
from hf_accel_patch.passes.prefixes import PrefillWithPrefixes, PrefixCache
from hf_accel_patch.passes.replaying import Graphs
from hf_accel_patch.passes.streaming import STREAM, STREAMING, Advancing, PrefillInChunks, Stream
from hf_accel_patch.plan import Skip, Step, size_in_bytes

Kind = Literal["exact", "int8", "int4", "sinks"]
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
RECENT = {"int8": 0, "int4": 64}  # tokens
MARK = "_hf_accel_patch"  # on a cache whose layers are ours


@dataclass(frozen=True)
class KVCache:
    """How keys and values are kept. "exact", on by default: written in place, into buffers with some room.

    "int8" and "int4": keys in blocks of 64 tokens with a scale per channel, values with one per token (arXiv
    2402.02750); the latest `recent` tokens, and the block that is not full, stay as they are. Attention reads the
    blocks directly. A prompt attends to itself in full precision, so only what is read from the cache is changed.

    "sinks": the first `sinks` tokens and the latest ones, at most `window` tokens with the new ones, at positions
    counted in the window (StreamingLLM, arXiv 2309.17453): `generate` without end in constant memory. Layers that have
    a sliding window keep their own.

    `offload`: of long texts only so many of the latest tokens stay where the model is; the older ones go to the host's
    memory, as they are or in 8 or 4 bits. Every step reads them over the bus: for GPUs whose memory is short.

    `graphs`: steps of `generate` over an exact cache are recorded once and replayed without Python: on an NVIDIA GPU as
    CUDA graphs, on an x86 CPU by compiled code. Buffers then have room for all tokens to come, and stay where they are.
    What does not fit runs as before; `report` says why. False switches it off; True is an error where it cannot be.

    Nothing is new to its users: caches are `DynamicCache` objects, whoever makes them; their layers change when a
    model's first layer meets them. A cache that crops, reorders, repeats or resets its tokens goes on doing that.

    >>> model = patch(model, cache=KVCache("int4", recent=128))
    """

    kind: Kind = "exact"
    recent: int | None = None  # tokens; None: 0 for int8, 64 for int4
    window: int | None = None  # tokens, for "sinks"
    sinks: int = 4  # tokens
    offload: int | None = None  # tokens that stay on the model's device, at least a block of 64; None: all
    prefixes: PrefixCache | int | str | None = None  # bytes, as a number or like "2GiB", for prompts that begin alike
    graphs: bool | None = None  # steps are recorded and replayed; None: where the model is on an NVIDIA GPU or x86 CPU

    name = "cache"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"cache: unknown kind {self.kind!r}; allowed: {', '.join(map(repr, get_args(Kind)))}")
        if self.recent is not None and (self.kind not in BITS or self.recent < 0):
            raise ValueError(f"cache: recent={self.recent}; a number of tokens, for int8 and int4 only")
        if (self.window is None) == (self.kind == "sinks"):
            raise ValueError(f"cache: window={self.window} for {self.kind!r}; 'sinks' needs one, the others have none")
        if self.sinks < 1 or (self.window is not None and self.window < 2 * self.sinks):
            raise ValueError(f"cache: {self.sinks} sinks in a window of {self.window}; allowed: 1 to half of it")
        counts = isinstance(self.offload, int) and not isinstance(self.offload, bool) and self.offload >= BLOCK
        if self.offload is not None and (self.kind == "sinks" or not counts):
            raise ValueError(
                f"cache: offload={self.offload!r} with {self.kind!r}; a number of tokens from {BLOCK} on, "
                "not for 'sinks'"
            )
        if self.prefixes is not None and self.kind == "sinks":
            raise ValueError("cache: prefixes with 'sinks', which forgets how a prompt begins; use another kind")
        if isinstance(self.prefixes, int | str):
            size_in_bytes(self.prefixes)
        if self.graphs and (self.kind != "exact" or self.offload is not None):
            raise ValueError(f"cache: graphs with {self._asked}; allowed: the exact cache, where the model is")

    def inspect(self, view: View) -> Step | Skip:
        reason = self._why_not(view)
        module = first_cached_module(view)
        if reason or module is None:
            reason = reason or "no layer of it takes a cache"
            if self.kind != "exact" or self.offload is not None or self.graphs:
                raise UnsupportedModel(f"cache={self._asked}: {reason}", "leave the keyword out")
            return Skip(self, reason)
        found = self._moves(view) if self.kind == "sinks" else self._rotations(view)
        if self.prefixes is not None:
            self._check_prefixes(view)
        graphs = self._graphs(view)
        facts = {"exact": self.kind == "exact", **self._facts(view), **(graphs.facts() if graphs else {})}
        return Step(self, facts, (view, module, found, context_tokens(view.config), graphs), of_weights=False)

    def apply(self, step: Step, journal: Journal) -> None:
        view, module, found, context, graphs = step.work
        model = view.model
        stream = None
        if self.window is not None:
            stream = Stream(self.window, self.sinks, max(2 * self.window, rotary_tokens(view.config) or 0))
            journal.add_forward_pre_hook(model.get_decoder(), Advancing(found))
            half = max(1, (self.window - self.sinks) // 2)
            chunks = PrefillInChunks(half, context or self.window, _bound(model, "_prefill"))
            journal.bind_method(model, "_prefill", chunks)
        rotations = tuple(move.rotation if move.part == 0 else None for move in found) if self.kind in BITS else ()
        converting = Converting(self, stream, rotations)
        journal.add_forward_pre_hook(module, converting)
        if self.prefixes is not None:
            prefixes = PrefixCache(self.prefixes) if isinstance(self.prefixes, int | str) else self.prefixes
            prefixes.open(view)
            prefill = PrefillWithPrefixes(prefixes, converting, _bound(model, "_prefill"))
            journal.bind_method(model, "_prefill", prefill)
        if graphs is not None:
            install(graphs, model, journal)

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """What was recorded and replayed so far, if that was asked for."""
        return counted(model)

    def _graphs(self, view: View) -> Graphs | None:
        if self.graphs is None:
            return by_default(view) if self.kind == "exact" and self.offload is None else None
        return asked(view) if self.graphs else None

    def layer_classes(self) -> Mapping[type, type]:
        """What a layer of each of transformers' classes becomes."""
        if self.kind == "sinks":
            return STREAMING
        kinds = IN_PLACE if self.kind == "exact" else {**IN_PLACE, **QUANTIZED}
        return kinds if self.offload is None else {**kinds, **OFFLOADED}

    def _check_prefixes(self, view: View) -> None:
        kept = {kind for kind, ours in self.layer_classes().items() if vars(ours).get("restores", True)}
        layers = DynamicCache(config=view.config).layers
        if other := sorted({type(layer).__name__ for layer in layers if type(layer) not in kept}):
            raise UnsupportedModel(f"cache: prefixes of layers of kind {', '.join(other)}", "leave prefixes out")
        if isinstance(self.prefixes, PrefixCache):
            self.prefixes.check(view)

    def _moves(self, view: View) -> tuple[Moves, ...]:
        """How what is cached moves to other positions."""
        kinds = {type(layer) for layer in DynamicCache(config=view.config).layers if isinstance(layer, DynamicLayer)}
        if other := kinds - STREAMING.keys():
            reason = f"layers of kind {', '.join(sorted(kind.__name__ for kind in other))} have states that cannot move"
            raise UnsupportedModel(f"cache='sinks': {reason}", "leave the keyword out")
        if DynamicLayer not in kinds:
            raise UnsupportedModel(
                "cache='sinks': every layer has a sliding window of its own, so its memory is constant already",
                "leave the keyword out",
            )
        planned = next(view.model.parameters()).is_meta
        if planned and (view.rotary_modules() or table_modules(view)):
            return ()
        found = () if planned else moves(view)
        if not found or all(move.rotation is None for move in found):
            raise UnsupportedModel(
                "cache='sinks': its positions are not rotations of the cached keys, which could be moved",
                "leave the keyword out",
            )
        return tuple(found)

    def _rotations(self, view: View) -> tuple[Moves, ...]:
        """The same for keys with a bias, whose constant part a quantized cache holds apart."""
        biased = any(
            isinstance(part, nn.Linear) and part.bias is not None
            for _, module in view.attention_modules()
            for part in module.modules()
        )
        if self.kind not in BITS or not biased or next(view.model.parameters()).is_meta:
            return ()
        return tuple(moves(view) or ())

    def _why_not(self, view: View) -> str:
        if view.config.is_encoder_decoder:
            return "it is an encoder-decoder, with a cache for each"
        if not view.model._supports_default_dynamic_cache():
            return "transformers gives it no k/v cache"
        try:
            kinds = {type(layer) for layer in DynamicCache(config=view.config).layers}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return f"transformers makes no cache from its configuration: {error}"
        if self.offload is not None and DynamicLayer not in kinds:
            return "every layer has a sliding window of its own, so its memory is small already"
        if self.offload is not None and next(view.model.parameters()).device.type == HOST:
            return "the model is in the host's memory, as is its cache"
        needed = QUANTIZED if self.kind in BITS else self.layer_classes()
        if not kinds & needed.keys():
            return f"its cache holds no keys and values: {', '.join(sorted(kind.__name__ for kind in kinds))}"
        return ""

    def _facts(self, view: View) -> dict[str, Any]:
        """Bytes of the cache of one sequence, of the context that was asked for or else of the model's full one,
        without and with this pass."""
        context, rows = view.context or context_tokens(view.config) or 0, cache_rows(view)
        width = dtype_of(view.model).itemsize
        before = after = host = 0
        for row in rows:
            tokens = min(context, row.window - 1) if row.window else context
            exact = tokens * row.heads * (row.key_size + row.value_size) * width
            before += exact
            packs = self.kind in BITS and row.kind in QUANTIZED
            packed = self._packed_bytes(tokens, row, width) if packs else exact
            if self.offload is not None and row.kind in OFFLOADED:
                stays = row.heads * min(tokens, self.latest + BLOCK) * (row.key_size + row.value_size) * width
                host, packed = host + packed - stays, stays
            after += packed
            if self.window is not None and row.window is None:
                after -= exact - exact * min(self.window, tokens) // max(tokens, 1)
        facts = {"bytes_before": before, "bytes_after": after, "kind": self.kind, "layers": len(rows)}
        facts |= {"context": context} if context else {}
        return facts if self.offload is None else facts | {"host_bytes": host}

    def _packed_bytes(self, tokens: int, row: CacheRow, width: int) -> int:
        blocks = max(0, tokens - self.latest) // BLOCK
        rest = max(tokens - blocks * BLOCK, self.latest + BLOCK)
        latest = min(rest, tokens) * (row.key_size + row.value_size) * width
        return row.heads * (blocks * block_bytes(row.key_size, row.value_size, self.bits) + latest)

    @property
    def bits(self) -> Bits:
        """Of a packed number."""
        return BITS.get(self.kind, 16)

    @property
    def latest(self) -> int:
        """Tokens that are never packed."""
        recent = RECENT.get(self.kind, 0) if self.recent is None else self.recent
        return max(recent, self.offload or 0)

    @property
    def _asked(self) -> str:
        more = "" if self.offload is None else f", offload={self.offload}"
        more += ", graphs=True" if self.graphs else ""
        return f"KVCache({self.kind!r}{more})" if more else repr(self.kind)


@dataclass(frozen=True)
class Converting:
    """The hook on the first layer that meets a cache: whatever made it, its layers become ours, once."""

    options: KVCache
    stream: Stream | None = None  # as it starts
    rotations: tuple[Any, ...] = field(default=(), repr=False)  # of each layer that holds keys, or none

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((each for each in (*kwargs.values(), *args) if isinstance(each, Cache)), None)
        if cache is not None and not torch.compiler.is_compiling():
            self.convert(cache)

    def convert(self, cache: Cache) -> None:
        """Make the layers of a cache ours, with what they hold. A second time changes nothing."""
        mark = vars(cache).get(MARK)
        if mark is self.options or mark == self.options:
            return
        if isinstance(cache, EncoderDecoderCache):
            self.convert(cache.self_attention_cache)
            self.convert(cache.cross_attention_cache)
            vars(cache)[MARK] = self.options
            return
        classes = self.options.layer_classes()
        holding = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
        rotations = self.rotations if len(self.rotations) == len(holding) else (None,) * len(holding)
        for layer, rotate in zip(holding, rotations, strict=True):
            if type(layer) in classes:
                self._convert(layer, classes[type(layer)], rotate)
        if cache.layer_class_to_replicate in classes:
            cache.layer_class_to_replicate = partial(_new, classes[cache.layer_class_to_replicate], self.options)
        vars(cache)[MARK] = self.options
        if self.stream is not None:
            vars(cache)[STREAM] = replace(self.stream)

    def _convert(self, layer: Any, kind: type, rotate: Any) -> None:
        keys, values = (vars(layer).pop(name, None) for name in ("keys", "values"))
        layer.__class__ = kind
        layer.tell(self.options, rotate)
        if keys is not None and keys.ndim == 4:
            layer.take(keys, values)


def _bound(model: nn.Module, name: str) -> Any:
    """The function that another pass has bound to this model, if any."""
    return getattr(vars(model).get(name), "__func__", None)


def _new(kind: Any, options: KVCache) -> Any:
    layer = kind()
    layer.tell(options, None)
    return layer
