"""Attention modules that hand over what is cached as it is, instead of expanding it at every step."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_accel_patch.families import View
from hf_accel_patch.families.latent import Sizes, expanding, latent_sizes
from hf_accel_patch.journal import Journal
from hf_accel_patch.kernels import cpu
from hf_accel_patch.ops.latent import Latent, Latents
from hf_accel_patch.ops.modules import FastLinear, QuantizedLinear
from hf_accel_patch.ops.packing import INT8
from hf_accel_patch.ops.products import as_floats
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.ops.stored import Stored

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # for sums are float32
PROBES = 3  # tokens on which a class of modules must do what `Latents` says


def latent_modules(view: View) -> list[nn.Module]:
    """The modules whose cached latents can be attended to: their layer from latents to keys and values is a plain
    product, and they do with it what `Latents` takes them to do, which is tried once for each class."""
    proved: dict[tuple[type, Sizes], bool] = {}
    found = []
    for _, module in view.attention_modules():
        sizes = latent_sizes(module)
        if sizes is None or not _plain(expanding(module)):
            continue
        if (type(module), sizes) not in proved:
            proved[type(module), sizes] = _is_as_described(module, sizes)
        if proved[type(module), sizes]:
            found.append(module)
    return found


def absorb(modules: list[nn.Module], implementation: str, journal: Journal) -> None:
    """Let these modules hand `Latent` keys and values to the attention function of this name."""
    for module in modules:
        journal.change_class(module, latent_class(type(module), implementation))  # type: ignore[arg-type]


class LatentAttention(nn.Module):
    """What a module's own class is joined with."""

    config: Any
    implementation: str  # the attention function that takes `Latent`

    def expand_kv(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, N + P] and values [B, H, S, V] of the cached latents: described where nothing but our
        attention function will look at them, else computed."""
        expand: Any = super().expand_kv  # type: ignore[misc]
        projection = expanding(self)
        if (
            self.config._attn_implementation != self.implementation
            or not (_ordinary(latent) and type(rotated) is type(latent))
            or not _plain(projection)
            or _dtype(projection) is not latent.dtype
        ):
            return cast(tuple[Tensor, Tensor], expand(latent, rotated))
        sizes = latent_sizes(self)
        assert sizes is not None
        latents = _described(projection, sizes, latent, rotated, partial(expand, latent, rotated))
        return Latent(latents, 0), Latent(latents, 1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes made at run time are made again where a pickle is read."""
        return _remake, type(self).__dict__["made"], self.__getstate__()  # type: ignore[no-untyped-call]


@cache
def latent_class(kind: Any, implementation: str) -> Any:
    """The class that a module of class `kind` is changed to."""
    made = {"made": (kind, implementation), "implementation": implementation}
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    names |= {name: vars(kind)[name] for name in ("__firstlineno__",) if name in vars(kind)}  # where its source is
    return type(kind.__name__, (LatentAttention, kind), made | names)


def _remake(kind: Any, implementation: str) -> nn.Module:
    made = latent_class(kind, implementation)
    return made.__new__(made)


def _described(projection: Any, sizes: Sizes, latent: Tensor, rotated: Tensor, expand: Any) -> Latents:
    heads = projection.out_features // (sizes.key + sizes.value)
    unpacks = isinstance(projection, QuantizedLinear)
    weight = partial(_weight, projection, latent.dtype)
    return Latents(latent, rotated, sizes.key, sizes.value, heads, unpacks, weight, expand)


def _ordinary(x: Tensor) -> bool:
    """Whether nobody asks for gradients of it, and nothing records or replaces operators."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    plain = type(x) in (Tensor, Stored) and not x.is_meta and x.dtype in DTYPES
    return plain and not (traced or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))


def _plain(projection: Any) -> bool:
    """Whether a layer is a product with its weight and nothing else: no adapter, no bias, no hook."""
    known = type(projection) in (nn.Linear, FastLinear) or isinstance(projection, QuantizedLinear)
    if not known or projection.bias is not None:
        return False
    hooks = projection._forward_hooks or projection._forward_pre_hooks
    return not hooks and "forward" not in vars(projection)


def _dtype(projection: Any) -> torch.dtype:
    dtype: torch.dtype = (projection.like if isinstance(projection, QuantizedLinear) else projection.weight).dtype
    return dtype


def _weight(projection: Any, dtype: torch.dtype) -> Tensor:
    """What a quantized layer holds is unpacked for each step: that costs as much as expanding some tens of tokens, and
    a copy would cost the memory for which it was quantized. It may last until the next weight is unpacked."""
    if not isinstance(projection, QuantizedLinear):
        weight: Tensor = projection.weight
        return weight.detach()
    codes, scales, spec = projection.held("weight")
    in_order = projection._buffers.get("weight_order") is None
    kernels = cpu.library(2 * codes.shape[2]) if codes.is_cpu and spec.scheme not in INT8 and in_order else None
    if kernels is None or not spec.backend.compiled:
        return projection.dequantize(dtype)
    transposed = cpu.unpack_int4(kernels, codes, as_floats(scales), TABLES.get(spec.scheme), 0, len(codes))
    unpacked = transposed[:, : spec.shape[0]].T
    return unpacked if dtype is torch.bfloat16 else unpacked.to(dtype).contiguous()


@torch.no_grad()
def _is_as_described(module: nn.Module, sizes: Sizes) -> bool:
    """Whether a module expands random latents to the keys and values that `Latents` stands for."""
    projection, expand = expanding(module), getattr(module, "expand_kv")  # noqa: B009  (a method that few modules have)
    dtype = _dtype(projection)
    device = projection.weight.device
    if projection.out_features % (sizes.key + sizes.value):
        return False
    if device.type == "meta":  # only planned: nothing to try
        return True
    generator = torch.Generator().manual_seed(0)
    latent, rotated = (
        torch.randn(1, 1, PROBES, size, generator=generator).to(device, dtype) for size in (sizes.latent, sizes.rotated)
    )
    keys, values = expand(latent, rotated)
    matrix = _weight(projection, dtype).view(-1, sizes.key + sizes.value, sizes.latent).float()
    expected = (latent[0].float() @ matrix.transpose(1, 2))[None]
    shared = rotated.float().expand(-1, len(matrix), -1, -1)
    wanted = torch.cat((expected[..., : sizes.key], shared), dim=-1), expected[..., sizes.key :]
    return all(
        got.shape == want.shape and bool((got.float() - want).abs().max() <= 0.1 * want.abs().max())
        for got, want in zip((keys, values), wanted, strict=True)
    )
