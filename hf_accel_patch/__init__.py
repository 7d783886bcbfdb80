"""Makes a loaded Hugging Face causal LM faster and smaller in place, and takes it back bit for bit.

>>> from hf_accel_patch import patch, unpatch, report
>>> model = patch(model)                        # exact passes only
>>> model = patch(model, quantize="int4")       # and weights in 4 bits
>>> print(report(model))

Importing adds entries to transformers' registries, under keys that no unpatched model selects, and changes nothing
else.
"""

from hf_accel_patch.api import patch, patched, plan, report, unpatch
from hf_accel_patch.errors import AlreadyPatched, HfAccelError, NotReversible, UnsupportedModel
from hf_accel_patch.passes import Attention, Quantize
from hf_accel_patch.passes.attention import register

__version__ = "0.1.0"
__all__ = [
    "AlreadyPatched",
    "Attention",
    "HfAccelError",
    "NotReversible",
    "Quantize",
    "UnsupportedModel",
    "patch",
    "patched",
    "plan",
    "report",
    "unpatch",
]

register()
