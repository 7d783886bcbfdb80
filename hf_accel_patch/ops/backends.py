"""Which code computes attention: what each backend can do, and which one is taken, as values.

torch: PyTorch's kernels, and blocks of them (ops.attention); the reference, which can do everything. triton: the
package's own kernels. flash-attn: the package of that name. flex: PyTorch's FlexAttention.

The rule for CUDA rests on published numbers (H100, head size 128, 16k tokens, TFLOP/s: cuDNN 595, Triton 395,
FlashAttention-2 370; with head size 256 509, unknown, 298) and, on an H200, on 647 for PyTorch's and 423 for Triton's
where attention is plain, 55 and 382 with a window, 21 and 299 with soft caps (benchmarks/attention_kernels.py).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_accel_patch.ops import flash, flex
from hf_accel_patch.ops.case import Dense, Everything, Mask, Variant
from hf_accel_patch.ops.decode import MOST_TOKENS
from hf_accel_patch.ops.fusing.tracing import noted
from hf_accel_patch.ops.launching import launch, unsuitable
from hf_accel_patch.ops.seen import seen

Backend = Literal["auto", "torch", "triton", "flash-attn", "flex"]
BACKENDS = get_args(Backend)
HINTS = {"triton": "pip install 'hf_accel_patch[triton]'", "flash-attn": "pip install flash-attn --no-build-isolation"}
MOST_CHANNELS = 256  # of a head, in Triton and flash-attn
HALVES = (torch.bfloat16, torch.float16)
DECODED_ROWS = 32  # query rows per key/value head that the split kernel takes in one pass


@dataclass(frozen=True)
class Case:
    """One kind of attention, as far as a choice depends on it."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    head_size: int = 128
    value_size: int = 128
    softcap: bool = False
    sinks: bool = False
    bias: bool = False
    mask: Literal["plain", "described", "stored"] = "plain"  # plain: causal, padded at most, or none
    few_tokens: bool = False  # a decode
    gradients: bool = False
    otherwise: str = ""  # what torch alone can do
    index: int | None = None  # of the device, where there are several

    @property
    def plain(self) -> bool:
        same = self.head_size == self.value_size
        return same and self.mask == "plain" and not (self.softcap or self.sinks or self.bias)


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was taken."""

    backend: str
    why: str


@dataclass
class Asked:
    """The backend that a model's user asked for, and what was taken instead or chosen, as it turned out."""

    backend: str = "auto"
    used: list[str] = field(default_factory=list)

    def note(self, choice: Choice) -> None:
        text = f"{choice.backend}: {choice.why}"
        if text not in self.used:
            self.used.append(text)


def case_of(query: Tensor, key: Tensor, value: Tensor, mask: Mask, variant: Variant) -> Case:
    inputs = (query, key, value, variant.sinks)
    plain = mask.square or isinstance(mask, Everything)
    return Case(
        query.device.type,
        query.dtype,
        query.shape[-1],
        value.shape[-1],
        variant.softcap is not None,
        variant.sinks is not None,
        variant.bias is not None,
        "stored" if isinstance(mask, Dense) else "plain" if plain else "described",
        query.shape[2] <= MOST_TOKENS,
        torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs),
        _otherwise(query, key, value, variant),
        query.device.index,
    )


def _otherwise(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> str:
    bias, sinks = variant.bias, variant.sinks
    if any(type(each) is not Tensor and type(each) is not torch.nn.Parameter for each in (query, key, value)):
        return "queries, keys or values are a subclass of Tensor"
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        return "queries, keys and values differ in dtype or device"
    if variant.dropout:
        return "dropout"
    if sinks is not None and sinks.shape not in ((1, query.shape[1], 1, 1), (query.shape[1],)):
        return "sinks that depend on the query"
    if bias is not None and (bias.shape[2] != 1 or bias.dtype != torch.float32 or bias.requires_grad):
        return "a bias that is no constant float32 row for all queries"
    return ""


def missing(backend: str) -> tuple[str, str] | None:
    """Why a backend is not there, and what to do about it."""
    if backend == "triton" and _triton() is None:
        return "triton is not installed", HINTS[backend]
    if backend == "flash-attn" and (error := _flash_error()):
        return f"flash-attn cannot be imported: {error}", HINTS[backend]
    return None


def cannot(backend: str, case: Case) -> str:
    """Why a backend that is there cannot do this; empty if it can."""
    if backend == "torch":
        return ""
    if case.otherwise:
        return case.otherwise
    widest, name = max(case.head_size, case.value_size), str(case.dtype).removeprefix("torch.")
    if backend == "triton":
        if case.device != "cuda" and not (case.device == "cpu" and _interpreted()):
            return f"the kernels are for CUDA, and this is on {case.device}"
        if case.device == "cuda" and (reason := unsuitable(case.index)):
            return reason
        if case.dtype not in (*HALVES, torch.float32):
            return f"the kernels take no {name}"
        if widest > MOST_CHANNELS:
            return f"the kernels take heads of up to {MOST_CHANNELS}, and these have {widest}"
    if backend == "flash-attn":
        if case.device != "cuda":
            return f"it is for CUDA, and this is on {case.device}"
        if torch.version.hip is None and (reason := unsuitable(case.index)):
            return reason.replace("the kernels need", "it needs")
        if case.dtype not in HALVES:
            return f"it takes bfloat16 and float16, and this is {name}"
        if widest > MOST_CHANNELS or case.head_size != case.value_size:
            sizes = f"{case.head_size} and {case.value_size}"
            return f"it takes equal head sizes of up to {MOST_CHANNELS}, and these are {sizes}"
        if case.sinks:
            return "it has no sinks"
    if backend == "flex":
        if case.gradients and case.device == "cpu":
            return "on a CPU it has no gradients"
        if case.device not in ("cpu", "cuda"):
            return f"it is for CPU and CUDA, and this is on {case.device}"
    return ""


def choose(backend: str, case: Case) -> Choice:
    """The backend for a case. One that is asked for by name and cannot do it falls back to the rule."""
    if backend != "auto":
        reason = cannot(backend, case)
        if not reason:
            return Choice(backend, "asked for")
        found = missing(backend)
        instead = choose("auto", case)
        return Choice(instead.backend, f"{backend}: {found[0] if found else reason}")
    if case.device != "cuda":
        return Choice("torch", f"on {case.device} PyTorch's and the compiled kernels are the fastest")
    if case.otherwise:
        return Choice("torch", case.otherwise)
    if case.plain:
        return Choice("torch", "PyTorch's own kernels are the fastest at plain causal attention")
    if case.few_tokens or case.mask == "stored":
        return Choice("torch", "few queries" if case.few_tokens else "the mask is stored, so it is small")
    order = ("triton", "flash-attn") if case.head_size <= 128 else ("flash-attn", "triton")
    for name in order:
        if not cannot(name, case) and missing(name) is None:
            return Choice(name, "computes what is seen only, with soft caps, sinks and biases, in one pass")
    return Choice("torch", "; ".join(f"{name}: {(missing(name) or (cannot(name, case),))[0]}" for name in order))


def attend_by(asked: Asked, query: Tensor, key: Tensor, value: Tensor, mask: Mask, variant: Variant) -> Tensor | None:
    """Attention [B, T, H, V] of query [B, H, T, D] to key and value, by the backend that was asked for or that the rule
    says; None where that is torch, or where the mask turns out to be one for torch."""
    choice = choose(asked.backend, case_of(query, key, value, mask, variant))
    output: Tensor | str = ""
    if choice.backend != "torch":
        output = _computed(choice.backend, query, key, value, mask, variant)
        if isinstance(output, str):
            choice = Choice("torch", f"{choice.backend}: {output}")
    asked.note(choice)
    return None if isinstance(output, str) else output


def _computed(backend: str, query: Tensor, key: Tensor, value: Tensor, mask: Mask, variant: Variant) -> Tensor | str:
    """By one backend, or why it cannot."""
    (_, H, T, _), (K, S) = query.shape, key.shape[1:3]
    if backend == "triton" and T <= MOST_TOKENS and H // K * T <= DECODED_ROWS and variant.bias is None:
        block = mask.block(0, T, 0, S)
        if not torch.is_grad_enabled() and (block is None or block.dtype == torch.bool):
            return _decoded(query, key, value, block, variant)
    found = seen(mask, T, S, query.device)
    if found is None:
        return "what a query sees is not one run of keys that is the same for all heads"
    if backend == "flash-attn":
        return flash.attend(query, key, value, found, variant)
    intervals = found.intervals.to(query.device)
    if backend == "flex":
        return flex.attend(query, key, value, intervals, variant)
    sinks = None if variant.sinks is None else variant.sinks.reshape(-1)
    options = variant.scale, variant.softcap, sinks, variant.bias
    kernels, kind = _triton(), ("prefill", *_kind(query, value, variant))
    return launch(kind, query.device, lambda: kernels.attend(query, key, value, intervals, *options)[0])


def _kind(query: Tensor, value: Tensor, variant: Variant) -> tuple[Hashable, ...]:
    """What decides whether a kernel can start."""
    extras = variant.softcap is None, variant.sinks is None, variant.bias is None
    return query.dtype, query.shape[-1], value.shape[-1], *extras


def _decoded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, variant: Variant) -> Tensor | str:
    """Few queries, with the tokens split between programs."""
    from hf_accel_patch.kernels import triton_decode

    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    sinks = None if variant.sinks is None else variant.sinks.float().reshape(-1).contiguous()
    mask = mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
    inputs = query, None, 0, 0, key, value, mask, variant.scale, variant.softcap, sinks
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    kind = "decode", rows, *_kind(query, value, variant)
    return launch(kind, query.device, lambda: noted(triton_decode.attend, *inputs))


@cache
def _triton() -> Any:
    try:
        from hf_accel_patch.kernels import triton_prefill
    except ImportError:
        return None
    return triton_prefill


def _interpreted() -> bool:
    return _triton() is not None and _triton().INTERPRETED


def _flash_error() -> str:
    try:
        import flash_attn  # type: ignore[import-not-found]  # noqa: F401
    except Exception as error:  # one that is built for another PyTorch fails in many ways
        return str(error) or type(error).__name__
    return ""
