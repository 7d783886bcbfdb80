"""Continuous batching of patched models: on stock's attention where that is the same function, else refused."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.passes.handwritten import EXTENDED_KEY


def init_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Continuous batching accepts only the attention names that it knows: it runs on stock's, and gets ours back when
    its manager stops."""
    ours = self.config._attn_implementation
    if ours == EXTENDED_KEY:
        raise UnsupportedModel(
            "rope='self-extend' cannot do continuous batching (generate_batch), whose attention is another",
            "call generate with a padded batch, or take rope='yarn:F'",
        )
    stock = "sdpa" if self._supports_sdpa else "eager"
    self.set_attn_implementation(stock)
    try:
        manager = type(self).init_continuous_batching(self, *args, **kwargs)
    except BaseException:
        self.set_attn_implementation(ours)
        raise
    manager._original_attn_impl = ours
    return manager


def refuse_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Stock answers, and what it answers is wrong: such attention knows nothing of the paged cache."""
    raise UnsupportedModel(
        f"{type(self).__name__} cannot do continuous batching (generate_batch): its attention is hand-written",
        "call generate with a padded batch",
    )
