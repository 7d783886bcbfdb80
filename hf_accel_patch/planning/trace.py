"""What a prompt takes beside weights and cache: found by running the model on the meta device, where nothing is
computed and every tensor still has a size and a life.

The model's own forward runs, so its order of operations counts, and not a formula per architecture. What the meta
device would do otherwise than a CPU or a GPU is told apart: PyTorch's fused attention stores no scores, experts do not
look at their tokens, and products with quantized weights unpack them block by block. Working memory inside of
PyTorch's own kernels is not seen.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.initialization import no_init_weights

from hf_accel_patch.families import CacheRow, View, bind, cache_rows, dtype_of
from hf_accel_patch.families.weights import linear_weights
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.experts import Routed, piece_tokens
from hf_accel_patch.ops.linear import UNPACK_ELEMENTS
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.passes.attention import Attention
from hf_accel_patch.passes.quantize import Quantize
from hf_accel_patch.plan import Step

BUSIEST = 2  # times its share of the tokens goes to the expert that gets most of them, where experts go one by one


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
            if storage._cdata in self._sizes:
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


class Products(TorchFunctionMode):
    """Products and attention as they are on a real device. `quantized`: by id, the parameters whose codes are used."""

    def __init__(self, quantized: set[int]) -> None:
        super().__init__()
        self.quantized = quantized

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        if func is F.linear and id(args[1]) in self.quantized:
            return _product(args[0], args[1].shape[0], *args[2:], **kwargs)
        if func is torch.addmm and id(args[2]) in self.quantized:
            return _product(args[1], args[2].shape[1], args[0])
        return func(*args, **kwargs)


def traced(view: View, tokens: int, batch: int, *, ours: bool, quantized: frozenset[str] = frozenset()) -> Traced:
    """One forward over `tokens` of `batch` sequences, of a model on the meta device. `ours`: with this package's
    attention and prefill. `quantized`: the names of the modules whose weights are quantized by then."""
    model, journal = view.model, Journal()
    try:
        with torch.no_grad():
            journal.set_attribute(model.config, "pad_token_id", None)  # else the prompt is searched for it
            if ours:
                decided = Attention().inspect(view)
                if isinstance(decided, Step):
                    decided.by.apply(decided, journal)
            modules = dict(model.named_modules())
            weights = {id(p) for name in quantized for p in modules[name]._parameters.values() if p is not None}
            for name, module in modules.items():
                found = linear_weights(module)
                if not isinstance(found, str) and found[0] == "experts":
                    way = "codes" if name in quantized else "pieces" if ours else _implementation(module)
                    journal.set_attribute(module, "forward", partial(_experts, module, way))
            return _run(view, tokens, batch, weights)
    except Exception as error:  # whatever the forward of a model wants to know of values, which are not there
        return _by_rule(view, tokens, batch, " ".join(f"{type(error).__name__}: {error}".split())[:160])
    finally:
        journal.undo()


def _run(view: View, tokens: int, batch: int, quantized: set[int]) -> Traced:
    model: Any = view.model
    living = Living(model)
    cache = DynamicCache(config=view.config)
    noted: dict[int, CacheRow] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer):
            vars(layer)["update"] = partial(_update, layer, living, noted, index)
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    ids = torch.empty(batch, tokens, dtype=torch.int64, device="meta")
    with _evaluating(model), living, Products(quantized):
        model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
    keys = [each for layer in cache.layers for name in ("keys", "values") for each in _tensors(vars(layer).get(name))]
    others = [
        each
        for layer in cache.layers
        for name, value in vars(layer).items()
        if name not in ("keys", "values")
        for each in _tensors(value)
        if each.is_meta
    ]
    states = living.release(others)
    return Traced(living.most, tuple(noted[index] for index in sorted(noted)), living.release(keys) + states, states)


def _update(
    layer: Any, living: Living, noted: dict[int, CacheRow], index: int, keys: Tensor, values: Tensor, *a: Any, **kw: Any
) -> Any:
    """`update` of a layer of the cache, whose keys and values are counted apart."""
    window = getattr(layer, "sliding_window", None)
    noted[index] = CacheRow(keys.shape[1], keys.shape[-1], values.shape[-1], window, type(layer))
    result = type(layer).update(layer, keys, values, *a, **kw)
    living.release([*_tensors(layer.keys), *_tensors(layer.values)])
    return result


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, which would take memory of its own."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _attention(
    func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """PyTorch's kernels: fused where the sizes of heads are equal, and their number is or is said not to be, with a
    mask of true and false made into numbers; else with all scores, as on the meta device."""
    grouped = query.shape[1] != key.shape[1] and not kwargs.get("enable_gqa")
    if query.shape[-1] != value.shape[-1] or grouped:
        result: Tensor = func(query, key, value, attn_mask, *args, **kwargs)
        return result
    mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else None
    B, H, T, _ = query.shape
    output = query.new_empty(B, T, H, value.shape[-1]).transpose(1, 2)
    del mask
    return output


def _product(x: Tensor, features: int, bias: Tensor | None = None) -> Tensor:
    """A product with codes, of more rows of activations than the kernels for single tokens take."""
    K, dtype = x.shape[-1], x.dtype
    rows = x.reshape(-1, K).to(torch.bfloat16).contiguous()
    y = rows.new_empty(len(rows), features)
    block = rows.new_empty(min(UNPACK_ELEMENTS, features * K))
    del block, rows
    y = y.to(dtype).view(*x.shape[:-1], features)
    return y if bias is None else y + bias


def _implementation(module: Any) -> str:
    return str(getattr(module.config, "_experts_implementation", None) or "eager")


def _experts(module: Any, way: str, hidden: Tensor, index: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Experts whose tokens are spread evenly, but for the busiest. `way`: all at once as stock does ("grouped_mm", ...), in pieces, expert
    by expert with all tokens repeated ("codes"), or expert by expert ("eager")."""
    found = linear_weights(module)
    assert not isinstance(found, str)
    into, back = found[1]
    (tokens, chosen), (inputs, features) = index.shape, (into.shape[1], hidden.shape[1])
    each = math.ceil(tokens * chosen / into.experts)
    if way == "eager":
        y = torch.empty_like(hidden)
        _expert(module, hidden.new_empty(each, inputs), into, back)
        return y
    if way == "codes":
        x, parts = hidden.new_empty(tokens * chosen, inputs), []
        busiest = min(tokens, BUSIEST * each)
        starts = [*range(0, max(1, len(x) - busiest), each), len(x) - busiest]
        for start, stop in itertools.pairwise(sorted({*starts, len(x)})):
            h = _product(x[start:stop], into.shape[0])
            h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
            parts.append(_product(h, features))
            del h
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        return _summed(y, tokens, chosen)
    pieces = 1
    if way == "pieces":
        host = torch.empty(0, dtype=hidden.dtype, device="cpu")
        pieces = max(1, tokens // piece_tokens(host, chosen, Routed(into.experts, sum(into.shape))))
    outputs = []
    for length in _lengths(tokens, pieces):
        x = hidden.new_empty(length * chosen, inputs)
        outputs.append(_summed(_expert(module, x, into, back), length, chosen))
        del x
    return outputs[0] if pieces == 1 else torch.cat(outputs)


def _expert(module: Any, x: Tensor, into: Any, back: Any) -> Tensor:
    h = x.new_empty(len(x), into.shape[0])
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    return h.new_empty(len(h), back.shape[0])


def _summed(y: Tensor, tokens: int, chosen: int) -> Tensor:
    """What `chosen` experts have made of each token, weighed, in the order of the tokens, and added up."""
    y = y * y.new_empty(len(y), 1)
    y = torch.empty_like(y)
    return y.view(tokens, chosen, -1).sum(1)


def _lengths(tokens: int, pieces: int) -> list[int]:
    length = math.ceil(tokens / pieces)
    return [min(length, tokens - start) for start in range(0, tokens, length)]


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
    for name in ("quantization_config", "_is_quantized"):
        vars(config).pop(name, None)
    kind: Any = type(model)
    with torch.device("meta"), no_init_weights():
        return bind(kind._from_config(config, dtype=dtype_of(model)))


def quantized_names(view: View, quantize: Quantize | None) -> frozenset[str]:
    """The modules whose weights are codes, or would be."""
    names = {name for name, module in view.model.named_modules() if isinstance(module, QuantizedModule)}
    if quantize is not None:
        names |= {name for target in quantize.choose(view)[0] for name, _ in target.modules}
    return frozenset(names)
