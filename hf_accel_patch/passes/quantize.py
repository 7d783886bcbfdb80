"""Quantize: weights of linear layers in 8 or 4 bits, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_accel_patch.errors import HfAccelError, UnsupportedModel
from hf_accel_patch.families import View, weight_bytes
from hf_accel_patch.families.offloading import refuse_offloaded
from hf_accel_patch.families.rescaling import refuse_rescaling
from hf_accel_patch.families.weights import Role, Weight
from hf_accel_patch.journal import Journal
from hf_accel_patch.kernels import cpu
from hf_accel_patch.ops.linear import Backend, backend_for
from hf_accel_patch.ops.modules import QuantizedModule, Specs, quantized_class
from hf_accel_patch.ops.packing import block_on, int4_block, pack
from hf_accel_patch.ops.products import Spec
from hf_accel_patch.ops.quantize import row_blocks
from hf_accel_patch.passes import foreign_modules
from hf_accel_patch.passes.calibrate import calibrated, token_ids
from hf_accel_patch.passes.saving import make_savable
from hf_accel_patch.passes.targets import GROUP_SIZES, Target, choose
from hf_accel_patch.plan import Skip, Step

Scheme = Literal["int8", "int4", "nf4", "llm.int8"]
SCHEMES = get_args(Scheme)
BACKENDS = ("auto", "compiled", "torch", foreign_modules.NAME)
PROGRESS_WEIGHTS = 100_000_000  # smaller models are done before a bar is seen


@dataclass(frozen=True)
class Quantize:
    """Weight-only quantization of every linear weight: `nn.Linear` and subclasses that multiply as it does, `Conv1D`,
    experts, and an embedding table that is tied to the head.

    `int8`: one scale per output channel; nearly exact. `int4`: a scale and a zero per group of input features, fitted
    by least squares without data, or with `calibrate` rounded by GPTQ (arXiv 2210.17323); 4.5 bits per weight at the
    default group of 64. `nf4`: the codes of bitsandbytes (QLoRA, arXiv 2305.14314). The head, and the embedding table
    that is tied to it, get groups of 32: rounding errors there go straight into the logits. Activations stay in 16
    bits. `llm.int8` (arXiv 2208.07339): as `int8`, but a prefill multiplies activations in 8 bits, save for the
    features with outliers.

    Backends on the CPU: `compiled` is a kernel in C that this machine's compiler makes at first use (x86 with AVX2 or
    AVX512); `torch` is what PyTorch ships, which rounds activations to bfloat16; `auto` takes the first where it can be
    made. Both work on the same bytes. CUDA has Triton kernels. `bitsandbytes`, by name only: its own modules instead
    of `nn.Linear`, for nf4 and llm.int8, as `BitsAndBytesConfig` would have loaded them.

    A token of a decode reads each weight once, so time falls with the bytes; a prefill multiplies blocks unpacked to
    bfloat16, or the codes as integers where that is faster. Row by row in place: the peak is the model and one packed
    weight. What is not quantized is named in the report. `save_pretrained` writes the codes, with a
    `quantization_config` that `from_pretrained` understands once this package is imported. Gradients pass through to
    adapters, as in QLoRA.

    >>> model = patch(model, quantize=Quantize("int4", skip=("lm_head",), originals="keep"))
    """

    scheme: Scheme
    group_size: int | None = None  # input features per scale, of 4 bits only: 32, 64, 128; None: 64, or 32 if it must
    skip: tuple[str, ...] = ()  # names of modules, or shell patterns over them, that stay as they are
    backend: Literal["auto", "compiled", "torch", "bitsandbytes"] = "auto"
    calibrate: Sequence[Any] | None = field(default=None, repr=False)  # texts, or tensors of token ids [T] or [B, T]
    originals: Literal["keep", "discard"] | None = None  # None: discard, but keep in `with patched(...)`
    tokenizer: Any = field(default=None, repr=False)  # for `calibrate`; None: that at model.name_or_path

    name = "quantize"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"quantize: unknown scheme {self.scheme!r}; the schemes are {', '.join(SCHEMES)}")
        if self.group_size is not None and type(self.group_size) is not int:
            raise TypeError(f"quantize: group_size={self.group_size!r} is not an int; allowed: 32, 64, 128")
        if self.group_size not in (None, *GROUP_SIZES):
            raise ValueError(f"quantize: group_size={self.group_size!r}; allowed: 32, 64, 128")
        if self.backend not in BACKENDS:
            raise ValueError(f"quantize: unknown backend {self.backend!r}; allowed: {', '.join(map(repr, BACKENDS))}")
        if self.foreign and (self.scheme not in foreign_modules.SCHEMES or self.group_size not in (None, 64)):
            raise ValueError(
                f"quantize: {self.scheme!r} with group_size={self.group_size} and backend='bitsandbytes', which has "
                "nf4 in groups of 64, and llm.int8"
            )
        if self.originals not in (None, "keep", "discard"):
            raise ValueError(f"quantize: originals={self.originals!r}; allowed: 'keep', 'discard'")
        several = isinstance(self.skip, Iterable) and not isinstance(self.skip, str)
        if not several or not all(isinstance(pattern, str) for pattern in self.skip):
            raise TypeError(f"quantize: skip={self.skip!r} is not a tuple of names")
        object.__setattr__(self, "skip", tuple(self.skip))
        if self.calibrate is not None:
            if self.scheme != "int4":
                raise ValueError(f"quantize: calibrate= applies to int4; {self.scheme} rounds to nearest")
            object.__setattr__(self, "calibrate", comparable(self.calibrate))

    @property
    def foreign(self) -> bool:
        """Whether modules of another package take the place of the model's."""
        return self.backend == foreign_modules.NAME

    def inspect(self, view: View) -> Step | Skip:
        if self.foreign:
            foreign_modules.check_installed()
        refuse_offloaded(view, f"quantize={self.scheme!r}")
        if not self.foreign:
            refuse_rescaling(view, f"quantize={self.scheme!r}")
        targets, skipped = self.choose(view)
        if not targets:
            if any(isinstance(module, QuantizedModule) for _, module in view.named_modules()):
                return Skip(self, "its weights are quantized already", view.weight_bytes())
            raise self.nothing(view, skipped)
        for target in targets:
            self.check(target)
        before = view.weight_bytes()
        replaced = sum(p.numel() * p.element_size() for target in targets for p in target.parameters())
        after = before - replaced + sum(target.packed_bytes for target in targets)
        facts = {"bytes_before": before, "bytes_after": after} | self.facts(targets, skipped)
        work = sorted(targets, key=lambda target: target.packed_bytes)
        if self.calibrate is not None:
            return Step(self, facts, (view.model, work, token_ids(self.calibrate, view.model, self.tokenizer)))
        return Step(self, facts, (view.model, work, view))

    def nothing(self, view: View, skipped: list[tuple[str, str]]) -> UnsupportedModel:
        """What to raise where nothing can be quantized."""
        reasons = sorted({reason for _, reason in skipped}) or ["it has no linear layer"]
        return UnsupportedModel(f"{view.subject} has no weight that {self.scheme} can hold: {'; '.join(reasons)}")

    def check(self, target: Target) -> None:
        """Raise UnsupportedModel for weights that no scale fits, or for which there are no kernels."""
        for weight, parameter in zip(target.weights, target.parameters(), strict=True):
            refuse_unsuitable(f"{target.modules[0][0]}.{weight.name}", parameter.detach(), ours=not self.foreign)

    def facts(self, targets: list[Target], skipped: list[tuple[str, str]]) -> dict[str, Any]:
        """What a report says beside sizes."""
        sizes = sorted({target.group_size for target in targets} - {0})
        modules = [module for target in targets for _, module in target.modules]
        held = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
        on_cuda = any(tensor.is_cuda for tensor in held if tensor is not None)
        facts: dict[str, Any] = {"exact": False, "scheme": self.scheme}
        facts |= {"group_size": sizes[0] if len(sizes) == 1 else sizes or "per channel"}
        if self.foreign:
            facts["backend"] = foreign_modules.described()
        else:
            facts["backend"] = "Triton kernels" if on_cuda else str(self.backend_of())
        facts |= {"weights": sum(len(target.weights) for target in targets)}
        if self.calibrate is not None:
            facts["calibrated"] = "GPTQ"
        facts |= {"originals": self.originals or "discard"}
        facts["skipped"] = [{"name": name, "reason": reason} for name, reason in skipped]
        return facts

    def apply(self, step: Step, journal: Journal) -> None:
        """Smallest weight first, each freed before the next: the largest packed weight meets the smallest model."""
        model: PreTrainedModel = step.work[0]
        targets: list[Target] = step.work[1]
        total = sum(target.size for target in targets)
        if not self.foreign:
            make_savable(model, journal)
        with logging.tqdm(
            total=total, desc=f"quantize to {self.scheme}", unit="w", unit_scale=True, disable=total < PROGRESS_WEIGHTS
        ) as bar:
            if self.foreign:
                for target in targets:
                    foreign_modules.install(model, target, self.scheme, self.originals == "keep", journal)
                    bar.update(target.size)
                foreign_modules.describe(step.work[2], self.scheme, journal)
                return
            if self.calibrate is not None:
                packs: Iterable[tuple[Target, list[tuple[Tensor, Tensor]]]] = calibrated(
                    model, targets, step.work[2], self.packed
                )
            else:
                packs = ((target, self.packed(target)) for target in targets)
            for target, packed in packs:
                self.install(target, packed, journal)
                bar.update(target.size)

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """What became of it."""
        return {"bytes_after": weight_bytes(model) + foreign_modules.held_bytes(model)} if self.foreign else {}

    def packed(self, target: Target) -> list[tuple[Tensor, Tensor]]:
        """Codes and scales of each of its weights."""
        pairs = zip(target.weights, target.parameters(), strict=True)
        return [self.pack(target, weight, parameter.detach()) for weight, parameter in pairs]

    def pack(self, target: Target, weight: Weight, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a parameter as it lies in the module."""
        dense = parameter.transpose(-1, -2) if weight.transposed else parameter
        return pack(dense, self.scheme, target.group_size, block_on(dense.device), target.head)

    def install(
        self, target: Target, packed: list[tuple[Tensor, Tensor]], journal: Journal, scheme: str | None = None
    ) -> None:
        """Put codes in the place of the parameters. `packed`: one pair per weight."""
        backend, like = self.backend_of(), packed[0][0].new_empty(0, dtype=target.parameters()[0].dtype)
        specs = Specs({weight.name: Spec(scheme or self.scheme, weight.shape, backend) for weight in target.weights})
        packed = [(_trainable(codes), _trainable(scales)) for codes, scales in packed]
        for name, module in target.modules:
            for weight, (codes, scales) in zip(target.weights, packed, strict=True):
                kept = self.originals == "keep"
                journal.remove_parameter(module, weight.name, keep=kept, label=f"{name}.{weight.name}")
                journal.set_buffer(module, weight.name, codes)
                journal.set_buffer(module, f"{weight.name}_scales", scales)
            journal.set_buffer(module, "like", like, persistent=False)
            journal.set_attribute(module, "specs", specs)
            if target.role == "experts":
                into, out = (weight.name for weight in target.weights)
                journal.set_attribute(module, "into", into)
                journal.set_attribute(module, "out", out)
            role: Role = "embedding" if isinstance(module, nn.Embedding) else target.role
            journal.change_class(module, quantized_class(_kind(module), role))

    def share(self, module: QuantizedModule, other: nn.Module, journal: Journal) -> None:
        """Let another module, whose parameter is gone, use the codes of this one."""
        for key in ("weight", "weight_scales"):
            journal.set_buffer(other, key, module._buffers[key])
        journal.set_buffer(other, "like", module.like, persistent=False)
        journal.set_attribute(other, "specs", module.specs)
        role: Role = "embedding" if isinstance(other, nn.Embedding) else "linear"
        journal.change_class(other, quantized_class(_kind(other), role))

    def modules(self, view: View) -> set[nn.Module]:
        """The modules whose weights would be quantized."""
        return {module for target in self.choose(view)[0] for _, module in target.modules}

    def choose(self, view: View) -> tuple[list[Target], list[tuple[str, str]]]:
        """The weights to quantize, and the names of the modules left alone with the reason."""
        found = choose(view, self.scheme, self.group_size, self.skip, int4_block() or 64)
        return foreign_modules.suitable(*found, self.scheme) if self.foreign else found

    def backend_of(self) -> Backend:
        if self.backend == "compiled" and (reason := cpu.why_not(int4_block())):
            raise HfAccelError(f"quantize: the compiled kernels cannot be made here: {reason}", "use backend='auto'")
        return backend_for(self.scheme, self.backend != "torch")


def _kind(module: nn.Module) -> Any:
    return type(module)


def comparable(texts: Any) -> tuple[Any, ...]:
    """Texts as strings, and token ids as tuples, so that equal options are equal."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError("calibrate= takes a list of texts, or of tensors of token ids")
    kept: list[Any] = []
    for text in texts:
        if isinstance(text, str):
            kept.append(text)
        elif isinstance(text, Tensor) and text.ndim in (1, 2) and not text.is_floating_point():
            kept += [tuple(row) for row in text.reshape(-1, text.shape[-1]).tolist()]
        elif isinstance(text, tuple) and all(isinstance(token, int) for token in text):
            kept.append(text)
        else:
            raise TypeError(f"calibrate= takes texts, or tensors of token ids [T] or [B, T], not {type(text).__name__}")
    if not any(kept):
        raise ValueError("calibrate= holds no text")
    return tuple(kept)


def _trainable(tensor: Tensor) -> Tensor:
    """Not one of inference mode, which autograd refuses."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def refuse_unsuitable(name: str, weight: Tensor, *, ours: bool = True) -> None:
    """Raise UnsupportedModel for a weight on a device without kernels, and for one that holds NaN or infinity. `ours`:
    whether the kernels are those of this package."""
    if weight.is_meta:
        return  # a plan from a configuration alone
    if ours and weight.is_cuda and (reason := _no_triton()):
        raise UnsupportedModel(f"{name} is on {weight.device}: {reason}", "pip install triton")
    if ours and weight.device.type not in ("cpu", "cuda"):
        raise UnsupportedModel(f"{name} is on {weight.device}; there are kernels for cpu and cuda only")
    flat = weight.reshape(-1, weight.shape[-1])
    if not all(torch.isfinite(flat[rows].float().sum()) for rows in row_blocks(flat, 1)):
        raise UnsupportedModel(
            f"{name} holds NaN or infinity, so no scale fits it", "check the checkpoint, or skip this module"
        )


def _no_triton() -> str:
    return "" if find_spec("triton") else "its kernels need triton, which is not installed"
