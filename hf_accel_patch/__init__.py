"""Makes a loaded Hugging Face causal LM faster and smaller in place, and takes it back bit for bit.

>>> from hf_accel_patch import patch, unpatch, report
>>> model = patch(model)                        # exact passes only
>>> model = patch(model, quantize="int4")       # and weights in 4 bits
>>> print(report(model))

Importing adds entries to transformers' registries, under keys that no unpatched model selects, and changes nothing
else, unless HF_ACCEL_PATCH is set: then models are patched as they are made. What takes a second to load waits until a
name is used, or a quantized checkpoint is read.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_accel_patch import registering, starting

if TYPE_CHECKING:
    from hf_accel_patch.api import patch, patched, plan, report, unpatch
    from hf_accel_patch.checkpoints import load
    from hf_accel_patch.errors import AlreadyPatched, HfAccelError, NotReversible, UnsupportedModel
    from hf_accel_patch.loading import HfAccelConfig
    from hf_accel_patch.passes import GQA, Attention, KVCache, PrefixCache, Quantize, RopeScaling, Speculative
    from hf_accel_patch.uptraining import uptrain
    from hf_accel_patch.verifying import verify

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
    "verify",
]


class _Package(ModuleType):
    """Some functions share their names with modules, which would take them when they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def _load() -> None:
    """Import everything."""
    from hf_accel_patch import api, checkpoints, errors, loading, passes, uptraining, verifying

    homes = (passes, errors, loading, checkpoints, api, uptraining, verifying)
    globals().update({name: next(vars(home)[name] for home in homes if name in vars(home)) for name in __all__})
    loading.register()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


sys.modules[__name__].__class__ = _Package
registering.register()
starting.start_at_import()
