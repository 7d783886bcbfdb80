"""Loading and saving quantized models through `from_pretrained` and `save_pretrained`.

A checkpoint is standard safetensors with the codes under the names of the weights, in other shapes, and their scales
under NAME_scales. `quantization_config` in config.json names every quantized module, so that reading one does not
depend on how this version would choose.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.packing import BLOCKS
from hf_accel_patch.ops.quantize import TABLES
from hf_accel_patch.passes.grouped import shrink
from hf_accel_patch.passes.quantize import SCHEMES, Quantize
from hf_accel_patch.passes.saving import METHOD, described, make_savable
from hf_accel_patch.reading import Found, OnTheFly, Prepared, Take, recording

VERSION = 1  # of the format of checkpoints
STOCK = ("hf_quantizer", "is_quantized", "quantization_method")  # what loading leaves on a model
STOCK_OF_CONFIG = ("quantization_config", "_is_quantized")
NOT_FOREIGN = (
    "quantizes onto our kernels; for the modules of bitsandbytes, from_pretrained with "
    "quantization_config=BitsAndBytesConfig(...), or patch a loaded model"
)


class HfAccelConfig(QuantizationConfigMixin):
    """Has `from_pretrained` quantize weight by weight while it reads, so that the float model never exists whole.

    `scheme`, `group_size`, `skip` and `backend` are those of `Quantize`, but for the backend "bitsandbytes". The others
    describe, in its config.json, a checkpoint that `save_pretrained` has written.

    Raises ValueError or TypeError for impossible ones, and for what describes a checkpoint of another version.

    >>> config = HfAccelConfig("int4", group_size=64, skip=("lm_head",))
    >>> model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    """

    def __init__(
        self,
        scheme: str = "int4",
        group_size: int | None = None,
        skip: tuple[str, ...] = (),
        backend: str = "auto",
        *,
        version: int = VERSION,
        kv_heads: int | None = None,
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
        if block not in (0, *BLOCKS):
            raise ValueError(f"quantization_config: block={block!r}; allowed: {', '.join(map(str, BLOCKS))}")
        if not _by_size(weights or {}) or not _names(ordered or []):
            raise ValueError(
                "quantization_config: weights should be lists of names by group size, ordered one of names"
            )
        self.quant_method: Any = METHOD
        self.version, self.scheme, self.group_size, self.backend = version, scheme, group_size, backend
        self.skip = tuple(skip) if isinstance(skip, Iterable) and not isinstance(skip, str) else skip
        self.block = block  # rows in a block of 4-bit codes
        if kv_heads is not None and (not isinstance(kv_heads, int) or kv_heads < 1):
            raise ValueError(f"quantization_config: kv_heads={kv_heads!r} is not a number of key/value heads")
        self.kv_heads = kv_heads  # of a checkpoint of a model whose class knows no key/value heads of its own
        self.weights = weights  # modules of a checkpoint by group size; a list of names where they are tied
        self.ordered = ordered or []  # of those whose columns are sorted
        if self.quantize().foreign:
            raise ValueError(f"HfAccelConfig {NOT_FOREIGN}")

    @property
    def only_grouped(self) -> bool:
        """Whether weights are floats, and only the number of key/value heads is other than the class knows."""
        return self.kv_heads is not None and not self.weights

    def quantize(self) -> Quantize:
        """The pass with these options."""
        scheme: Any = self.scheme if self.scheme in SCHEMES else "nf4"
        backend: Any = self.backend
        return Quantize(scheme, self.group_size, self.skip, backend, originals="discard")

    def take_options(self, other: HfAccelConfig) -> None:
        """The options of another configuration, beside what a checkpoint is."""
        self.group_size, self.skip, self.backend = other.group_size, other.skip, other.backend

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: all but what is None, 0 or an empty list."""
        described = {"quant_method": METHOD, "version": self.version, "scheme": self.scheme}
        described |= {"group_size": self.group_size, "skip": list(self.skip), "backend": self.backend}
        described |= {"block": self.block, "weights": self.weights, "ordered": self.ordered}
        described |= {"kv_heads": self.kv_heads}
        if self.only_grouped:
            described = {key: described[key] for key in ("quant_method", "version", "kv_heads")}
        return {key: copy.deepcopy(value) for key, value in described.items() if value not in (None, 0, [])}


def _names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def _by_size(found: Any) -> bool:
    """Whether these are lists of names, or of lists of names that are tied, by numbers."""
    if not isinstance(found, dict) or not all(str(size).isdecimal() for size in found):
        return False
    lists = found.values()
    return all(isinstance(each, list) for each in lists) and all(
        isinstance(entry, str) or (_names(entry) and entry) for each in lists for entry in each
    )


class HfAccelQuantizer(HfQuantizer):
    """The hooks of transformers' loading. It holds a state only while a model is being loaded."""

    quantization_config: HfAccelConfig
    given: dict[str, Tensor] | None = None  # a state dict to be saved in place of the model's
    _work: Prepared | OnTheFly | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized and not config.weights and config.kv_heads is None:
            raise HfAccelError("the checkpoint's quantization_config names no quantized weights")
        if not self.pre_quantized and config.scheme not in SCHEMES:
            raise ValueError(f"{config.scheme} is only read; the schemes are {', '.join(SCHEMES)}")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = [str(file) for file in kwargs.get("checkpoint_files") or []]
        for file in files:
            if not file.endswith(".safetensors"):
                raise HfAccelError(f"{file} is no safetensors file; pickled checkpoints are not read")
        kept = recording.get()
        journal = kept.journal if kept else Journal()
        config = self.quantization_config
        options = config.quantize()
        if config.kv_heads is not None:
            shrink(model, config.kv_heads, journal)
        if self.pre_quantized:
            found = Found(config.scheme, config.block, config.weights or {}, config.ordered)
            self._work = Prepared(model, options, found, journal)
            self._work.compare(files)
        else:
            self._work = OnTheFly(model, options, journal, kept, files)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._work is not None and param_name in self._work.names  # an adapter is read when all is done

    def get_quantize_ops(self) -> ConversionOps:
        assert isinstance(self._work, OnTheFly)
        return Take(self._work)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        try:
            places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
            if "disk" in places or ("cpu" in places and len(places) > 1):
                raise HfAccelError("quantized weights cannot be offloaded to the cpu or to disk", "change device_map")
            assert self._work is not None
            self._work.finish(model)
        finally:
            self._work = None
        kept, asked = recording.get(), self.quantization_config
        self.quantization_config = HfAccelConfig(**described(model))
        self.quantization_config.take_options(asked)
        model.config.quantization_config = self.quantization_config
        journal = kept.journal if kept else Journal()
        make_savable(model, journal)
        for place, keys in ((model, STOCK), (model.config, STOCK_OF_CONFIG)):
            for key in [key for key in keys if key in vars(place)]:
                value = vars(place).pop(key)
                if not asked.only_grouped:  # where nothing is quantized, nothing should say so
                    journal.set_attribute(place, key, value)  # so that undo takes it off too
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


def register() -> None:
    """Make transformers know the format."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = HfAccelConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = HfAccelQuantizer
