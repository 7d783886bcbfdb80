"""What undo needs beside the journal: where the model is now, and weights that were discarded, read again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_accel_patch.errors import NotReversible
from hf_accel_patch.families import dtype_of
from hf_accel_patch.journal import Gone, Journal
from hf_accel_patch.ops.modules import HasWeight, QuantizedExperts

FAR = 0.5  # of a weight's norm: codes of 4 bits are within 0.2 of what they stand for


@dataclass(frozen=True)
class Sample:
    """Where a parameter was, and in which dtype: tells whether the model has been moved or cast since."""

    module: torch.nn.Module
    name: str
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def of(model: PreTrainedModel) -> Sample | None:
        """None where weights are on several devices, or none is left."""
        if len({tensor.device for tensor in chain(model.parameters(), model.buffers())}) != 1:
            return None
        for module in model.modules():
            for name, held in module._parameters.items():
                if held is not None and held.is_floating_point():
                    return Sample(module, name, held.device, held.dtype)
        return None

    def moved(self) -> tuple[torch.device, torch.dtype] | None:
        """Where it is now, if that is elsewhere."""
        held = self.module._parameters.get(self.name)
        same = held is None or (held.device, held.dtype) == (self.device, self.dtype)
        return None if held is None or same else (held.device, held.dtype)


def read_again(model: PreTrainedModel, journal: Journal, source: dict[str, Any]) -> list[torch.nn.Parameter]:
    """The parameters that are gone, from the model's checkpoint, where the modules are now. Tied ones stay one.

    `source`: keywords with which it was read. Raises NotReversible where it cannot be, and where what is there has
    other shapes, or values that the codes do not stand for.
    """
    path, names = model.name_or_path, journal.discarded
    if not path:
        raise NotReversible("the model does not know the checkpoint that it came from", "load it anew")
    try:
        fresh = type(model).from_pretrained(path, **source | {"dtype": dtype_of(model)})
    except (OSError, ValueError) as error:
        raise NotReversible(f"the checkpoint at {path} cannot be read: {error}") from error
    parameters = dict(fresh.named_parameters(remove_duplicate=False))
    missing = [name for name in names if name not in parameters]
    if missing:
        raise NotReversible(f"the checkpoint at {path} has no {missing[0]}")
    for gone in {each.label: each for each in reversed(journal.gone)}.values():  # a weight as it was at first
        found = parameters[gone.label]
        if gone.shape and tuple(found.shape) != gone.shape:
            raise NotReversible(
                f"{gone.label} was {gone.shape}, and in the checkpoint at {path} it is {tuple(found.shape)}",
                "it was changed after it was read, or the checkpoint is another one; load the model anew",
            )
        if names.count(gone.label) == 1 and _far(gone, found.detach()):
            raise NotReversible(
                f"{gone.label} in the checkpoint at {path} is far from what was quantized",
                "it was changed after it was read, or came from another folder; load the model anew",
            )
    made: dict[int, torch.nn.Parameter] = {}
    here = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), torch.device("cpu"))
    for gone in journal.gone:
        found = parameters[gone.label]
        held = gone.module._buffers.get("like", gone.module._parameters.get(gone.name))
        device = here if held is None or held.is_meta else held.device
        if id(found) not in made:
            made[id(found)] = torch.nn.Parameter(found.detach().to(device), requires_grad=gone.trained)
    return [made[id(parameters[gone.label])] for gone in journal.gone]


@torch.no_grad()
def _far(gone: Gone, found: torch.Tensor) -> bool:
    """Whether a weight that was read is another one than the codes in its place; of experts the first tells."""
    module = gone.module
    if isinstance(module, HasWeight):
        dense = module.dequantize(torch.float32)
    elif isinstance(module, QuantizedExperts):
        dense = module.dequantize_expert(gone.name, 0, torch.float32)
        found = found[0].T if module.is_transposed else found[0]
    else:
        return False
    found = found.to(dense)
    return bool((found - dense).norm() > FAR * torch.maximum(found.norm(), dense.norm()))
