"""Linear layers, embeddings and experts with other products or quantized weights.

They are classes that a live module is changed to. The quantized ones have buffers in place of a parameter: one of its
name with the codes, and NAME_scales. Scales are bit patterns held as integers, so that `.half()` and `.to(dtype)` leave
them alone; the empty buffer `like` follows such casts and is the dtype that the weight stands for.

A buffer of codes never has the shape of the parameter. So a quantized checkpoint that is read without this package is
refused as one of wrong sizes, where it could not be read right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from hf_accel_patch.kernels import cpu
from hf_accel_patch.ops.dense import FloatBackend, linear_float
from hf_accel_patch.ops.linear import Backend, dense_int4, dense_triton, linear, linear_op
from hf_accel_patch.ops.packing import INT8, rows_int4
from hf_accel_patch.ops.quantize import TABLES


class FastLinear(nn.Linear):
    """y = x W^T + b, by whatever is fastest for the rows of x. Training, graphs and other devices have PyTorch's."""

    backend: FloatBackend

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, backend = self.weight, self.bias, self.backend
        same = input.dtype is weight.dtype is backend.dtype and (bias is None or bias.dtype is weight.dtype)
        if same and cpu.readable(input, weight, bias):
            return linear_float(input, weight, bias, backend)
        return F.linear(input, weight, bias)


UNCHANGEABLE = "a quantized weight cannot be changed; unpatch, change the dense weight, and patch again"


@dataclass(frozen=True)
class Spec:
    """How to read one quantized weight [N, K]."""

    scheme: str
    shape: tuple[int, int]
    backend: Backend


def product(x: Tensor, codes: Tensor, scales: Tensor, spec: Spec) -> Tensor:
    """x [..., K] times the weight's transpose, [..., N] in the dtype of x."""
    if torch.is_grad_enabled() and x.requires_grad:
        if torch.compiler.is_compiling():
            return F.linear(x, dequantize(codes, scales, spec, x.dtype))
        return cast(Tensor, _Product.apply(x, codes, scales, spec))  # type: ignore[no-untyped-call]
    if x.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"there are no products of quantized weights for activations on {x.device}")
    if cpu.readable(x) or _on_gpu(x):  # spares the host the way through PyTorch's dispatcher
        y = linear(x, codes, as_floats(scales), spec.scheme, spec.backend)
    else:
        backend, scales = spec.backend, as_floats(scales)
        y = linear_op(x, codes, scales, spec.scheme, backend.compiled, backend.rows, backend.decomposed)
    return y if y.shape[-1] == spec.shape[0] else y[..., : spec.shape[0]]


def _on_gpu(x: Tensor) -> bool:
    """Whether a kernel may read it there at once."""
    return x.is_cuda and type(x) is Tensor and not cpu.recorded_or_replaced()


def dequantize(codes: Tensor, scales: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that the codes stand for."""
    N, K = spec.shape
    if spec.scheme in INT8:
        return (codes.view(N, K).float() * as_floats(scales)[:, None]).to(dtype)
    if _on_gpu(codes):
        dense = dense_triton(codes, as_floats(scales), spec.scheme, N, dtype)
        if isinstance(dense, Tensor):
            return dense
    return dense_int4(codes, as_floats(scales), TABLES.get(spec.scheme), spec.backend, N, dtype)


def rows(index: Tensor, codes: Tensor, scales: Tensor, spec: Spec) -> Tensor:
    """Rows `index` [n] of the weight, bfloat16 [n, K]. Raises IndexError, as an embedding does."""
    if index.is_cpu and index.numel() and not torch.compiler.is_compiling():
        if index.amin() < 0 or index.amax() >= spec.shape[0]:
            raise IndexError(f"index out of range: rows are 0..{spec.shape[0] - 1}")
    if spec.scheme in INT8:
        return (codes.view(spec.shape)[index].float() * as_floats(scales)[index, None]).bfloat16()
    return rows_int4(codes, as_floats(scales), TABLES.get(spec.scheme), index)


def as_floats(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16 if bits.dtype is torch.int16 else torch.float32)


class _Product(torch.autograd.Function):
    """In the precision of x, and with nothing but the codes kept for the way back, where they are dequantized again, as
    QLoRA does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, spec: Spec) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.spec = spec
        return F.linear(x, dequantize(codes, scales, spec, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales = ctx.saved_tensors
        return grad @ dequantize(codes, scales, ctx.spec, grad.dtype), None, None, None


class QuantizedWeight(Tensor):
    """What `module.weight` reads as: shape, dtype and device for free; any operation on it dequantizes first."""

    module: QuantizedModule
    codes: Tensor
    _is_hf_initialized = True  # what initializes the weights that a checkpoint lacks leaves it alone

    @staticmethod
    def __new__(cls, module: QuantizedModule, codes: Tensor | None = None) -> QuantizedWeight:
        """`codes`: those of the module, on another device."""
        shape = module.specs["weight"].shape
        shape = shape[::-1] if module.transposed else shape
        codes = module.held("weight")[0] if codes is None else codes
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=module.like.dtype, device=codes.device)
        weight.module, weight.codes = module, codes
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(UNCHANGEABLE)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return QuantizedWeight(args[0].module, args[0].codes)
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") in (None, args[0].dtype):
            if (device := (kwargs or {}).get("device")) is not None:
                return QuantizedWeight(args[0].module, args[0].codes.to(device))
        if func is torch.ops.aten.empty_like.default:
            like = {"dtype": args[0].dtype, "device": args[0].device} | {
                k: v for k, v in (kwargs or {}).items() if v is not None
            }
            return torch.empty(args[0].shape, **like)
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError(UNCHANGEABLE)
        dense = lambda weight: weight.module.dequantize(weight.dtype).to(weight.device)  # noqa: E731
        return func(*tree_map_only(cls, dense, args), **tree_map_only(cls, dense, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"QuantizedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


class Specs(dict[str, Spec]):
    """By the name of the parameter that codes stand in for. Modules that are tied have the same one."""

    moved: tuple[Any, dict[str, Any]] | None = None  # weak references: the codes that were moved last, and where to

    def __reduce__(self) -> Any:
        return Specs, (dict(self),)


class QuantizedModule(nn.Module):
    """What all share."""

    specs: Specs
    like: Tensor
    transposed = False  # whether the parameter was [K, N]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves what is tied once, and keeps codes as the kernels read them, whatever the memory format."""
        names = [key for name in self.specs for key in (name, f"{name}_scales")]
        buffers: dict[str, Any] = self._buffers
        before, moved = buffers[names[0]], self.specs.moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if moved is not None and moved[0]() is before and all(tensor() is not None for tensor in moved[1].values()):
            buffers.update({key: tensor() for key, tensor in moved[1].items()})
        elif buffers[names[0]] is not before:
            buffers.update({key: buffers[key].contiguous() for key in names})
            self.specs.moved = ref(before), {key: ref(buffers[key]) for key in names}
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made at run time are made again where a pickle is read."""
        if type(self).__dict__.get("made") is None:
            return super().__reduce_ex__(protocol)
        return _remake, type(self).__dict__["made"], self.__getstate__()  # type: ignore[no-untyped-call]

    def held(self, name: str) -> tuple[Tensor, Tensor, Spec]:
        """Codes, scales and how to read them."""
        buffers: dict[str, Any] = self._buffers
        return buffers[name], buffers[f"{name}_scales"], self.specs[name]

    def extra_repr(self) -> str:
        schemes = "/".join(sorted({spec.scheme for spec in self.specs.values()}))
        return ", ".join(filter(None, (super().extra_repr(), f"weight={schemes}")))


class HasWeight(QuantizedModule):
    """One weight, named `weight`. With `weight_order` [K] its columns are sorted: column j is for feature order[j]."""

    @property
    def weight(self) -> Tensor:
        return QuantizedWeight(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, QuantizedWeight):  # tied to another module's
            own, theirs = self._buffers, value.module._buffers
            own.update({key: theirs[key] for key in theirs if key.startswith("weight")})
            self.specs = value.module.specs
        elif name == "weight" and isinstance(value, Tensor) and value.is_floating_point():
            raise RuntimeError(UNCHANGEABLE)
        else:
            if isinstance(read := self._buffers.get("weight"), QuantizedWeight):
                self._buffers["weight"] = read.codes  # accelerate moves what it reads, and then sets its hook
            super().__setattr__(name, value)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, in the shape of the parameter."""
        dense, order = dequantize(*self.held("weight"), dtype), self._buffers.get("weight_order")
        if order is not None:
            dense = torch.empty_like(dense).index_copy_(1, order, dense)
        return dense.T if self.transposed else dense


class QuantizedLinear(HasWeight, nn.Linear):
    """y = x W^T + b."""

    def forward(self, input: Tensor) -> Tensor:
        buffers: dict[str, Any] = self._buffers
        if (order := buffers.get("weight_order")) is not None:
            input = input[..., order]
        y = product(input, buffers["weight"], buffers["weight_scales"], self.specs["weight"])
        bias = self.bias
        return y if bias is None else y + bias


class QuantizedTransposed(HasWeight):
    """y = x W + b: a `Conv1D`, as GPT-2 has them."""

    transposed = True
    bias: Tensor | None
    forward = QuantizedLinear.forward


class QuantizedEmbedding(HasWeight, nn.Embedding):
    """Looks up rows and dequantizes them: the table of a head that is tied to the embedding."""

    def forward(self, input: Tensor) -> Tensor:
        return rows(input.reshape(-1), *self.held("weight")).to(self.like.dtype).view(*input.shape, -1)


class QuantizedExperts(QuantizedModule):
    """Experts under the contract of `use_experts_implementation`, each with a weight from the input (`into`) and one to
    the output (`out`). Calculates in the order of the implementation "grouped_mm"."""

    into: str
    out: str
    is_transposed: bool
    has_gate: bool
    has_bias: bool
    act_fn: Any
    post_expert_norm: Any
    _apply_gate: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        T, chosen = top_k_index.shape
        if not T:
            return torch.zeros_like(hidden_states)
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        x = hidden_states[order // chosen]
        parts, start = [], 0
        chosen_ones, counts = torch.unique_consecutive(experts, return_counts=True)
        for expert, count in zip(chosen_ones.tolist(), counts.tolist(), strict=True):
            h = self._multiply(x[start : start + count], self.into, expert)
            h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
            parts.append(self._multiply(h, self.out, expert))
            start += count
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order, None]
        y = torch.empty_like(y).index_copy(0, order, y) if len(parts) > 1 else y
        return y.view(T, chosen, -1).sum(1).to(hidden_states.dtype)

    def _multiply(self, x: Tensor, name: str, expert: int) -> Tensor:
        codes, scales, spec = self.held(name)
        codes = codes[0, expert] if spec.scheme in INT8 else codes[expert]
        y = product(x, codes, scales[expert], spec)
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def dequantize_expert(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] of one expert."""
        codes, scales, spec = self.held(name)
        return dequantize(codes[0, expert] if spec.scheme in INT8 else codes[expert], scales[expert], spec, dtype)


@cache
def quantized_class(kind: Any, role: Literal["linear", "transposed", "embedding", "experts"]) -> Any:
    """The class that a module of class `kind` is changed to.

    An embedding class that adds to `nn.Embedding.forward` (Gemma's scale) keeps its own forward: the quantized class
    stands between it and `nn.Embedding`, where its `super().forward` finds it. Others keep all but their forward.
    """
    base: Any = {
        "linear": QuantizedLinear,
        "transposed": QuantizedTransposed,
        "embedding": QuantizedEmbedding,
        "experts": QuantizedExperts,
    }[role]
    if kind in (nn.Linear, nn.Embedding):
        return base
    bases = (kind, base) if role == "embedding" else (base, kind)
    return type(kind.__name__, bases, {"__module__": kind.__module__, "made": (kind, role)})


def original_class(module: QuantizedModule) -> Any:
    """The class that a module had before it was changed to this one."""
    made = type(module).__dict__.get("made")
    return made[0] if made else nn.Linear if isinstance(module, nn.Linear) else nn.Embedding


def _remake(kind: Any, role: Any) -> nn.Module:
    made = quantized_class(kind, role)
    return made.__new__(made)
