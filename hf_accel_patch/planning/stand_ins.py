"""Products, attention and experts on the meta device, with the memory that they take on a real one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_accel_patch.families.weights import linear_weights
from hf_accel_patch.ops.experts import Routed, piece_tokens
from hf_accel_patch.ops.linear import UNPACK_ELEMENTS

BUSIEST = 1.5  # times its share of the tokens goes to the expert that gets most of them, where experts go one by one


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


def implementation(module: Any) -> str:
    return str(getattr(module.config, "_experts_implementation", None) or "eager")


def experts(module: Any, way: str, hidden: Tensor, index: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Experts whose tokens are spread evenly, but for the busiest. `way`: all at once as stock does ("grouped_mm",
    ...), in pieces, expert by expert with all tokens repeated ("codes"), or expert by expert ("eager")."""
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
        busiest = min(tokens, int(BUSIEST * each))
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
