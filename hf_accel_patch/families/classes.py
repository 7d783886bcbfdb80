"""What the source and the signature of a class tell: where it takes its attention function from, and what it caches."""

from __future__ import annotations

import inspect
import re
import sys
import threading
from functools import cache
from typing import Any

from hf_accel_patch.compat import CACHE, CACHE_NAMES

# What our attention function understands, by the names under which transformers' own eager functions take it
ATTENTION_ARGUMENTS = frozenset(
    {
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "dropout",
        "scaling",
        "is_causal",
        "softcap",
        "s_aux",
        "sinks",
    }
    | {"position_bias", "sliding_window", "head_mask", "kwargs"}
)

# The source of a class is found by parsing its file, and CPython's parser is not safe in several threads
PARSING = threading.Lock()

# In the source of an attention module: it caches a latent and the rotated part of its keys (DeepSeek-V2)
LATENTS = re.compile(rf", k_(rot|pe) = \w*{CACHE}\.update\(")


@cache
def takes_cache(kind: type) -> bool:
    """Whether the forward of this class takes a cache. What is called `cache` may be something of its own (XLM)."""
    parameters = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    named = [parameters[name] for name in (*CACHE_NAMES, "cache_params") if name in parameters]
    return any(each.name != "cache" or "Cache" in str(each.annotation) for each in named)


@cache
def uses_registry(kind: type) -> bool:
    """Whether the forward of this class takes its attention function from transformers' registry."""
    return "ALL_ATTENTION_FUNCTIONS" in source_of(getattr(kind, "forward", None))


@cache
def branches_on_name(kind: type) -> bool:
    """Whether the file of this class chooses its path by the names of implementations: under a name that it does not
    know, it would hand the attention function something else than it does under "sdpa"."""
    return bool(
        re.search(r'_attn_implementation\s*(==|!=|in)[^\n]*"sdpa"', source_of(sys.modules.get(kind.__module__)))
    )


@cache
def unknown_arguments(kind: type) -> tuple[str, ...]:
    """What the eager function beside this attention class takes and ours does not know."""
    eager = vars(sys.modules.get(kind.__module__, object)).get("eager_attention_forward")
    return tuple(sorted(set(inspect.signature(eager).parameters) - ATTENTION_ARGUMENTS)) if eager else ()


@cache
def caches_latents(kind: type) -> bool:
    """Whether this attention class caches a latent and the rotated part of its keys."""
    return bool(LATENTS.search(source_of(kind)))


@cache
def changes_cached_keys(kind: type) -> bool:
    """Whether this attention class computes something of the keys that the cache returns, before it attends to them."""
    _, _, after = source_of(getattr(kind, "forward", None)).partition(f"{CACHE}.update(")
    return bool(re.search(r"\bkey_states = ", after))


def source_of(thing: Any) -> str:
    """The source of a class, function or module; "" where there is none."""
    try:
        with PARSING:
            return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
