"""Multi-head latent attention as transformers writes it (DeepSeek-V2, arXiv 2405.04434): a cache of latents, which
`expand_kv` turns into the keys and values of every head. The same names stand in all of its models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from hf_accel_patch.compat import CACHE
from hf_accel_patch.families.classes import source_of

# In the source of a forward: what is cached is expanded after it came from the cache, and then attended to
LATENTS_FROM_CACHE = re.compile(rf"{CACHE}\.update\(.*self\.expand_kv\(.*ALL_ATTENTION_FUNCTIONS", re.DOTALL)
NAMES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class Sizes:
    """Of a cached token: its latent and the rotated part of its keys, one for all heads; of a head: the part of a key
    that is not rotated, and a value."""

    latent: int
    rotated: int
    key: int
    value: int


def latent_sizes(module: nn.Module) -> Sizes | None:
    """The sizes in an attention module that caches latents; None for any other module."""
    sizes = [vars(module).get(name) for name in NAMES]
    if not all(isinstance(size, int) for size in sizes) or "kv_b_proj" not in module._modules:
        return None
    return Sizes(*sizes) if expands_latents(type(module)) else None  # type: ignore[arg-type]


def expanding(module: nn.Module) -> Any:
    """The layer from latents to all heads' keys and values, [H * (key + value), latent]."""
    return module._modules["kv_b_proj"]


@cache
def expands_latents(kind: type) -> bool:
    """Whether the forward of this class caches latents, and expands what comes from the cache."""
    source = source_of(getattr(kind, "forward", None))
    return hasattr(kind, "expand_kv") and bool(LATENTS_FROM_CACHE.search(source))
