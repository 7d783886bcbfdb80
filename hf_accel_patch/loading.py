"""Loading and saving quantized models through `from_pretrained` and `save_pretrained`.

A checkpoint is standard safetensors with the codes under the names of the weights, in other shapes, and their scales
under NAME_scales. `quantization_config` in config.json names every quantized module, so that reading one does not
depend on how this version would choose.
"""

from __future__ import annotations

import copy
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_accel_patch.errors import HfAccelError, UnsupportedModel
from hf_accel_patch.families import bind
from hf_accel_patch.families.weights import Weight, linear_weights
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.linear import INT8, block_on, pack_codes, unpack_codes
from hf_accel_patch.ops.modules import QuantizedModule, as_floats
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.passes.quantize import SCHEMES, Quantize, refuse_unsuitable
from hf_accel_patch.passes.saving import METHOD, described, make_savable
from hf_accel_patch.passes.targets import GROUP_SIZES, Target

VERSION = 1  # of the format of checkpoints
STORED = {torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
STOCK = ("hf_quantizer", "is_quantized", "quantization_method")  # what loading leaves on a model
STOCK_OF_CONFIG = ("quantization_config", "_is_quantized")
IN_FLIGHT = 2  # weights that have been read and wait to be quantized, beside the one that is


class HfAccelConfig(QuantizationConfigMixin):
    """`from_pretrained(path, quantization_config=HfAccelConfig("int4"))` quantizes weight by weight while it reads, so
    that the float model never exists whole. The options are those of `Quantize`.

    Raises ValueError or TypeError for impossible ones, and for what describes a checkpoint of another version.
    """

    def __init__(
        self,
        scheme: str = "int4",
        group_size: int | None = None,
        skip: tuple[str, ...] = (),
        backend: str = "auto",
        *,
        version: int = VERSION,
        block: int = 0,
        weights: dict[str, list[Any]] | None = None,
        ordered: list[str] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if version != VERSION or unknown:
            found = f"unknown entries {', '.join(unknown)}" if unknown else f"version {version!r}"
            raise ValueError(f"quantization_config has {found}; this package reads version {VERSION} of the format")
        if scheme not in (*SCHEMES, *TABLES):
            raise ValueError(f"quantization_config: unknown scheme {scheme!r}; the schemes are {', '.join(SCHEMES)}")
        if block not in (0, 32, 64):
            raise ValueError(f"quantization_config: block={block!r}; allowed: 32, 64")
        if not all(str(size).isdigit() and isinstance(names, list) for size, names in (weights or {}).items()):
            raise ValueError("quantization_config: weights should be lists of names by group size")
        self.quant_method: Any = METHOD
        self.version, self.scheme, self.group_size, self.skip, self.backend = version, scheme, group_size, skip, backend
        self.skip = tuple(skip) if not isinstance(skip, str) else skip
        self.block = block  # rows in a block of 4-bit codes
        self.weights = (
            weights  # names of the modules of a checkpoint by group size; a list of names where they are tied
        )
        self.ordered = ordered or []  # of those whose columns are sorted
        self.quantize()

    def quantize(self) -> Quantize:
        """The pass with these options."""
        scheme: Any = self.scheme if self.scheme in SCHEMES else "nf4"
        backend: Any = self.backend
        return Quantize(scheme, self.group_size, self.skip, backend, originals="discard")

    def take_options(self, other: HfAccelConfig) -> None:
        """The options of another configuration, beside what a checkpoint is."""
        self.group_size, self.skip, self.backend = other.group_size, other.skip, other.backend

    def to_dict(self) -> dict[str, Any]:
        described = {"quant_method": METHOD, "version": self.version, "scheme": self.scheme}
        described |= {"group_size": self.group_size, "skip": list(self.skip), "backend": self.backend}
        described |= {"block": self.block, "weights": self.weights, "ordered": self.ordered}
        return {key: copy.deepcopy(value) for key, value in described.items() if value not in (None, 0, [])}


@dataclass
class Recording:
    """What `load` wants to know of the quantization that runs inside `from_pretrained`."""

    journal: Journal = field(default_factory=Journal)
    facts: dict[str, Any] = field(default_factory=dict)


recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


class HfAccelQuantizer(HfQuantizer):
    """The hooks of transformers' loading. It holds a state only while a model is being loaded."""

    quantization_config: HfAccelConfig
    given: dict[str, Tensor] | None = None  # a state dict to be saved in place of the model's

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.pre_quantized and not self.quantization_config.weights:
            raise HfAccelError("the checkpoint's quantization_config names no quantized weights")
        if not self.pre_quantized and self.quantization_config.scheme not in SCHEMES:
            raise ValueError(f"{self.quantization_config.scheme} is only read; the schemes are {', '.join(SCHEMES)}")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = [str(file) for file in kwargs.get("checkpoint_files") or []]
        for file in files:
            if not file.endswith(".safetensors"):
                raise HfAccelError(f"{file} is no safetensors file; pickled checkpoints are not read")
        kept = recording.get()
        journal = kept.journal if kept else Journal()
        options = self.quantization_config.quantize()
        self._work: _Prepared | _OnTheFly
        if self.pre_quantized:
            self._work = _Prepared(model, self.quantization_config, journal)
            self._work.compare(files)
        else:
            self._work = _OnTheFly(model, options, journal, kept)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._work.names

    def get_quantize_ops(self) -> ConversionOps:
        assert isinstance(self._work, _OnTheFly)
        return _Take(self._work)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        try:
            places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
            if "disk" in places or ("cpu" in places and len(places) > 1):
                raise HfAccelError("quantized weights cannot be offloaded to the cpu or to disk", "change device_map")
            self._work.finish(model)
        finally:
            del self._work
        kept, asked = recording.get(), self.quantization_config
        self.quantization_config = HfAccelConfig(**described(model))
        self.quantization_config.take_options(asked)
        model.config.quantization_config = self.quantization_config
        journal = kept.journal if kept else Journal()
        make_savable(model, journal)
        for place, keys in ((model, STOCK), (model.config, STOCK_OF_CONFIG)):  # what undo has to take off too
            for key in [key for key in keys if key in vars(place)]:
                value = vars(place).pop(key)
                journal.set_attribute(place, key, value)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        names = [name for group in (self.quantization_config.weights or {}).values() for name in group]
        tied = tuple(f"{other}.weight" for name in names if isinstance(name, list) for other in name[1:])
        state = self.given or model.state_dict()
        return {key: value for key, value in state.items() if not key.startswith(tied or ("\0",))}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on it are

    @property
    def is_compileable(self) -> bool:
        return True


class _Take(ConversionOps):
    """Takes a weight that has been read, and hands transformers nothing to set."""

    def __init__(self, work: _OnTheFly) -> None:
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


class _OnTheFly:
    """Weights of a float checkpoint, quantized by another thread while the next are read."""

    def __init__(self, model: PreTrainedModel, options: Quantize, journal: Journal, kept: Recording | None) -> None:
        self.options, self.journal, self.kept = options, journal, kept
        view = bind(model)
        self.before = view.weight_bytes()
        targets, self.skipped = options.choose(view)
        if not targets:
            reasons = sorted({reason for _, reason in self.skipped}) or ["it has no linear layer"]
            raise UnsupportedModel(f"{view.subject} has no weight that {options.scheme} can hold: {'; '.join(reasons)}")
        self.names: dict[str, tuple[Target, Weight]] = {}
        self.packed: dict[str, Future[tuple[Tensor, Tensor]]] = {}
        for target in targets:
            if len(target.modules) == 1:  # a tied table is quantized when it has been tied
                prefix = target.modules[0][0]
                self.names |= {f"{prefix}.{weight.name}": (target, weight) for weight in target.weights}
        self.thread = ThreadPoolExecutor(1)
        self.free = threading.Semaphore(IN_FLIGHT)

    def take(self, name: str, value: Tensor) -> None:
        target, weight = self.names[name]
        parameter: Any = target.modules[0][1]._parameters[weight.name]
        parameter._is_hf_initialized = True
        self.free.acquire()

        def run(value: Tensor) -> tuple[Tensor, Tensor]:
            try:
                found, wanted = tuple(value.shape), tuple(parameter.shape)
                if found != wanted:  # raised from `finish`: transformers would hide it here
                    raise HfAccelError(f"{name} is {found} in the checkpoint where {wanted} belongs")
                refuse_unsuitable(name, value)
                return self.options.pack(target, weight, value)
            finally:
                self.free.release()

        self.packed[name] = self.thread.submit(torch.no_grad()(run), value)

    def finish(self, model: PreTrainedModel) -> None:
        targets = list({id(target): target for target, _ in self.names.values()}.values())
        try:
            for target in targets:
                names = [f"{target.modules[0][0]}.{weight.name}" for weight in target.weights]
                if all(name in self.packed for name in names):
                    self.options.install(target, [self.packed.pop(name).result() for name in names], self.journal)
        finally:
            self.thread.shutdown(cancel_futures=True)
        view = bind(model)
        left, _ = self.options.choose(view)
        for target in left:
            for weight, parameter in zip(target.weights, target.parameters(), strict=True):
                refuse_unsuitable(f"{target.modules[0][0]}.{weight.name}", parameter.detach())
            with torch.no_grad():
                self.options.install(target, self.options.packed(target), self.journal)
        if self.kept is not None:
            self.kept.facts = self.options.facts([*targets, *left], self.skipped)
            self.kept.facts |= {"bytes_before": self.before, "bytes_after": view.weight_bytes()}


class _Prepared:
    """Modules of a quantized checkpoint: made ready for its tensors, and checked when these have been read."""

    def __init__(self, model: PreTrainedModel, config: HfAccelConfig, journal: Journal) -> None:
        self.config, self.journal = config, journal
        self.names: dict[str, Tensor] = {}  # of tensors, with what is expected
        self.tied: list[tuple[QuantizedModule, list[nn.Module]]] = []
        options = config.quantize()
        for size, names in (config.weights or {}).items():
            for entry in names:
                first, *others = [entry] if isinstance(entry, str) else entry
                self._prepare(model, options, first, others, int(size))

    def _prepare(self, model: PreTrainedModel, options: Quantize, name: str, others: list[str], size: int) -> None:
        try:
            module, tied = model.get_submodule(name), [model.get_submodule(other) for other in others]
        except AttributeError:
            raise HfAccelError(f"the checkpoint has quantized weights of {name}, which this model lacks") from None
        found = linear_weights(tied[0] if isinstance(module, nn.Embedding) and tied else module)
        if isinstance(module, nn.Embedding) and not tied:  # saved after its ties were cut
            N, K = module.weight.shape
            found = "embedding", (Weight("weight", (N, K)),)
        if isinstance(found, str):
            raise HfAccelError(f"the checkpoint has quantized weights of {name}: {found or 'it is no linear layer'}")
        role, weights = found
        allowed = GROUP_SIZES if self.config.scheme not in INT8 else (0,)
        if size not in allowed or any(weight.shape[1] % max(size, 1) for weight in weights):
            raise HfAccelError(f"the checkpoint has groups of {size} for {name}, which do not fit")
        target = Target(((name, module),), role, weights, size, False, 0)
        packed = [_empty(weight, self.config.scheme, size, self.config.block or 64) for weight in weights]
        options.install(target, packed, self.journal, self.config.scheme)
        if not isinstance(module, nn.Embedding):  # some have a scale that initialization sets
            self.journal.set_attribute(module, "_is_hf_initialized", True)
        keys = [key for weight in weights for key in (weight.name, f"{weight.name}_scales")]
        if name in self.config.ordered:
            order = torch.empty(weights[0].shape[1], dtype=torch.int64, device="meta")
            self.journal.set_buffer(module, "weight_order", order)
            keys.append("weight_order")
        buffers: dict[str, Any] = module._buffers
        self.names |= {f"{name}.{key}": buffers[key] for key in keys}
        for other, each in zip(others, tied, strict=True):
            self.journal.remove_parameter(each, "weight", keep=False, label=f"{other}.weight")
            self.journal.set_attribute(each, "_is_hf_initialized", True)
            model.all_tied_weights_keys.pop(f"{other}.weight", None)
        if tied:
            assert isinstance(module, QuantizedModule)
            self.tied.append((module, tied))

    def compare(self, files: list[str]) -> None:
        """Before anything is read, the headers of the files with what belongs there."""
        if not files:
            return
        found: dict[str, tuple[str, list[int]]] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    found[name] = part.get_dtype(), part.get_shape()
        for name, expected in self.names.items():
            wanted = STORED[expected.dtype], list(expected.shape)
            if name not in found:
                raise HfAccelError(f"{name} is not in the checkpoint", "it is not whole; fetch or save it again")
            if found[name] != wanted:
                raise HfAccelError(f"{name} is {found[name]} in the checkpoint where {wanted} belongs")

    def finish(self, model: PreTrainedModel) -> None:
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
        options = self.config.quantize()
        for module in [each for each in model.modules() if isinstance(each, QuantizedModule)]:
            _reblock(module, block_on(module.like.device))
        for module, others in self.tied:
            for other in others:
                options.share(module, other, self.journal)


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


def _reblock(module: QuantizedModule, block: int) -> None:
    """Lay 4-bit codes out for the kernels of this device."""
    for name, spec in module.specs.items():
        codes, scales, _ = module.held(name)
        if spec.scheme in INT8 or codes.shape[-1] * 2 == block:
            continue
        N, dim = -(-spec.shape[0] // block) * block, 1 if codes.ndim == 3 else 2

        def sized(x: Tensor, at: int, N: int = N) -> Tensor:
            short = x.new_zeros(*x.shape[:at], max(0, N - x.shape[at]), *x.shape[at + 1 :])
            return torch.cat((x.narrow(at, 0, min(N, x.shape[at])), short), at)

        parts = [pack_codes(sized(unpack_codes(each), 0), block) for each in ([codes] if dim == 1 else codes)]
        module._buffers[name] = parts[0] if dim == 1 else torch.stack(parts)
        module._buffers[f"{name}_scales"] = sized(scales, dim)


def register() -> None:
    """Make transformers know the format."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = HfAccelConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = HfAccelQuantizer
