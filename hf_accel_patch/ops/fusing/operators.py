"""From operators of PyTorch to what a kernel computes. What is not here stays an operator of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_accel_patch.ops.fusing.operands import Elsewhere, Read, cast, dense, number_of, operand, readable
from hf_accel_patch.ops.fusing.sums import reduced
from hf_accel_patch.ops.fusing.tracing import Node
from hf_accel_patch.ops.fusing.values import (
    DTYPES,
    FLOATS,
    Constant,
    Gathered,
    Joined,
    Pointwise,
    Range,
    Stacked,
    Value,
    literal,
)

aten = torch.ops.aten


SIGMOID = "tl.div_rn(1.0, 1.0 + tl.exp(-{0}))"
NANS = "propagate_nan=tl.PropagateNan.ALL"
# 2 sigmoid(2 x) - 1 loses small numbers, of which the first terms of the series are exact enough
TANH = (
    "tl.where(tl.abs({0}) < 0.1, {0} * (1.0 - {0} * {0} * (0.33333334 - {0} * {0} * (0.13333334 - {0} * {0} *"
    " 0.05396825))), 2.0 / (1.0 + tl.exp(-2.0 * {0})) - 1.0)"
)
UNARY = {
    aten.neg: "{0} * -1.0", aten.abs: "tl.abs({0})", aten.rsqrt: "tl.rsqrt({0})",
    aten.sqrt: "tl.sqrt_rn({0})", aten.reciprocal: "tl.div_rn(1.0, {0})", aten.exp: "tl.exp({0})",
    aten.sin: "tl.sin({0})", aten.cos: "tl.cos({0})", aten.tanh: TANH,
    aten.sigmoid: SIGMOID, aten.silu: "tl.div_rn({0}, 1.0 + tl.exp(-{0}))",
    aten.relu: f"tl.maximum({{0}}, 0.0, {NANS})",
}  # fmt: skip
BINARY = {
    aten.add: "{0} + {1}", aten.sub: "{0} - {1}", aten.mul: "{0} * {1}", aten.div: "tl.div_rn({0}, {1})",
    aten.maximum: f"tl.maximum({{0}}, {{1}}, {NANS})", aten.minimum: f"tl.minimum({{0}}, {{1}}, {NANS})",
}  # fmt: skip
COMPARED = {
    aten.lt: "{0} < {1}", aten.le: "{0} <= {1}", aten.gt: "{0} > {1}", aten.ge: "{0} >= {1}", aten.eq: "{0} == {1}",
    aten.ne: "{0} != {1}",
}  # fmt: skip
LOGICAL = {
    aten.bitwise_and: "{0} & {1}", aten.logical_and: "{0} & {1}", aten.bitwise_or: "{0} | {1}",
    aten.logical_or: "{0} | {1}",
}  # fmt: skip
GELU = {
    "none": "{0} * 0.5 * (1.0 + tl.erf({0} * 0.7071067811865476))",
    # x (1 + tanh(u)) / 2 = x sigmoid(2 u)
    "tanh": "tl.div_rn({0}, 1.0 + tl.exp(-1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0})))",
}
POWERS = {2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "tl.sqrt_rn({0})", -0.5: "tl.rsqrt({0})", 1: "{0}"}
IN_PLACE = {
    aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor, aten.add_.Scalar, aten.sub_.Scalar,
    aten.mul_.Scalar, aten.div_.Scalar, aten.neg_.default, aten.exp_.default, aten.rsqrt_.default, aten.silu_.default,
    aten.sigmoid_.default, aten.tanh_.default, aten.relu_.default, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor,
}  # fmt: skip
CONSTANTS = {
    aten.zeros: 0, aten.zeros_like: 0, aten.new_zeros: 0, aten.ones: 1, aten.ones_like: 1, aten.new_ones: 1,
    aten.full: None, aten.full_like: None, aten.new_full: None, aten.scalar_tensor: None,
}  # fmt: skip


def value_of(node: Node, read: Read) -> Value | None:
    """What an operator that writes to nothing computes, if a kernel can; `read` says what a tensor holds."""
    packet = getattr(node.func, "overloadpacket", None)
    if node.written or len(node.made) != 1 or node.made[0] is not node.outputs[0] or packet is None:
        return None
    return _value(node, packet, node.outputs[0], read)


def value_in_place(node: Node, read: Read) -> Value | None:
    """The same for an operator that does to a whole tensor what another one computes from it."""
    name = node.func.name().removeprefix("aten::").partition(".")[0] if node.func in IN_PLACE else ""
    return _value(node, getattr(aten, name[:-1]), node.written[0], read) if name else None


def _value(node: Node, packet: Any, output: Tensor, read: Read) -> Value | None:
    if output.dtype not in DTYPES or not dense(output):
        return None
    if any(not readable(each, output.device) for each in node.given):
        return None
    try:
        how = _computed(node, packet, output, read)
    except Elsewhere:
        return None
    return how if how is None or how.sizes == tuple(output.shape) else None


def _computed(node: Node, packet: Any, output: Tensor, read: Read) -> Value | None:
    args, kwargs, sizes, dtype = node.args, node.kwargs, tuple(output.shape), output.dtype
    if packet in UNARY and len(args) == 1 and args[0].dtype in FLOATS:
        return Pointwise(sizes, dtype, UNARY[packet], (read(args[0]),), torch.float32)
    if packet in BINARY and set(kwargs) <= {"alpha"}:
        return _binary(BINARY[packet], args, kwargs.get("alpha", 1), sizes, dtype, output.device, read)
    if packet is aten.rsub and len(args) == 2:
        return _binary("{1} - {0}", args, kwargs.get("alpha", 1), sizes, dtype, output.device, read, scaled="{0}")
    if packet in COMPARED and not kwargs:
        common = torch.result_type(*args)
        if common not in DTYPES or (common not in FLOATS and any(isinstance(each, float) for each in args)):
            return None
        compute = torch.float32 if common in FLOATS else torch.int64
        operands = [_compared(each, common, output.device, read) for each in args]
        return None if None in operands else Pointwise(sizes, dtype, COMPARED[packet], tuple(operands), compute)  # type: ignore[arg-type]
    if packet in LOGICAL and all(isinstance(each, Tensor) and each.dtype is torch.bool for each in args):
        return Pointwise(sizes, dtype, LOGICAL[packet], tuple(read(each) for each in args))
    if packet in (aten.bitwise_not, aten.logical_not) and args[0].dtype is torch.bool:
        return Pointwise(sizes, dtype, "{0} == 0", (read(args[0]),))
    if node.func is aten.gelu.default and dtype in FLOATS:
        return Pointwise(sizes, dtype, GELU[kwargs.get("approximate", "none")], (read(args[0]),), torch.float32)
    if node.func is aten.pow.Tensor_Scalar and args[1] in POWERS and args[0].dtype in FLOATS:
        return Pointwise(sizes, dtype, POWERS[args[1]], (read(args[0]),), torch.float32)
    if node.func in (aten._to_copy.default, aten.clone.default):
        return cast(read(args[0]), dtype)
    if node.func in (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
        return _clamped(node.func, args, kwargs, sizes, dtype, read)
    if node.func is aten.where.self:
        chosen = [operand(each, dtype, output.device, read) for each in args[1:]]
        return None if None in chosen else _where(read(args[0]), chosen[0], chosen[1], sizes, dtype)
    if packet is aten.masked_fill:
        value = operand(args[2], dtype, output.device, read)
        return None if value is None else _where(read(args[1]), value, read(args[0]), sizes, dtype)
    if packet in CONSTANTS:
        return _constant(node, packet, sizes, dtype)
    if packet is aten.arange and dtype is torch.int64 and all(type(each) is int for each in args):
        start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
        return Range(sizes, dtype, start, step)
    if node.func is aten.cat.default:
        return _joined([read(each) for each in args[0] if each.numel()], (args[1:] or (0,))[0], dtype)
    if node.func is aten.stack.default and len({each.dtype for each in args[0]}) == 1:
        return Stacked(sizes, dtype, tuple(read(each) for each in args[0]), (args[1:] or (0,))[0] % len(sizes))
    if node.func is aten.embedding.default and args[0].dim() == 2 and read.in_memory(args[0]):
        return Gathered(sizes, dtype, args[0], read(args[1]))
    if node.func is aten.index.Tensor and _by_rows(args[1]) and read.in_memory(args[0]):
        return Gathered(sizes, dtype, args[0], read(args[1][0]))
    if node.func is aten.bmm.default and args[0].shape[2] == 1 and dtype is torch.float32:
        return _outer(read(args[0]), read(args[1]), sizes, dtype)
    return reduced(node, packet, sizes, dtype, read)


def _compared(given: Any, common: torch.dtype, device: torch.device, read: Read) -> Value | None:
    """As `operand`, but numbers are rounded too."""
    found = None if isinstance(given, Tensor) and given.device == device else number_of(given)
    return operand(given, common, device, read) if found is None else Constant((), common, found)


def _binary(
    form: str,
    args: Sequence[Any],
    alpha: Any,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: Any,
    read: Read,
    scaled: str = "{1}",
) -> Value | None:
    compute = torch.float32 if dtype in FLOATS else dtype
    if dtype is torch.bool or len(args) != 2 or (dtype not in FLOATS and isinstance(alpha, float)):
        return None
    divisor = None if isinstance(args[1], Tensor) and args[1].device == device else number_of(args[1])
    if form == BINARY[aten.div] and divisor:
        form, args = BINARY[aten.mul], (args[0], 1 / divisor)  # as PyTorch does on a GPU
    operands = [operand(each, dtype, device, read) for each in args]
    if None in operands:
        return None
    if alpha != 1:
        form = form.replace(scaled, f"{scaled} * {literal(alpha)}")
    return Pointwise(sizes, dtype, form, tuple(operands), compute)  # type: ignore[arg-type]


def _where(condition: Value, yes: Any, no: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> Value:
    compute = torch.float32 if dtype in FLOATS else dtype
    either = [cast(each, compute) for each in (yes, no)]
    return Pointwise(sizes, dtype, "tl.where({0}, {1}, {2})", (condition, *either))


def _clamped(func: Any, args: Any, kwargs: Any, sizes: tuple[int, ...], dtype: torch.dtype, read: Read) -> Value | None:
    if dtype not in FLOATS:
        return None
    given = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
    if func is aten.clamp_max.default:
        given = {"max": args[1]}
    form = "{0}"
    for name, how in (("min", "tl.maximum"), ("max", "tl.minimum")):
        if given.get(name) is not None:
            form = f"{how}({form}, {literal(float(given[name]))}, {NANS})"
    return Pointwise(sizes, dtype, form, (read(args[0]),), torch.float32)


def _constant(node: Node, packet: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> Value | None:
    number = CONSTANTS[packet]
    if number is None:
        number = node.args[{aten.new_full: 2, aten.scalar_tensor: 0}.get(packet, 1)]
    return Constant(sizes, dtype, number) if isinstance(number, bool | int | float) else None


def _joined(parts: Sequence[Value], dim: int, dtype: torch.dtype) -> Value | None:
    dim %= max(1, len(parts[0].sizes))
    if len({each.dtype for each in parts}) != 1 or parts[0].dtype is not dtype:
        return None
    joined = parts[0]
    for each in parts[1:]:
        sizes = list(joined.sizes)
        sizes[dim] += each.sizes[dim]
        joined = Joined(tuple(sizes), dtype, (joined, each), dim)
    return joined


def _by_rows(indices: Sequence[Tensor | None]) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype in (torch.int64, torch.int32)


def _outer(a: Value, b: Value, sizes: tuple[int, ...], dtype: torch.dtype) -> Value:
    """Of a column and a row."""
    return Pointwise(sizes, dtype, "{0} * {1}", (a, b), torch.float32)
