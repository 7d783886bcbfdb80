"""Models that change their weights in place when they run, as RWKV does between training and inference."""

from __future__ import annotations

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View


def refuse_rescaling(view: View, asked: str) -> None:
    """Raise UnsupportedModel for a model that divides weights by powers of two at its first forward: codes stay as
    they are. With `rescale_every` 0 it changes nothing."""
    for _, module in view.named_modules():
        rescales = hasattr(module, "layers_are_rescaled") and hasattr(module, "_rescale_layers")
        if rescales and getattr(view.model.config, "rescale_every", 0) > 0:
            raise UnsupportedModel(
                f"{view.subject} cannot have {asked}: its forward rescales weights in place, which codes cannot follow",
                "set rescale_every=0 in its configuration, which in float16 may overflow",
            )
