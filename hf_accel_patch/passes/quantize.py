"""Quantize: weights of linear layers in 8 or 4 bits, in place, for the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_accel_patch.errors import HfAccelError, UnsupportedModel
from hf_accel_patch.families import ADAPTERS, View
from hf_accel_patch.journal import Journal
from hf_accel_patch.kernels import cpu
from hf_accel_patch.ops.linear import Backend, backend_int4, backend_int8, int4_block, pack_int4
from hf_accel_patch.ops.modules import Quantized, quantized_class
from hf_accel_patch.ops.quantize import quantize_int8, row_blocks
from hf_accel_patch.plan import Skip, Step

Scheme = Literal["int8", "int4"]
SCHEMES = ("int8", "int4", "nf4", "llm.int8")  # all that the name can be; the last two are not in this version
GROUP_SIZES = (64, 32, 128)  # in the order of choice: 64 costs half a bit per weight and loses little against 32
HEAD_GROUP_SIZE, HEAD_REFINEMENTS = 32, 6  # rounding errors of the head go straight into the logits
PROGRESS_WEIGHTS = 100_000_000  # smaller models are done before a bar is seen


@dataclass(frozen=True)
class Target:
    """One weight [N, K] and every module that uses it: several if it is tied."""

    modules: tuple[tuple[str, nn.Module], ...]
    shape: tuple[int, int]
    group_size: int  # 0 for int8, which has one scale per row
    head: bool

    @property
    def packed_bytes(self) -> int:
        N, K = self.shape
        if not self.group_size:
            return N * K + 2 * N
        padded = -(-N // 64) * 64
        return padded * K // 2 + 4 * padded * K // self.group_size


@dataclass(frozen=True)
class Quantize:
    """Weight-only quantization of every `nn.Linear`, and of an embedding table that is tied to one.

    `int8`: one scale per output channel; nearly exact. `int4`: a scale and a zero per group of input features, fitted
    by least squares without data; 4.5 bits per weight at the default group of 64. The head, and the embedding table
    that is tied to it, get groups of 32: rounding errors there go straight into the logits. Activations stay in 16
    bits.

    Backends: `compiled` is a kernel in C that this machine's compiler makes at first use (x86 with AVX2 or AVX512);
    `torch` is the one that PyTorch ships, which rounds activations to bfloat16; `auto` takes the first where it can be
    made. Both work on the same bytes.

    A token of a decode reads each weight once, so time falls with the bytes; a prefill multiplies blocks unpacked to
    bfloat16. Row by row in place: the peak is the model and one packed weight. What is not quantized is named in the
    report. `save_pretrained` writes the weights that the codes stand for, dense, as stock loads them.
    """

    scheme: Scheme
    group_size: int | None = None  # input features per scale of int4: 32, 64, 128; None: 64, or 32 if 64 does not fit
    skip: tuple[str, ...] = ()  # names of modules, or shell patterns over them, that stay as they are
    backend: Literal["auto", "compiled", "torch"] = "auto"
    originals: Literal["keep", "discard"] | None = None  # None: discard, but keep in `with patched(...)`

    name = "quantize"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"quantize: unknown scheme {self.scheme!r}; the schemes are {', '.join(SCHEMES)}")
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"quantize: {self.scheme!r} is not in this version, which has int8 and int4")
        if self.group_size is not None and self.scheme == "int8":
            raise ValueError("quantize: int8 has one scale per output channel, so group_size does not apply to it")
        if self.group_size not in (None, *GROUP_SIZES):
            raise ValueError(f"quantize: group_size={self.group_size!r}; allowed: 32, 64, 128")
        if self.backend not in ("auto", "compiled", "torch"):
            raise ValueError(f"quantize: unknown backend {self.backend!r}; allowed: 'auto', 'compiled', 'torch'")
        if self.originals not in (None, "keep", "discard"):
            raise ValueError(f"quantize: originals={self.originals!r}; allowed: 'keep', 'discard'")
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise TypeError(f"quantize: skip={self.skip!r} is not a tuple of names")
        object.__setattr__(self, "skip", tuple(self.skip))

    def inspect(self, view: View) -> Step | Skip:
        targets, skipped = self._choose(view)
        if not targets:
            reasons = sorted({reason for _, reason in skipped}) or ["it has no nn.Linear"]
            raise UnsupportedModel(f"{view.subject} has no weight that {self.scheme} can hold: {'; '.join(reasons)}")
        _refuse_unsuitable(targets)
        before = view.weight_bytes()
        replaced = sum(_weight(target).numel() * _weight(target).element_size() for target in targets)
        after = before - replaced + sum(target.packed_bytes for target in targets)
        facts: dict[str, Any] = {"exact": False, "bytes_before": before, "bytes_after": after, "scheme": self.scheme}
        sizes = sorted({target.group_size for target in targets} - {0})
        facts |= {"group_size": sizes[0] if len(sizes) == 1 else sizes} if sizes else {}
        facts |= {"backend": str(self._backend()), "weights": len(targets), "originals": self.originals or "discard"}
        facts["skipped"] = [{"name": name, "reason": reason} for name, reason in skipped]
        return Step(self, facts, (view.model, *sorted(targets, key=lambda target: target.packed_bytes)))

    def apply(self, step: Step, journal: Journal) -> None:
        """Smallest weight first, each freed before the next: the largest packed weight meets the smallest model."""
        model: PreTrainedModel = step.work[0]
        targets: Sequence[Target] = step.work[1:]
        total = sum(target.shape[0] * target.shape[1] for target in targets)
        quiet = total < PROGRESS_WEIGHTS
        with logging.tqdm(
            total=total, desc=f"quantize to {self.scheme}", unit="w", unit_scale=True, disable=quiet
        ) as bar:
            for target in targets:
                self._replace(target, journal)
                bar.update(target.shape[0] * target.shape[1])
        journal.bind_method(model, "save_pretrained", _save_dense)

    def modules(self, view: View) -> set[nn.Module]:
        """The modules whose weights would be quantized."""
        return {module for target in self._choose(view)[0] for _, module in target.modules}

    def _replace(self, target: Target, journal: Journal) -> None:
        weight, block = _weight(target).detach(), int4_block() or 64
        if self.scheme == "int8":
            qweight, scales = quantize_int8(weight)
        else:
            qweight, scales = pack_int4(weight, target.group_size, block, HEAD_REFINEMENTS if target.head else None)
        scales, like = scales.view(torch.int16), weight.new_empty(0)
        for name, module in target.modules:
            journal.remove_parameter(module, "weight", keep=self.originals == "keep", label=f"{name}.weight")
            journal.set_buffer(module, "qweight", qweight)
            journal.set_buffer(module, "scales", scales)
            journal.set_buffer(module, "like", like, persistent=False)
            for key, value in (("weight_shape", target.shape), ("block", block), ("backend", self._backend())):
                journal.set_attribute(module, key, value)
            journal.change_class(module, quantized_class(module, self.scheme))

    def _choose(self, view: View) -> tuple[list[Target], list[tuple[str, str]]]:
        """The weights to quantize, and the names of the modules left alone with the reason."""
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        shared: dict[int, list[str]] = {}
        for name, module in view.model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and key == "weight" and isinstance(module, nn.Linear | nn.Embedding):
                    owners.setdefault(id(parameter), []).append((name, module))
                elif parameter is not None:
                    shared.setdefault(id(parameter), []).append(f"{name}.{key}")
        inside = {id(module) for _, module in view.named_modules()}
        head = view.model.get_output_embeddings()
        targets, skipped = [], []
        for key, modules in owners.items():
            linear = [pair for pair in modules if isinstance(pair[1], nn.Linear)]
            if not linear or not all(id(module) in inside for _, module in modules):
                continue
            is_head = any(module is head for _, module in modules)
            reason, group_size = self._refuse(modules, shared.get(key, []), is_head)
            if reason:
                skipped += [(name, reason) for name, _ in linear]
            else:
                N, K = cast(Tensor, modules[0][1]._parameters["weight"]).shape
                targets.append(Target(tuple(modules), (N, K), group_size, is_head))
        return targets, skipped

    def _refuse(self, modules: list[tuple[str, nn.Module]], shared: list[str], is_head: bool) -> tuple[str, int]:
        """Why this weight stays as it is ("" if it does not), and its group size."""
        for name, module in modules:
            if any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in self.skip):
                return "asked for by skip", 0
            if any(part in name for part in ADAPTERS):
                return "an adapter that is being trained", 0
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
                return f"{type(module).__name__} may use its weight in its own way", 0
            if isinstance(module, nn.Embedding) and module.max_norm is not None:
                return "its embedding renormalizes rows", 0
        if shared:
            return f"shared with {shared[0]}", 0
        weight = modules[0][1]._parameters["weight"]
        assert weight is not None
        if not weight.is_floating_point():
            return f"its weight is {weight.dtype} already", 0
        if self.scheme == "int8":
            return "", 0
        K = weight.shape[1]
        fitting = [size for size in GROUP_SIZES if K % size == 0]
        if self.group_size is not None and self.group_size not in fitting:
            raise ValueError(
                f"quantize: group_size={self.group_size} does not divide the {K} input features of {modules[0][0]}; "
                f"sizes that do: {', '.join(map(str, sorted(fitting))) or 'none'}"
            )
        if is_head and self.group_size is None:
            fitting = [size for size in fitting if size == HEAD_GROUP_SIZE]
        return ("", self.group_size or fitting[0]) if fitting else (f"{K} input features are no multiple of 32", 0)

    def _backend(self) -> Backend:
        if self.backend == "compiled" and (reason := cpu.why_not(int4_block())):
            raise HfAccelError(f"quantize: the compiled kernels cannot be made here: {reason}", "use backend='auto'")
        choose = backend_int8 if self.scheme == "int8" else backend_int4
        return choose(self.backend != "torch")


def _weight(target: Target) -> nn.Parameter:
    weight = target.modules[0][1]._parameters["weight"]
    assert weight is not None
    return weight


def _refuse_unsuitable(targets: list[Target]) -> None:
    """Raise UnsupportedModel for weights on another device, and for those that hold NaN or infinity."""
    for target in targets:
        name, weight = target.modules[0][0], _weight(target)
        if weight.is_meta:
            continue  # a plan from a configuration alone
        if weight.device.type != "cpu":
            raise UnsupportedModel(f"{name}.weight is on {weight.device}; this version quantizes on the CPU only")
        if not all(torch.isfinite(weight.detach()[rows].float().sum()) for rows in row_blocks(weight, 1)):
            raise UnsupportedModel(
                f"{name}.weight holds NaN or infinity, so no scale fits it", "check the checkpoint, or skip this module"
            )


def _dense_items(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict with a dense weight for every quantized one; tied weights stay one tensor."""
    dense: dict[int, Tensor] = {}
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
    for key, tensor in model.state_dict().items():
        prefix, _, leaf = key.rpartition(".")
        module = quantized.get(prefix)
        if module is None or leaf not in ("qweight", "scales"):
            yield key, tensor
        elif leaf == "qweight":
            codes = id(module.qweight)
            if codes not in dense:
                dense[codes] = module.dequantize(module.like.dtype)
            yield f"{prefix}.weight", dense[codes]


def _save_dense(self: PreTrainedModel, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
    """`save_pretrained` with the weights that the codes stand for, so that stock transformers can load them."""
    state_dict = dict(_dense_items(self)) if state_dict is None else state_dict
    type(self).save_pretrained(self, *args, state_dict=state_dict, **kwargs)
