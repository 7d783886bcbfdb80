"""Tensors without memory, which become dense only when somebody computes with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

DETACH = torch.ops.aten.detach.default  # what checkpointing does to all that it is given
MOVE = torch.ops.aten._to_copy.default  # what accelerate does to what a layer on another device is given


class Lazy(Tensor):
    """Shape, dtype and device are those of the dense tensor. Any operation builds that first, so code that computes
    stays right, and code that only passes it on is spared it; the package's attention looks inside instead.

    A subclass makes itself by `Tensor._make_wrapper_subclass` and says what `dense` is.
    """

    fixed = ""  # why it cannot be changed in place, if it cannot: what a copy would get would be lost

    def dense(self) -> Tensor:
        """The tensor, contiguous if this one says that it is."""
        raise NotImplementedError

    def detached(self) -> Tensor:
        """The same without gradients."""
        return self.dense().detach()

    def moved(self, device: torch.device) -> Tensor:
        """The same on another device."""
        return self.dense().to(device)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is DETACH:
            return args[0].detached()
        if func is MOVE and kwargs.get("dtype", args[0].dtype) is args[0].dtype and kwargs.get("device") is not None:
            return args[0].moved(kwargs["device"])
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, Lazy) and value.fixed and argument.alias_info is not None:
                if argument.alias_info.is_write:
                    raise RuntimeError(f"{func}: {value.fixed}")
        dense = lambda lazy: lazy.dense()  # noqa: E731
        return func(*tree_map_only(Lazy, dense, args), **tree_map_only(Lazy, dense, kwargs))
