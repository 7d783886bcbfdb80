"""What the weight of a quantized module reads as: a tensor without values of its own, which dequantizes when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from hf_accel_patch.ops.modules import HasWeight

UNCHANGEABLE = "a quantized weight cannot be changed; unpatch, change the dense weight, and patch again"


class QuantizedWeight(Tensor):
    """What `module.weight` reads as: shape, dtype and device for free; any operation on it dequantizes first."""

    module: HasWeight
    codes: Tensor
    _is_hf_initialized = True  # what initializes the weights that a checkpoint lacks leaves it alone

    @staticmethod
    def __new__(cls, module: HasWeight, codes: Tensor | None = None) -> QuantizedWeight:
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
