"""The layers of a cache whose older tokens lie in the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_accel_patch.passes.quantized_layers import QuantizedLayer

HOST = "cpu"


class OffloadedLayer(QuantizedLayer):
    """The latest tokens where the model is; older ones in the host's memory, pinned, in blocks of 16, 8 or 4 bits. They
    come to the model 1024 tokens at a time, for every new token, and leave again. No gradients reach them."""

    def offload(self) -> None:
        """What can be is there already."""

    def prefetch(self) -> None:
        """Blocks come when they are read."""

    def _placed(self, packed: Tensor) -> Tensor:
        if packed.device.type == HOST:
            return packed
        pinned = torch.empty(packed.shape, dtype=packed.dtype, device=HOST, pin_memory=True)
        return pinned.copy_(packed)  # at once: what is copied to other memory first comes at half the speed


OFFLOADED: dict[type, type] = {DynamicLayer: OffloadedLayer}
