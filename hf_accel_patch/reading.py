"""What happens inside `from_pretrained`: weights are quantized as they are read, or codes are read and checked."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from hf_accel_patch.as_stored import headers, read_as_stored, tied_tables
from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.families import bind
from hf_accel_patch.families.rescaling import refuse_rescaling
from hf_accel_patch.families.weights import Weight, linear_weights
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.modules import QuantizedModule, reblock
from hf_accel_patch.ops.packing import INT8, block_on
from hf_accel_patch.ops.products import as_floats
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.passes.quantize import Quantize, refuse_unsuitable
from hf_accel_patch.passes.targets import GROUP_SIZES, Target

STORED = {torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
IN_FLIGHT = 2  # weights that have been read and wait to be quantized, beside the one that is


@dataclass
class Recording:
    """What `load` wants to know of the quantization that runs inside `from_pretrained`."""

    journal: Journal = field(default_factory=Journal)
    facts: dict[str, Any] = field(default_factory=dict)


recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@dataclass(frozen=True)
class Found:
    """What a checkpoint says of its codes: names of modules by group size, a list of names where they are tied."""

    scheme: str
    block: int
    weights: dict[str, list[Any]]
    ordered: list[str]


class Take(ConversionOps):
    """Takes a weight that has been read, and hands transformers nothing to set."""

    def __init__(self, work: OnTheFly) -> None:
        self.work = work

    def convert(self, input_dict: dict[str, Any], missing_keys: set[str] | None = None, **kwargs: Any) -> Any:
        left = {}
        for name, value in input_dict.items():
            if name not in self.work.names:
                left[name] = value
                continue
            self.work.take(name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return left


class OnTheFly:
    """Weights of a float checkpoint, quantized by another thread while the next are read."""

    def __init__(
        self,
        model: PreTrainedModel,
        options: Quantize,
        journal: Journal,
        kept: Recording | None,
        files: Sequence[str] = (),
    ) -> None:
        self.options, self.journal, self.kept = options, journal, kept
        view = bind(model)
        refuse_rescaling(view, f"quantize={options.scheme!r}")
        targets, self.skipped = options.choose(view)
        if not targets:
            raise options.nothing(view, self.skipped)
        self.names: dict[str, tuple[Target, Weight]] = {}
        self.packed: dict[str, Future[tuple[Tensor, Tensor]]] = {}
        tables = tied_tables(view, options, files)
        inside = {module for target, _ in tables for _, module in target.modules}
        for target in targets:
            prefix, module = target.modules[0]
            if len(target.modules) == 1 and module not in inside:
                self.names |= {f"{prefix}.{weight.name}": (target, weight) for weight in target.weights}
        self.names |= {name: (target, target.weights[0]) for target, name in tables if name is not None}
        read_as_stored(model, self.names)
        self.thread = ThreadPoolExecutor(1)
        self.free = threading.Semaphore(IN_FLIGHT)

    def take(self, name: str, value: Tensor) -> None:
        """Hand a weight that has been read to the thread that quantizes; waits where too many are on their way."""
        target, weight = self.names[name]
        parameters: Any = [module._parameters[weight.name] for _, module in target.modules]
        for parameter in parameters:
            parameter._is_hf_initialized = True
        parameter = parameters[0]
        self.free.acquire()

        def run(value: Tensor) -> tuple[Tensor, Tensor]:
            try:
                found, wanted = tuple(value.shape), tuple(parameter.shape)
                if found != wanted:  # raised from `finish`: transformers would hide it here
                    raise HfAccelError(f"{name} is {found} in the checkpoint where {wanted} belongs")
                refuse_unsuitable(name, value)
                if parameter.dtype is not torch.float32 or not value.is_floating_point():
                    value = value.to(parameter.dtype)
                return self.options.pack(target, weight, value)
            finally:
                self.free.release()

        self.packed[name] = self.thread.submit(torch.no_grad()(run), value)

    def _named(self) -> dict[int, list[str]]:
        """By id of a target, the names of its weights in the checkpoint."""
        named: dict[int, list[str]] = {}
        for name, (target, _) in self.names.items():
            named.setdefault(id(target), []).append(name)
        return named

    def _read_targets(self, model: PreTrainedModel) -> list[tuple[list[str], Target]]:
        """What has been read, by names, each with the modules that are tied to it and were not: they get the same
        codes. Raises HfAccelError where a weight was neither read nor is tied to one that was."""
        ties: dict[str, set[str]] = {}
        for pair in model.all_tied_weights_keys.items():
            for name, other in (pair, pair[::-1]):
                ties.setdefault(name, set()).add(other)
        targets, named = {id(target): target for target, _ in self.names.values()}, self._named()
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        missing: list[str] = []
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        for key, target in targets.items():
            names = named[key]
            unread = [name for name in names if name not in self.packed]
            if unread and len(target.modules) > 1:  # a table under another name than it seemed
                continue
            found = {id(self.names[other][0]) for other in ties.get(names[0], ()) if other in self.packed}
            if not unread:
                owners.setdefault(key, [])
            elif len(unread) == len(names) and found:
                owners.setdefault(found.pop(), []).extend(target.modules)
            else:
                missing += [n for n in unread if n not in ties and not any(each.search(n) for each in ignored)]
        if missing:
            raise HfAccelError(f"{_some(missing)} not in the checkpoint", "it is not whole, or of another model")
        whole = {key: replace(targets[key], modules=(*targets[key].modules, *more)) for key, more in owners.items()}
        return [(named[key], target) for key, target in whole.items()]

    def finish(self, model: PreTrainedModel) -> None:
        """Put all that is quantized into the model, and quantize what was not read as it is named, as tied tables.

        Raises HfAccelError for a weight of another shape than the model's, or with values that are not finite, and for
        weights that the checkpoint lacks.
        """
        done: list[Target] = []
        dense = 0  # bytes that the codes stand in for; ties are cut while a model is read, so they are counted now
        try:
            for names, target in self._read_targets(model):
                packed = [self.packed.pop(name).result() for name in names]
                dense += sum(parameter.nbytes for parameter in target.parameters())
                self.options.install(target, packed, self.journal)
                done.append(target)
        finally:
            self.thread.shutdown(cancel_futures=True)
        held = chain(model.named_parameters(), model.named_buffers())
        if empty := [name for name, tensor in held if tensor.is_meta]:
            raise HfAccelError(f"{_some(empty)} without a value: the checkpoint has none")
        view = bind(model)
        left, _ = self.options.choose(view)
        for target in left:
            self.options.check(target)
            dense += sum(parameter.nbytes for parameter in target.parameters())
            with torch.no_grad():
                self.options.install(target, self.options.packed(target), self.journal)
            done.append(target)
        if self.kept is not None:
            after = view.weight_bytes()
            self.kept.facts = self.options.facts(done, self.skipped)
            before = after + dense - sum(target.packed_bytes for target in done)
            self.kept.facts |= {"bytes_before": before, "bytes_after": after}


class Prepared:
    """Modules of a quantized checkpoint: made ready for its tensors, and checked when these have been read."""

    def __init__(self, model: PreTrainedModel, options: Quantize, found: Found, journal: Journal) -> None:
        self.options, self.found, self.journal = options, found, journal
        self.names: dict[str, Tensor] = {}  # of tensors, with what is expected
        self.tied: list[tuple[QuantizedModule, list[nn.Module]]] = []
        for size, names in found.weights.items():
            for entry in names:
                first, *others = [entry] if isinstance(entry, str) else entry
                self._prepare(model, first, others, int(size))

    def _prepare(self, model: PreTrainedModel, name: str, others: list[str], size: int) -> None:
        try:
            module, tied = model.get_submodule(name), [model.get_submodule(other) for other in others]
        except AttributeError:
            raise HfAccelError(f"the checkpoint has quantized weights of {name}, which this model lacks") from None
        linear = next((each for each in tied if not isinstance(each, nn.Embedding)), module)
        found = linear_weights(linear if isinstance(module, nn.Embedding) else module)
        if isinstance(module, nn.Embedding) and isinstance(linear, nn.Embedding):  # saved after its ties were cut
            N, K = module.weight.shape
            found = "embedding", (Weight("weight", (N, K)),)
        if isinstance(found, str):
            raise HfAccelError(f"the checkpoint has quantized weights of {name}: {found or 'it is no linear layer'}")
        role, weights = found
        allowed = GROUP_SIZES if self.found.scheme not in INT8 else (0,)
        if size not in allowed or any(weight.shape[1] % max(size, 1) for weight in weights):
            raise HfAccelError(f"the checkpoint has groups of {size} for {name}, which do not fit")
        target = Target(((name, module),), role, weights, size, False, 0)
        packed = [_empty(weight, self.found.scheme, size, self.found.block or 64) for weight in weights]
        self.options.install(target, packed, self.journal, self.found.scheme)
        if not isinstance(module, nn.Embedding):  # some have a scale that initialization sets
            self.journal.set_attribute(module, "_is_hf_initialized", True)
        keys = [key for weight in weights for key in (weight.name, f"{weight.name}_scales")]
        if name in self.found.ordered:
            order = torch.empty(weights[0].shape[1], dtype=torch.int64, device="meta")
            self.journal.set_buffer(module, "weight_order", order)
            keys.append("weight_order")
        buffers: dict[str, Any] = module._buffers
        self.names |= {f"{name}.{key}": buffers[key] for key in keys}
        if tied and name in self.found.ordered:
            raise HfAccelError(f"the checkpoint has sorted columns for {name}, which is tied: rows cannot be looked up")
        for other, each in zip(others, tied, strict=True):
            self.journal.remove_parameter(each, "weight", keep=False, label=f"{other}.weight")
            self.journal.set_attribute(each, "_is_hf_initialized", True)
            stand_in: Any = torch.empty(0, device="meta")  # for a module around it that would initialize it
            stand_in._is_hf_initialized = True
            self.journal.set_attribute(each, "weight", stand_in)
        for key in (name, *others):  # `finish` ties them
            model.all_tied_weights_keys.pop(f"{key}.weight", None)
        if tied:
            assert isinstance(module, QuantizedModule)
            self.tied.append((module, tied))

    def compare(self, files: list[str]) -> None:
        """Before anything is read, the headers of the files with what belongs there. Raises HfAccelError."""
        if not files:
            return
        found = headers(files)
        for name, expected in self.names.items():
            wanted = STORED[expected.dtype], list(expected.shape)
            if name not in found:
                raise HfAccelError(f"{name} is not in the checkpoint", "it is not whole; fetch or save it again")
            if found[name] != wanted:
                raise HfAccelError(f"{name} is {found[name]} in the checkpoint where {wanted} belongs")

    def finish(self, model: PreTrainedModel) -> None:
        """Check what has been read, lay it out for this machine's kernels, and tie what was tied. Raises HfAccelError
        for tensors that are missing or damaged."""
        for name, expected in self.names.items():
            path, _, key = name.rpartition(".")
            found: Any = model.get_submodule(path)._buffers[key]
            if not getattr(found, "_is_hf_initialized", False) or found.shape != expected.shape:
                raise HfAccelError(f"{name} was not read from the checkpoint as {tuple(expected.shape)}")
            if key == "weight_order":
                whole = torch.equal(found.sort().values, torch.arange(len(found), device=found.device))
            else:
                whole = not key.endswith("_scales") or bool(as_floats(found).isfinite().all())
            if not whole:
                raise HfAccelError(f"{name} holds values that cannot be in the checkpoint", "it has been damaged")
        for module in [each for each in model.modules() if isinstance(each, QuantizedModule)]:
            reblock(module, block_on(module.like.device))
        for module, others in self.tied:
            for other in others:
                self.journal.delete_attribute(other, "weight")
                self.options.share(module, other, self.journal)


def _some(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} weights ({', '.join(names[:3])}...) are"


def _empty(weight: Weight, scheme: str, size: int, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of these shapes, without memory."""
    (N, K), E = weight.shape, (weight.experts,) if weight.experts else ()
    if scheme in INT8:
        codes, scales, kind = (1, *E, N, K), (*E, N), torch.int16
        return torch.empty(codes, dtype=torch.int8, device="meta"), torch.empty(scales, dtype=kind, device="meta")
    blocks = -(-N // block)
    shape = (*E, K // size, blocks * block)
    shape, kind = (shape, torch.int32) if scheme in TABLES else ((*shape, 2), torch.int16)
    codes = (*E, blocks, K, block // 2)
    return torch.empty(codes, dtype=torch.uint8, device="meta"), torch.empty(shape, dtype=kind, device="meta")
