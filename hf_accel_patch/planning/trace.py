"""What a prompt takes beside weights and cache: found by running the model on the meta device, where nothing is
computed and every tensor still has a size and a life.

The model's own forward runs, so its order of operations counts, and not a formula per architecture. What the meta
device would do otherwise than a CPU or a GPU is told apart: PyTorch's fused attention stores no scores, experts do not
look at their tokens, and products with quantized weights unpack them block by block. Working memory inside of
PyTorch's own kernels is not seen.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.initialization import no_init_weights

from hf_accel_patch.compat import CACHE
from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import CacheRow, View, bind, cache_rows, dtype_of, layer_list
from hf_accel_patch.families.weights import linear_weights
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.passes.attention import SELECTED, Attention
from hf_accel_patch.passes.cache import BITS, KVCache
from hf_accel_patch.passes.calibrate import evaluating
from hf_accel_patch.passes.grouped import shared_of, shrink
from hf_accel_patch.passes.handwritten import EXTENDED_KEY, KEY
from hf_accel_patch.plan import Step
from hf_accel_patch.planning.pieces import Update, fill, later
from hf_accel_patch.planning.stand_ins import Products, experts, implementation

FIRST = 16  # tokens that are run before a piece, to learn what is cached
PLACES = ("idx", "index", "layer_id", "layer_number")  # in the names of attributes that say where a layer stands


@dataclass(frozen=True)
class Traced:
    """Of one forward over a prompt: the most that lives at a time beside weights and cache; what each layer caches; the
    bytes that stock's cache holds right after it, and of these what are no keys and values. `problem`: why the model
    could not be run, so that the activations are a rule of thumb."""

    activations: int
    rows: tuple[CacheRow, ...]
    held: int
    states: int
    problem: str = ""


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operators make until they are freed."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = (*known.parameters(), *known.buffers())
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._known = [tensor.untyped_storage() for tensor in tensors]  # weights, which are there already
        self._weights = {storage._cdata for storage in self._known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(each, Tensor):
                self._note(each)
        return result

    def release(self, tensors: list[Tensor]) -> int:
        """These belong to somebody else from now on; returns the bytes of their storages."""
        total = 0
        for storage in {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values():
            total += storage.nbytes()
            if storage._cdata not in self._weights:
                self._weights.add(storage._cdata)
                self._known.append(storage)
                self._forget(storage._cdata)
        return total

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._weights:
            return
        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, partial(self._freed, key))
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)

    def _freed(self, key: int, _: Any) -> None:
        self._forget(key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._references.pop(key, None)


def traced(
    view: View,
    tokens: int,
    batch: int,
    *,
    ours: bool,
    cache: KVCache | None = None,
    quantized: frozenset[str] = frozenset(),
    past: int = 0,
) -> Traced:
    """One forward over `tokens` of `batch` sequences, of a model on the meta device, after `past` tokens that are in
    the cache. `ours`: with this package's attention and experts; `cache`: of which kind, None for transformers' own.
    `quantized`: the names of the modules whose weights are quantized by then."""
    model, journal = view.model, Journal()
    try:
        with torch.no_grad():
            journal.set_attribute(model.config, "pad_token_id", None)  # else the prompt is searched for it
            if ours:
                decided = Attention().inspect(view)
                if isinstance(decided, Step):
                    decided.by.apply(decided, journal)
            modules = dict(model.named_modules())
            taken = [
                modules.get(name.replace(".base_layer", ""), modules.get(name)) for name in quantized
            ]  # of adapters
            weights = {id(p) for part in taken if part is not None for p in part._parameters.values() if p is not None}
            for name, module in modules.items():
                found = linear_weights(module)
                if not isinstance(found, str) and found[0] == "experts":
                    way = "codes" if name in quantized else "pieces" if ours else implementation(module)
                    journal.set_attribute(module, "forward", partial(experts, module, way))
            return _run(view, tokens, batch, weights, cache, past)
    except Exception as error:  # whatever the forward of a model wants to know of values, which are not there
        return _by_rule(view, tokens, batch, " ".join(f"{type(error).__name__}: {error}".split())[:160])
    finally:
        journal.undo()


def _run(view: View, tokens: int, batch: int, quantized: set[int], kept: KVCache | None, past: int) -> Traced:
    model: Any = view.model
    living, cache = Living(model), DynamicCache(config=view.config)
    noted: dict[int, CacheRow] = {}
    packed = kept is not None and kept.kind in BITS and not past  # a whole prompt attends to itself
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer):
            vars(layer)["update"] = partial(_update, layer, living, noted, index, packed)
    options: dict[str, Any] = {CACHE: cache, "use_cache": True}
    options |= {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    ids = torch.empty(batch, tokens, dtype=torch.int64, device="meta")
    with _first_of_kinds(view, cache) as like, evaluating(model), Products(quantized):
        if past:
            model(input_ids=ids[:, :1].expand(-1, min(past, FIRST)), **options)
            _go_on(cache, living, noted, kept, past, tokens)
        with living:
            model(input_ids=ids, **options)
    rows, held, states = [], 0, 0
    for index in like or range(len(cache.layers)):
        contents = {name: _tensors(value) for name, value in vars(cache.layers[index]).items()}
        keys = [*contents.pop("keys", ()), *contents.pop("values", ())]
        others = living.release([each for found in contents.values() for each in found if each.is_meta])
        rows += [noted[index]] if index in noted else []
        held, states = held + living.release(keys) + others, states + others
    return Traced(living.most, tuple(rows), held, states)


def _go_on(
    cache: Any, living: Living, noted: dict[int, CacheRow], kept: KVCache | None, past: int, tokens: int
) -> None:
    """Let the layers that have been met hold `past` tokens, and take `tokens` more as a cache of this kind does."""
    for index, row in noted.items():
        layer = cache.layers[index]
        fill(layer, row, past)
        update, own = later(layer, row, kept, past, tokens)
        living.release(own)
        if update is not None:
            vars(layer)["update"] = partial(_as_ours, update)
    for layer in cache.layers:
        living.release([each for value in vars(layer).values() for each in _tensors(value)])


def _as_ours(update: Update, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
    return update(keys, values)


def _update(
    layer: Any,
    living: Living,
    noted: dict[int, CacheRow],
    index: int,
    packed: bool,
    keys: Tensor,
    values: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`update` of a layer of the cache, whose keys and values are counted apart."""
    window = getattr(layer, "sliding_window", None)
    noted[index] = CacheRow(keys.shape[1], keys.shape[-1], values.shape[-1], window, type(layer))
    if packed:
        return keys, values
    result = type(layer).update(layer, keys, values, *args, **kwargs)
    living.release([*_tensors(layer.keys), *_tensors(layer.values)])
    return result


@contextmanager
def _first_of_kinds(view: View, cache: Any) -> Iterator[list[int]]:
    """Inside, the model ends after the first two layers of each kind, for what is alive in the first is less; yields,
    for each layer that it has, which of those is like it, or nothing where all run."""
    try:
        layers = layer_list(view)
    except UnsupportedModel:
        yield []
        return
    kinds = [_kind(layer, held) for layer, held in zip(layers, cache.layers, strict=False)]
    count = 1 + max((i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2), default=0)
    if len(layers) != len(cache.layers) or count >= len(layers):
        yield []
        return
    places = [
        (module, name) for module in view.model.modules() for name, part in module._modules.items() if part is layers
    ]
    for module, name in places:
        module._modules[name] = nn.ModuleList(list(layers)[:count])
    try:
        yield [kinds.index(kind) for kind in kinds]
    finally:
        for module, name in places:
            module._modules[name] = layers


def _kind(layer: nn.Module, held: Any) -> tuple[Any, ...]:
    """What tells two layers apart, but for their places: modules, shapes of weights, plain attributes; and what the
    cache keeps of it."""
    described: list[Any] = [type(held), getattr(held, "sliding_window", None)]
    for name, module in layer.named_modules():
        described += [name, type(module), *(tuple(p.shape) for p in module._parameters.values() if p is not None)]
        plain = (str, bool, int, float)
        described += [
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, plain) and not any(part in key for part in PLACES)
        ]
    return tuple(described)


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


def _by_rule(view: View, tokens: int, batch: int, problem: str) -> Traced:
    """Where the model cannot be run: a layer's widest features three times, and what is handed from layer to layer."""
    found = (linear_weights(module) for _, module in view.named_modules())
    head = view.model.get_output_embeddings()
    widest = [w.shape[0] for each in found if not isinstance(each, str) for w in each[1] if not w.experts]
    vocabulary = head.weight.shape[0] if isinstance(head, nn.Linear) else 0
    width = dtype_of(view.model).itemsize
    features = max((size for size in widest if size != vocabulary), default=0)
    try:
        rows = tuple(cache_rows(view))
    except (AttributeError, KeyError, TypeError, ValueError):
        rows = ()
    held = sum(
        min(tokens, row.window - 1 if row.window else tokens) * row.heads * (row.key_size + row.value_size)
        for row in rows
    )
    hidden = getattr(view.config, "hidden_size", 0)
    return Traced(tokens * batch * width * (3 * features + 3 * hidden), rows, held * batch * width, 0, problem)


def twin(view: View) -> View:
    """The same architecture in float weights on the meta device, to be run there."""
    model, config = view.model, copy.deepcopy(view.model.config)
    for each in (config, config.get_text_config(decoder=True)):
        for name in ("quantization_config", "_is_quantized"):
            vars(each).pop(name, None)
        if vars(each).get(SELECTED) in (KEY, EXTENDED_KEY):  # the model is patched
            vars(each)[SELECTED] = None
    kind: Any = type(model)
    with torch.device("meta"), no_init_weights():
        made = kind._from_config(config, dtype=dtype_of(model))
    made.tie_weights()  # which goes with the initialization that is left out
    if (shared := shared_of(model)) is not None:  # the class knows nothing of fewer heads
        shrink(made, shared, Journal())
    return bind(made)


def quantized_names(view: View) -> frozenset[str]:
    """The modules whose weights are codes."""
    return frozenset(name for name, module in view.model.named_modules() if isinstance(module, QuantizedModule))
