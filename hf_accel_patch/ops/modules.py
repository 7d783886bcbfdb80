"""Linear layers, embeddings and experts with other products or quantized weights.

They are classes that a live module is changed to. The quantized ones have buffers in place of a parameter: one of its
name with the codes, and NAME_scales. Scales are bit patterns held as integers, so that `.half()` and `.to(dtype)` leave
them alone; the empty buffer `like` follows such casts and is the dtype that the weight stands for.

A buffer of codes never has the shape of the parameter. So a quantized checkpoint that is read without this package is
refused as one of wrong sizes, where it could not be read right.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_accel_patch.kernels import cpu
from hf_accel_patch.ops.dense import FloatBackend, linear_float
from hf_accel_patch.ops.packing import INT8, block_on, first_rows, in_blocks
from hf_accel_patch.ops.products import Spec, dequantize, product, rows
from hf_accel_patch.ops.routed import of_expert, routed_product, runs
from hf_accel_patch.ops.weight import UNCHANGEABLE, QuantizedWeight


class FastLinear(nn.Linear):
    """y = x W^T + b, by whatever is fastest for the rows of x. Training, graphs and other devices have PyTorch's."""

    backend: FloatBackend

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, backend = self.weight, self.bias, self.backend
        same = input.dtype is weight.dtype is backend.dtype and (bias is None or bias.dtype is weight.dtype)
        if same and cpu.readable(input, weight, bias):
            return linear_float(input, weight, bias, backend)
        return F.linear(input, weight, bias)


class FastTransposed(nn.Module):
    """y = x W + b, the same for a weight [K, N]. To be put before the class of the module, which has the other rows."""

    weight: nn.Parameter
    bias: nn.Parameter
    backend: FloatBackend

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, backend = self.weight, self.bias, self.backend
        if x.dtype is weight.dtype is bias.dtype is backend.dtype and cpu.readable(x, weight, bias):
            if backend.takes(x.numel() // weight.shape[0]):
                return linear_float(x, weight.detach().T, bias, backend)
        return super().forward(x)


class Specs(dict[str, Spec]):
    """By the name of the parameter that codes stand in for. Modules that are tied have the same one."""

    moved: tuple[Any, dict[str, Any]] | None = None  # weak references: the codes that were moved last, and where to

    def __reduce__(self) -> Any:
        return Specs, (dict(self),)


class QuantizedModule(nn.Module):
    """What all share: codes and scales as buffers in place of parameters, moved, pickled and shown as such."""

    specs: Specs
    like: Tensor
    transposed = False  # whether the parameter was [K, N]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keeps codes as kernels of the device read them, whatever the memory format."""
        before = self._codes()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._settle(before, anew=False)
        return self

    def __setstate__(self, state: Any) -> None:
        """A pickle may come from another device."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._settle(self._codes(), anew=True)

    def _codes(self) -> Any:
        return self._buffers[next(iter(self.specs))]

    def _settle(self, before: Any, *, anew: bool) -> None:
        """Lay out what has moved, or is `anew`, for the device where it is; once for all that are tied."""
        names = [key for name in self.specs for key in (name, f"{name}_scales")]
        buffers: dict[str, Any] = self._buffers
        moved = self.specs.moved
        if moved is not None and moved[0]() is before and all(tensor() is not None for tensor in moved[1].values()):
            buffers.update({key: tensor() for key, tensor in moved[1].items()})
        elif anew or self._codes() is not before:
            buffers.update({key: buffers[key].contiguous() for key in names})
            if (device := self._codes().device).type != "meta":
                reblock(self, block_on(device))
            if self._codes() is not before:
                self.specs.moved = ref(before), {key: ref(buffers[key]) for key in names}

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


def reblock(module: QuantizedModule, block: int) -> None:
    """Lay 4-bit codes out in blocks of so many rows."""
    for name, spec in module.specs.items():
        codes, scales, _ = module.held(name)
        if spec.scheme in INT8 or codes.shape[-1] * 2 == block:
            continue
        N, dim = -(-spec.shape[0] // block) * block, 1 if codes.ndim == 3 else 2
        parts = [in_blocks(each, N, block) for each in ([codes] if dim == 1 else codes)]
        module._buffers[name] = parts[0] if dim == 1 else torch.stack(parts)
        module._buffers[f"{name}_scales"] = first_rows(scales, N, dim)


class HasWeight(QuantizedModule):
    """One weight, named `weight`. With `weight_order` [K] its columns are sorted: column j is for feature order[j]."""

    @property
    def weight(self) -> Tensor:
        if torch.compiler.is_compiling():  # which cannot look into a tensor of a class that it makes itself
            return self.dequantize(self.like.dtype)
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
        x, learning = hidden_states[order // chosen], torch.is_grad_enabled() and hidden_states.requires_grad
        whole = torch.compiler.is_compiling() and not learning
        parts = [self._graphed(x, experts)] if whole else [self._expert(x[rows], each) for each, rows in runs(experts)]
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order, None]
        y = torch.empty_like(y).index_copy(0, order, y) if whole or len(parts) > 1 else y
        return y.view(T, chosen, -1).sum(1).to(hidden_states.dtype)

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        """Of one expert, for its rows [n, K]."""
        return self._multiply(self._gated(self._multiply(x, self.into, expert)), self.out, expert)

    def _gated(self, h: Tensor) -> Tensor:
        return self._apply_gate(h) if self.has_gate else self.act_fn(h)

    def _multiply(self, x: Tensor, name: str, expert: int) -> Tensor:
        codes, scales, spec = self.held(name)
        y = product(x, of_expert(codes, spec.scheme, expert), scales[expert], spec)
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def _graphed(self, x: Tensor, experts: Tensor) -> Tensor:
        """Of all of them, for rows [S, K] that are sorted by experts [S]."""

        def multiply(x: Tensor, name: str) -> Tensor:
            y = routed_product(x, experts, *self.held(name))
            return y + getattr(self, f"{name}_bias")[experts] if self.has_bias else y

        return multiply(self._gated(multiply(x, self.into)), self.out)

    def dequantize_expert(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] of one expert."""
        codes, scales, spec = self.held(name)
        return dequantize(of_expert(codes, spec.scheme, expert), scales[expert], spec, dtype)


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
