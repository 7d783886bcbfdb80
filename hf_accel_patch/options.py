"""The keywords of `patch`, as passes in the order in which they are applied."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from hf_accel_patch.environment import FALSE, TRUE
from hf_accel_patch.passes import (
    GQA,
    Attention,
    Context,
    Frequencies,
    KVCache,
    Later,
    Linear,
    Prefill,
    Quantize,
    SelfExtend,
    Speculative,
    Unscaled,
)
from hf_accel_patch.passes.scaling import ALLOWED, RopeScaling
from hf_accel_patch.plan import Pass, size_in_bytes
from hf_accel_patch.planning.budget import Budget, Candidate

KEYWORDS = ("gqa", "rope", "quantize", "linear", "attention", "cache", "speculative", "context", "budget", "batch")
NUMBERS = ("gqa", "context", "batch")  # what takes whole numbers
LADDER = (  # schemes of weights and cache, from the least lossy on
    (None, None),
    (None, "int8"),
    ("int8", None),
    ("int8", "int8"),
    (None, "int4"),
    ("int8", "int4"),
    ("int4", None),
    ("int4", "int8"),
    ("int4", "int4"),
)
PLAIN = "switched off: the room that it keeps for more tokens does not fit into the budget"
CACHES = "True, False, 'int8', 'int4', 'sinks:WINDOW' with a number of tokens, or a KVCache"


def parse(keywords: dict[str, Any], *, keep_originals: bool = False) -> tuple[Pass, ...]:
    """The passes that these keywords of `patch` ask for.

    With `budget=` they come after a `Budget`, which holds what may be chosen instead of them.

    Raises TypeError for an unknown keyword and ValueError for an impossible value. `keep_originals`: whatever the
    passes replace must come back.
    """
    for name in keywords:
        if name not in KEYWORDS:
            raise TypeError(f"patch() has no keyword {name!r}; its keywords are {', '.join(KEYWORDS)}")
    passes, batch = _passes(keywords, keep_originals), count("batch", keywords.get("batch"))
    if keywords.get("budget") is None:
        if batch is not None:
            raise ValueError(f"batch={batch} is the number of sequences that a budget is for; give budget= too")
        return passes
    limit = _limit(keywords["budget"])
    return Budget(
        limit, keywords.get("context"), batch or 1, _candidates(keywords, keep_originals), keep_originals
    ), *passes


def _passes(keywords: dict[str, Any], keep_originals: bool) -> tuple[Pass, ...]:
    quantize = _quantize(keywords.get("quantize"), keep_originals)
    return (
        _gqa(keywords.get("gqa"), keep_originals),
        *_positions(keywords),
        quantize,
        _linear(keywords.get("linear", True), quantize),
        *_attention(keywords.get("attention", True), quantize),
        _cache(keywords.get("cache", True)),
        _speculative(keywords.get("speculative")),
    )


def from_text(keyword: str, text: str) -> Any:
    """The value of a keyword that a command line or an environment variable spells: what is true or false, as
    transformers reads its own variables; whole numbers where the keyword takes them; else the text itself.

    Raises ValueError for a text that is no number where only one will do.
    """
    text = text.strip()
    if text.upper() in TRUE and keyword != "budget":
        return 1 if keyword in NUMBERS and text == "1" else True
    if text.upper() in FALSE:
        return False
    if keyword not in NUMBERS:
        return text
    if not text.isdecimal():
        raise ValueError(f"{keyword}={text!r}; allowed: a whole number")
    return int(text)


def count(keyword: str, value: Any) -> int | None:
    """A number of tokens or sequences, or None. Raises ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        what = {"context": "tokens", "batch": "sequences"}[keyword]
        raise ValueError(f"{keyword}={value!r}; allowed: a number of {what}, at least 1, or None")
    return value


def context_of(passes: tuple[Pass, ...]) -> int | None:
    """What `context` was, for these passes."""
    return next((each.tokens for each in passes if isinstance(each, Context)), None)


def _limit(value: Any) -> int:
    allowed = "allowed: a number of bytes, or a text such as '6GiB', '500MiB' or '2GB'"
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"budget={value!r}; {allowed}")
    try:
        return size_in_bytes(value)
    except ValueError:
        raise ValueError(f"budget={value!r}; {allowed}") from None


def _candidates(keywords: dict[str, Any], keep_originals: bool) -> tuple[Candidate, ...]:
    """What a budget may choose from: the schemes of weights and cache that the user has not fixed. After each exact
    cache comes stock's, which is as exact, slower, and keeps no room for more tokens."""
    fixed = {name: keywords.get(name) is not None for name in ("quantize", "cache")}
    found = []
    for scheme, kind in LADDER:
        if (scheme and (fixed["quantize"] or keep_originals)) or (kind and fixed["cache"]):
            continue
        changed = {"quantize": scheme, "cache": kind}
        try:
            passes = _passes(keywords | {name: value for name, value in changed.items() if value}, keep_originals)
        except ValueError:  # a scaling of positions that no quantized cache can follow
            continue
        exact, label = not (scheme or kind), _label(scheme, kind)
        found.append(Candidate(label, exact, passes))
        if kind is None and not fixed["cache"]:
            plain = tuple(Later("cache", PLAIN) if each.name == "cache" else each for each in passes)
            found.append(Candidate(f"{label} with stock's cache", exact, plain))
    return tuple(found)


def _label(scheme: str | None, kind: str | None) -> str:
    if scheme is None:
        return f"cache in {kind}" if kind else "exact"
    if kind is None:
        return f"weights in {scheme}"
    return f"weights and cache in {scheme}" if scheme == kind else f"weights in {scheme}, cache in {kind}"


def _gqa(value: Any, keep_originals: bool) -> Pass:
    if value is None or value is False:
        return Later("gqa", "not asked for: key/value heads stay as they are")
    chosen = GQA(value) if isinstance(value, int) and value is not True else value
    if not isinstance(chosen, GQA):
        raise ValueError(f"gqa={value!r}; allowed: a number of key/value heads, a GQA, or None")
    if keep_originals and chosen.originals == "discard":
        raise ValueError("patched() takes the patch off after its body, so it cannot discard the originals")
    return chosen


def _positions(keywords: dict[str, Any]) -> tuple[Pass, ...]:
    attention, tokens = keywords.get("attention", True), count("context", keywords.get("context"))
    rope = _rope(keywords.get("rope"), keywords.get("cache", True), attention)
    if rope.scaling is not None:
        return (rope if tokens is None else Context(tokens, rope, attention is not False),)
    assert isinstance(rope, Frequencies)
    if tokens is None:
        return Later("rope", "not asked for: positions are those that it was trained on"), rope
    scaled = Context(tokens, rope, attention is not False)
    return scaled, Unscaled(scaled, rope)


def _rope(value: Any, cache: Any, attention: Any) -> Frequencies | SelfExtend:
    """Where keys are packed or moved in the cache, they cannot follow frequencies that change."""
    scaling = RopeScaling.parse(value) if isinstance(value, str) else None if value is False else value
    if not isinstance(scaling, RopeScaling | None):
        raise ValueError(f"rope={value!r}; allowed: {ALLOWED}")
    chosen = _cache(cache)
    kind = chosen.kind if isinstance(chosen, KVCache) and chosen.kind != "exact" else ""
    if kind and scaling is not None and scaling.varies:
        hint = " or fix its length: RopeScaling('dynamic', factor, length=TOKENS)" if scaling.type == "dynamic" else ""
        raise ValueError(
            f"rope={scaling.type!r} with cache={kind!r}: cached keys would have to be rotated anew as the text grows, "
            f"and these cannot be; take the exact cache{hint}"
        )
    if scaling is None or scaling.type != "self-extend":
        return Frequencies(scaling, kind)
    if kind:
        raise ValueError(
            f"rope='self-extend' with cache={kind!r}: cached keys are rotated to their groups, and these cannot be; "
            "take the exact cache, or 'yarn'"
        )
    if attention is False:
        raise ValueError("rope='self-extend' with attention=False: it is an attention of its own")
    return SelfExtend(scaling)


def _quantize(value: Any, keep_originals: bool) -> Pass:
    if value in (None, False):
        return Later("quantize", "not asked for: weights keep their precision")
    chosen = Quantize(cast(Any, value)) if isinstance(value, str) else value
    if not isinstance(chosen, Quantize):
        raise ValueError(f"quantize={value!r}; allowed: a scheme such as 'int4', a Quantize, or None")
    if keep_originals and chosen.originals == "discard":
        raise ValueError("patched() takes the patch off after its body, so it cannot discard the originals")
    return dataclasses.replace(chosen, originals="keep" if keep_originals else chosen.originals or "discard")


def _linear(value: Any, quantize: Pass) -> Pass:
    if value is False:
        return Later("linear", "switched off: linear=False")
    if value not in (True, None):
        raise ValueError(f"linear={value!r}; allowed: True, False")
    return Linear(quantize if isinstance(quantize, Quantize) else None)


def _attention(value: Any, quantize: Pass) -> tuple[Pass, ...]:
    if value is False:
        off = "switched off: attention=False"
        return Later("attention", off), Later("prefill", off)
    chosen = Attention() if value in (True, None) else value
    if not isinstance(chosen, Attention):
        raise ValueError(f"attention={value!r}; allowed: True, False, or an Attention")
    return chosen, Prefill(quantize if isinstance(quantize, Quantize) else None)


def _cache(value: Any) -> Pass:
    if value is False:
        return Later("cache", "switched off: cache=False")
    chosen = KVCache() if value in (True, None) else value
    if isinstance(chosen, str):
        kind, _, window = chosen.partition(":")
        if (kind == "sinks") != window.isdecimal() or (window and kind != "sinks"):
            raise ValueError(f"cache={value!r}; allowed: {CACHES}")
        chosen = KVCache(cast(Any, kind), window=int(window) if window else None)
    if not isinstance(chosen, KVCache):
        raise ValueError(f"cache={value!r}; allowed: {CACHES}")
    return chosen


def _speculative(value: Any) -> Pass:
    if value in (None, False):
        return Later("speculative", "not asked for: a pass of the model for every token")
    chosen = Speculative(cast(Any, value)) if isinstance(value, str) else value
    if not isinstance(chosen, Speculative):
        raise ValueError(f"speculative={value!r}; allowed: 'ngram', 'self', a Speculative, or None")
    return chosen
