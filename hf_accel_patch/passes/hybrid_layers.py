"""The layers of a quantized cache that hold a recurrent state beside keys and values; and which layer becomes which."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_accel_patch.compat import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from hf_accel_patch.passes.quantized_layers import QuantizedLayer, QuantizedSlidingWindowLayer


class _BesideState(DynamicLayer):
    """What both parts of a layer do that holds a recurrent state besides: the stock classes name their parts."""

    restores = False  # a state is not kept for prompts that begin alike

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)
        super().offload()

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)
        super().prefetch()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        super().reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        super().crop(tokens_to_remove)


class QuantizedHybridLayer(_BesideState, QuantizedLayer, LinearAttentionAndFullAttentionLayer):
    """Full attention and a recurrent state in one layer. The state stays as it is."""


class QuantizedHybridSlidingWindowLayer(
    _BesideState, QuantizedSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer
):
    """A sliding window and a recurrent state in one layer."""


QUANTIZED: dict[type, type] = {
    DynamicLayer: QuantizedLayer,
    DynamicSlidingWindowLayer: QuantizedSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer: QuantizedHybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: QuantizedHybridSlidingWindowLayer,
}
