"""What a checkpoint of a quantized model says of itself, and `save_pretrained` for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.ops.linear import INT8
from hf_accel_patch.ops.modules import QuantizedModule

METHOD = __name__.partition(".")[0]  # the value of `quant_method`, under which transformers finds our quantizer


def described(model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` of this model: every quantized module, by group size, tied ones together."""
    by_size: dict[str, list[list[str]]] = {}
    by_codes: dict[int, list[str]] = {}
    schemes, blocks, ordered = set(), {0}, []
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        codes, scales, spec = module.held(next(iter(module.specs)))
        schemes.add(spec.scheme)
        ordered += [name] if "weight_order" in module._buffers else []
        if id(codes) in by_codes:
            by_codes[id(codes)].append(name)
            continue
        size = 0
        if spec.scheme not in INT8:
            size = spec.shape[1] // scales.shape[0 if codes.ndim == 3 else 1]
            blocks.add(codes.shape[-1] * 2)
        by_codes[id(codes)] = [name]
        by_size.setdefault(str(size), []).append(by_codes[id(codes)])
    if len(schemes) != 1 or len(blocks) > 2:
        raise HfAccelError(f"a checkpoint holds one scheme in one layout, and this model {sorted(schemes)}, {blocks}")
    weights = {size: [each[0] if len(each) == 1 else each for each in names] for size, names in by_size.items()}
    found = {"quant_method": METHOD, "scheme": schemes.pop(), "block": max(blocks)}
    return found | {"weights": weights, "ordered": ordered}


@contextmanager
def as_quantized(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `save_pretrained` finds a quantizer and a configuration on the model."""
    quantizer = AutoHfQuantizer.from_config(described(model))
    places = (vars(model), "hf_quantizer"), (vars(model.config), "quantization_config")
    before = [(place, key, place[key]) for place, key in places if key in place]
    vars(model)["hf_quantizer"], model.config.quantization_config = quantizer, quantizer.quantization_config
    try:
        yield
    finally:
        for place, key in places:
            place.pop(key, None)
        for place, key, value in before:
            place[key] = value


def save_quantized(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` with the codes and a `quantization_config` that says how to read them."""
    if getattr(self, "_hf_peft_config_loaded", False):  # saves the adapter alone
        type(self).save_pretrained(self, save_directory, *args, **kwargs)
        return
    with as_quantized(self):  # the original format may cut experts apart, which codes cannot be
        type(self).save_pretrained(self, save_directory, *args, **kwargs | {"save_original_format": False})
