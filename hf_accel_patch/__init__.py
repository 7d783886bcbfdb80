"""Makes a loaded Hugging Face causal LM faster and smaller in place, and takes it back bit for bit.

>>> from hf_accel_patch import patch, unpatch, report
>>> model = patch(model)                        # exact passes only
>>> model = patch(model, quantize="int4")       # and weights in 4 bits
>>> print(report(model))

Importing adds entries to transformers' registries, under keys that no unpatched model selects, and changes nothing
else, unless HF_ACCEL_PATCH is set: then models are patched as they are made. Where transformers has not loaded its
models yet, which takes a second, that waits until a name is used, or a quantized checkpoint is read.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hf_accel_patch import registering, starting

if TYPE_CHECKING:
    from hf_accel_patch.api import patch, patched, plan, report, unpatch
    from hf_accel_patch.checkpoints import load
    from hf_accel_patch.errors import AlreadyPatched, HfAccelError, NotReversible, UnsupportedModel
    from hf_accel_patch.loading import HfAccelConfig
    from hf_accel_patch.passes import GQA, Attention, KVCache, PrefixCache, Quantize, RopeScaling, Speculative
    from hf_accel_patch.uptraining import uptrain

__version__ = "0.1.0"
__all__ = [
    "GQA",
    "AlreadyPatched",
    "Attention",
    "HfAccelConfig",
    "HfAccelError",
    "KVCache",
    "NotReversible",
    "PrefixCache",
    "Quantize",
    "RopeScaling",
    "Speculative",
    "UnsupportedModel",
    "load",
    "patch",
    "patched",
    "plan",
    "report",
    "unpatch",
    "uptrain",
]


def _load() -> None:
    """Import everything and register. The names are set here, because two of them are those of modules as well."""
    from hf_accel_patch import api, checkpoints, errors, loading, passes, uptraining
    from hf_accel_patch.passes import attention, self_extend_cache

    homes = (passes, errors, loading, checkpoints, api, uptraining)
    globals().update({name: next(vars(home)[name] for home in homes if name in vars(home)) for name in __all__})
    attention.register()
    self_extend_cache.register()
    loading.register()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


if "transformers.modeling_utils" in sys.modules:
    _load()
else:
    registering.register()
starting.start_at_import()
