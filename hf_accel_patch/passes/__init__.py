"""One feature, one file: its options are a frozen dataclass that inspects a model and applies itself."""

from hf_accel_patch.passes.attention import Attention
from hf_accel_patch.passes.cache import KVCache
from hf_accel_patch.passes.context import Context, Unscaled
from hf_accel_patch.passes.gqa import GQA
from hf_accel_patch.passes.later import Later
from hf_accel_patch.passes.linear import Linear
from hf_accel_patch.passes.prefill import Prefill
from hf_accel_patch.passes.prefixes import PrefixCache
from hf_accel_patch.passes.quantize import Quantize
from hf_accel_patch.passes.rope import Frequencies
from hf_accel_patch.passes.scaling import RopeScaling
from hf_accel_patch.passes.self_extend import SelfExtend
from hf_accel_patch.passes.speculative import Speculative

__all__ = [
    "GQA",
    "Attention",
    "Context",
    "Frequencies",
    "KVCache",
    "Later",
    "Linear",
    "Prefill",
    "PrefixCache",
    "Quantize",
    "RopeScaling",
    "SelfExtend",
    "Speculative",
    "Unscaled",
]
