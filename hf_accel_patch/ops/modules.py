"""Linear and embedding modules with other products or a quantized weight.

They are classes that a live `nn.Linear` or `nn.Embedding` is changed to. The quantized ones have buffers in place of
the weight: `qweight` and `scales`. Scales are bfloat16 bit patterns held as int16, so that `.half()` and `.to(dtype)`
leave them alone; the empty buffer `like` follows such casts and is the dtype that the weight stands for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_accel_patch.kernels import cpu
from hf_accel_patch.ops.dense import FloatBackend, linear_float
from hf_accel_patch.ops.linear import Backend, linear_int4, linear_int8, linear_op, rows_int4, unpack_int4


class FastLinear(nn.Linear):
    """y = x W^T + b, by whatever is fastest for the rows of x. Training, graphs and other devices have PyTorch's."""

    backend: FloatBackend

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, backend = self.weight, self.bias, self.backend
        same = input.dtype is weight.dtype is backend.dtype and (bias is None or bias.dtype is weight.dtype)
        if same and cpu.readable(input, weight, bias):
            return linear_float(input, weight, bias, backend)
        return F.linear(input, weight, bias)


class QuantizedWeight(Tensor):
    """What `module.weight` reads as: shape, dtype and device for free; any operation on it dequantizes first."""

    module: Quantized

    @staticmethod
    def __new__(cls, module: Quantized) -> QuantizedWeight:
        like = module.like
        weight = Tensor._make_wrapper_subclass(cls, module.weight_shape, dtype=like.dtype, device=like.device)
        weight.module = module
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dense = lambda weight: weight.module.dequantize(weight.dtype)  # noqa: E731
        return func(*tree_map_only(cls, dense, args), **tree_map_only(cls, dense, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"QuantizedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


class Quantized(nn.Module):
    """What the four classes share. `block` is the layout of int4 codes."""

    qweight: Tensor
    scales: Tensor
    like: Tensor
    weight_shape: tuple[int, int]
    block: int
    backend: Backend
    bits: str

    @property
    def weight(self) -> Tensor:
        return QuantizedWeight(self)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that the codes stand for."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` [n] of the weight, bfloat16 [n, K]."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] times the weight's transpose, [..., N] in the dtype of x."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.bits}"


class Int8(Quantized):
    bits = "int8"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.qweight.float() * self.scales.view(torch.bfloat16)[:, None]).to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return (self.qweight[index].float() * self.scales.view(torch.bfloat16)[index, None]).bfloat16()

    def product(self, x: Tensor) -> Tensor:
        scales = self.scales.view(torch.bfloat16)
        if cpu.readable(x):
            return linear_int8(x, self.qweight, scales, self.backend)
        return linear_op(x, self.qweight, scales, 0, self.backend.compiled, self.backend.rows)


class Int4(Quantized):
    bits = "int4"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        N, K = self.weight_shape
        blocks = self.qweight.shape[0] // self.block
        dense = unpack_int4(self.qweight, self.scales.view(torch.bfloat16), self.block, 0, blocks)
        return dense.transpose(1, 2).reshape(-1, K)[:N].to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        return rows_int4(self.qweight, self.scales.view(torch.bfloat16), self.block, index)

    def product(self, x: Tensor) -> Tensor:
        scales = self.scales.view(torch.bfloat16)
        if cpu.readable(x):
            y = linear_int4(x, self.qweight, scales, self.block, self.backend)
        else:
            y = linear_op(x, self.qweight, scales, self.block, self.backend.compiled, self.backend.rows)
        N = self.weight_shape[0]
        return y if y.shape[-1] == N else y[..., :N]


class QuantizedLinear(Quantized, nn.Linear):
    """y = x W^T + b."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            raise RuntimeError(
                f"weights quantized for the CPU met activations on {input.device}; unpatch, move the model, patch again"
            )
        if torch.is_grad_enabled() and input.requires_grad:  # the kernels have no derivative
            return F.linear(input, self.dequantize(input.dtype), self.bias)
        y = self.product(input)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(Quantized, nn.Embedding):
    """Looks up rows and dequantizes them: the table of a head that is tied to the embedding."""

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input.reshape(-1)).to(self.like.dtype).view(*input.shape, -1)


class Int8Linear(Int8, QuantizedLinear):
    pass


class Int4Linear(Int4, QuantizedLinear):
    pass


class Int8Embedding(Int8, QuantizedEmbedding):
    pass


class Int4Embedding(Int4, QuantizedEmbedding):
    pass


def quantized_class(module: nn.Module, scheme: str) -> type[nn.Module]:
    """The class that a module is changed to.

    An embedding class that adds to `nn.Embedding.forward` (Gemma's scale) keeps its own forward: the quantized class
    stands between it and `nn.Embedding`, where its `super().forward` finds it.
    """
    if not isinstance(module, nn.Embedding):
        return {"int8": Int8Linear, "int4": Int4Linear}[scheme]
    base = {"int8": Int8Embedding, "int4": Int4Embedding}[scheme]
    kind: Any = type(module)
    return base if kind is nn.Embedding else _between(kind, base)


@cache
def _between(kind: Any, base: Any) -> type[nn.Module]:
    return type(kind.__name__, (kind, base), {"__module__": kind.__module__})
