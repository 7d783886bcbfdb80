"""From operators of PyTorch, and calls of compiled kernels, to what compiled code can run on the same memory.

`translated` returns None for what only PyTorch runs: other operators, other dtypes than float32, bfloat16 and float16,
or int64 and bool where they say who sees whom.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_accel_patch.kernels.cpu import DTYPES
from hf_accel_patch.kernels.cpu_steps import DIMS, Kind
from hf_accel_patch.kernels.noting import Call
from hf_accel_patch.ops.operator import Operand, Operator

aten = torch.ops.aten
BINARY = {
    aten.add.Tensor: Kind.ADD, aten.add_.Tensor: Kind.ADD, aten.sub.Tensor: Kind.SUBTRACT,
    aten.sub_.Tensor: Kind.SUBTRACT, aten.mul.Tensor: Kind.MULTIPLY, aten.mul_.Tensor: Kind.MULTIPLY,
    aten.div.Tensor: Kind.DIVIDE, aten.div_.Tensor: Kind.DIVIDE,
}  # fmt: skip
UNARY = {
    aten.neg.default: Kind.NEGATE, aten.rsqrt.default: Kind.RSQRT, aten.silu.default: Kind.SILU,
    aten.sigmoid.default: Kind.SIGMOID, aten.exp.default: Kind.EXP, aten.relu.default: Kind.RELU,
    aten.cos.default: Kind.COS, aten.sin.default: Kind.SIN, aten.tanh.default: Kind.TANH,
}  # fmt: skip
MOST_NUMBER = 1 << 63
POWERS = {2: Kind.SQUARE, 3: Kind.CUBE}
COMPARED = {
    aten.le.Tensor: Kind.LESS_EQUAL, aten.le.Scalar: Kind.LESS_EQUAL, aten.gt.Tensor: Kind.GREATER,
    aten.gt.Scalar: Kind.GREATER,
}  # fmt: skip
BOTH = {aten.bitwise_and.Tensor, aten.logical_and.default}
COPIES = {aten._to_copy.default, aten.clone.default, aten.copy_.default}
NOTHING = {  # memory whose content nobody may count on
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten.new_empty_strided.default,
}  # fmt: skip
PRODUCTS = {
    "linear_int4": Kind.LINEAR_INT4, "linear_int8": Kind.LINEAR_INT8, "linear_float": Kind.LINEAR_FLOAT,
    "linear_columns": Kind.LINEAR_FLOAT,
}  # fmt: skip


def translated(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Operator] | None:
    """What does the same; an empty list where there is nothing to do."""
    if func in NOTHING:
        return []
    if not all(map(_plain, outputs)):
        return None
    if func in BINARY:
        return _binary(BINARY[func], args, kwargs, outputs[0])
    if func in COMPARED:
        return _integers(COMPARED[func], outputs[0], *args[:2])
    if func in BOTH:
        return _integers(Kind.BOTH, outputs[0], *args[:2], dtype=torch.bool)
    if func in UNARY:
        return _elementwise(UNARY[func], outputs[0], args[0])
    if func is aten.pow.Tensor_Scalar and args[1] in POWERS:
        return _elementwise(POWERS[args[1]], outputs[0], args[0])
    if func is aten.gelu.default:
        kind = Kind.GELU_TANH if kwargs.get("approximate") == "tanh" else Kind.GELU
        return _elementwise(kind, outputs[0], args[0])
    if func in COPIES:
        return _copy(Operand(outputs[0].detach()), outputs[0], args[1 if func is aten.copy_.default else 0])
    if func in OTHERS:
        return OTHERS[func](args, kwargs, outputs)
    return None


def called(call: Call) -> Operator:
    """A call of a compiled kernel."""
    rest = tuple(each for each in call.rest if each is not None)
    address = ctypes.cast(call.function, ctypes.c_void_p).value or 0
    if call.argument:
        buffer = ctypes.create_string_buffer(call.argument, len(call.argument))
        fixed = (call.x.detach(), call.out.detach(), *(each.detach() for each in rest))
        extra = (address, ctypes.addressof(buffer))
        return Operator(Kind.ATTEND, Operand(fixed[1]), (Operand(fixed[0]),), extra=extra, fixed=fixed, argument=buffer)
    K, N = call.x.shape[-1], call.out.shape[-1]
    sizes = call.x.numel() // K, K, N, call.group
    read = tuple(0 if each is None else Operand(each.detach()) for each in call.rest)
    return Operator(
        PRODUCTS[call.function.__name__], Operand(call.out.detach()), (Operand(call.x.detach()),), sizes,
        extra=(address, *read),
    )  # fmt: skip


def _binary(kind: Kind, args: Any, kwargs: Any, out: Tensor) -> list[Operator] | None:
    if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None:
        return None
    a, b = args[:2]
    if isinstance(b, Tensor):
        alone = any(isinstance(each, Tensor) and not each.ndim and each.dtype != out.dtype for each in (a, b))
        return _elementwise(kind, out, a, b) if isinstance(a, Tensor) and not alone else None
    if not isinstance(b, int | float):
        return None
    if out.dtype == torch.int64 and kind in (Kind.ADD, Kind.SUBTRACT) and type(b) is int:
        return _integers(Kind.PLUS, out, a, b if kind == Kind.ADD else -b) if abs(b) < MOST_NUMBER else None
    if kind in (Kind.ADD, Kind.SUBTRACT) and out.dtype in DTYPES:  # PyTorch rounds the number first, and not for others
        b = torch.tensor(b, dtype=out.dtype, device="cpu").item()
    return _elementwise(kind, out, a, scalar=float(b))


def _elementwise(kind: Kind, out: Tensor, *inputs: Any, scalar: float = 0.0) -> list[Operator] | None:
    every = (out, *inputs)
    if not out.numel() or not all(_plain(each) and each.dtype in DTYPES for each in every):
        return None
    laid = _laid(every)
    if laid is None:
        return None
    operands = tuple(Operand(each.detach()) for each in inputs)
    return [Operator(kind, Operand(out.detach()), operands, *laid, scalar=scalar)]


def _integers(kind: Kind, out: Tensor, *inputs: Any, dtype: torch.dtype = torch.int64) -> list[Operator] | None:
    """Of one or two tensors of this dtype, or of one and a number."""
    number = inputs[1] if len(inputs) > 1 and type(inputs[1]) is int else None
    tensors = inputs[:1] if number is not None else inputs
    if not out.numel() or not all(isinstance(each, Tensor) and _plain(each) for each in tensors):
        return None
    given = torch.int64 if kind == Kind.PLUS else torch.bool
    laid = _laid((out, *tensors)) if {each.dtype for each in tensors} == {dtype} and out.dtype == given else None
    if laid is None:
        return None
    operands = tuple(Operand(each.detach()) for each in tensors)
    return [Operator(kind, Operand(out.detach()), operands, *laid, extra=(number or 0,))]


def _copy(to: Operand, like: Tensor, source: Any) -> list[Operator] | None:
    """Into a tensor that is laid out like the second."""
    if not _plain(source):
        return None
    laid = _laid((like, source)) if like.numel() else None
    if laid is None:
        return None
    if source.dtype == torch.int64 and like.dtype == torch.float32:
        return [Operator(Kind.TO_FLOAT, to, (Operand(source.detach()),), *laid)]
    pair, source = (like.dtype, source.dtype), Operand(source.detach())
    if pair[0] == pair[1]:
        return [Operator(Kind.MOVE, to, (source,), *laid, extra=(like.itemsize,))]
    return [Operator(Kind.COPY, to, (source,), *laid)] if all(each in DTYPES for each in pair) else None


def _plain(tensor: Any) -> bool:
    """Whether it is memory of the CPU that says what the numbers are."""
    kind = type(tensor) in (Tensor, Parameter) and tensor.is_cpu and tensor.layout == torch.strided
    return kind and not tensor.is_conj() and not tensor.is_neg()


def _laid(every: Sequence[Tensor]) -> tuple[list[int], list[list[int]]] | None:
    """The fewest dimensions that say the same: sizes, and strides of the output and of the inputs, which are broadcast
    to it. None for too many."""
    shape = every[0].shape
    if any(each.ndim > len(shape) for each in every[1:]):
        return None
    lead = [[0] * (len(shape) - each.ndim) for each in every]
    given = [[*zeros, *each.stride()] for zeros, each in zip(lead, every, strict=True)]
    wide = [[1] * len(zeros) + list(each.shape) for zeros, each in zip(lead, every, strict=True)]
    strides = [
        [0 if size == 1 else stride for size, stride in zip(sizes, each, strict=True)]
        for sizes, each in zip(wide, given, strict=True)
    ]
    kept: list[tuple[int, list[int]]] = []  # from the last dimension on
    for index in reversed(range(len(shape))):
        size, steps = shape[index], [each[index] for each in strides]
        if size == 1:
            continue
        if kept and all(step == kept[-1][0] * inner for step, inner in zip(steps, kept[-1][1], strict=True)):
            kept[-1] = kept[-1][0] * size, kept[-1][1]
        else:
            kept.append((size, steps))
    kept = kept or [(1, [0] * len(every))]
    if len(kept) > DIMS:
        return None
    kept.reverse()
    return [size for size, _ in kept], [[steps[i] for _, steps in kept] for i in range(len(every))]


def _mean(args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Operator] | None:
    x, dims, out = args[0], args[1] if len(args) > 1 else None, outputs[0]
    last = dims is not None and x.ndim and [each % x.ndim for each in dims] == [x.ndim - 1]
    if not last or not _plain(x) or x.dtype not in DTYPES or out.dtype not in DTYPES or not x.numel() or x.ndim > DIMS:
        return None
    lead = list(out.stride())[: x.ndim - 1]
    return [
        Operator(
            Kind.MEAN, Operand(out.detach()), (Operand(x.detach()),), list(x.shape), [[*lead, 0], list(x.stride())]
        )
    ]


def _layer_norm(args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Operator] | None:
    x, shape, weight, bias, epsilon = args
    n, given = x.shape[-1], [each for each in (weight, bias) if each is not None]
    plain = list(shape) == [n] and x.is_contiguous() and outputs[0].is_contiguous() and x.dtype in DTYPES
    if not plain or not x.numel() or not all(map(_plain, (x, *given))):
        return None
    if any(each.dtype != x.dtype or not each.is_contiguous() for each in given):
        return None
    strides = [n, 1]
    return [
        Operator(
            Kind.LAYER_NORM, Operand(outputs[0].detach()),
            (Operand(x.detach()), None if weight is None else Operand(weight.detach())),
            [x.numel() // n, n], [strides, strides, [0, 1]], epsilon,
            (0 if bias is None else Operand(bias.detach()),), unwritten=tuple(each.detach() for each in outputs[1:]),
        )
    ]  # fmt: skip


def _cat(args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Operator] | None:
    parts, out = args[0], outputs[0]
    dim, start, found = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim, 0, list[Operator]()
    for part in parts:
        if part.ndim != out.ndim or part.dtype != out.dtype:
            return None
        like = out.narrow(dim, start, part.shape[dim])
        some = _copy(Operand(like.detach()), like, part) if part.numel() else []
        if some is None:
            return None
        found, start = found + some, start + part.shape[dim]
    return found


def _embedding(args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Operator] | None:
    weight, index, out = args[0], args[1], outputs[0]
    plain = index.dtype == torch.int64 and index.is_contiguous() and weight.stride(-1) == 1 and out.is_contiguous()
    if not plain or not out.numel() or not _plain(weight) or not _plain(index):
        return None
    row_bytes = weight.shape[1] * weight.itemsize
    inputs = Operand(weight.detach()), Operand(index.detach())
    extra = row_bytes, weight.shape[0], weight.stride(0) * weight.itemsize
    return [Operator(Kind.GATHER, Operand(out.detach()), inputs, [index.numel()], extra=extra)]


def _put(args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Operator] | None:
    """buffer[rows, :, places] = values, as caches are written."""
    buffer, indices, values = args[:3]
    if len(indices) != 3 or indices[1] is not None or (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
        return None
    rows, places = indices[0], indices[2]
    if any(not _plain(each) or each.dtype != torch.int64 or each.ndim != 2 for each in (rows, places)):
        return None
    if (
        buffer.ndim != 4
        or not _plain(buffer)
        or not _plain(values)
        or values.dtype != buffer.dtype
        or not values.numel()
    ):
        return None
    (B, T), shape = places.shape, buffer.shape
    values = values.expand(B, T, shape[1], shape[3])
    lines = buffer.stride(3) == values.stride(3) == 1 and (T == 1 or places.stride(1) == 1)
    if rows.shape != (B, 1) or not lines:
        return None
    extra = (
        buffer.itemsize, Operand(places.detach()), shape[0], shape[2], rows.stride(0) if B > 1 else 0,
        places.stride(0) if B > 1 else 0,
    )  # fmt: skip
    sizes, strides = [B, T, shape[1], shape[3]], [list(buffer.stride()[:3]), list(values.stride()[:3])]
    inputs = Operand(values.detach()), Operand(rows.detach())
    return [Operator(Kind.SCATTER, Operand(buffer.detach()), inputs, sizes, strides, extra=extra)]


OTHERS: dict[Any, Callable[[Any, Any, list[Tensor]], list[Operator] | None]] = {
    aten.mean.dim: _mean,
    aten.native_layer_norm.default: _layer_norm,
    aten.cat.default: _cat,
    aten.embedding.default: _embedding,
    aten.index_put_.default: _put,
}
