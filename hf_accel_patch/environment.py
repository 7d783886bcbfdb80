"""The variables: HF_ACCEL_PATCH, and one for every keyword of `patch`. Imports neither torch nor transformers, so that
a bad value is found before those are loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

PREFIX = "HF_ACCEL_"
PATCH = f"{PREFIX}PATCH"
TRUE, FALSE = ("1", "ON", "YES", "TRUE"), ("0", "OFF", "NO", "FALSE")  # in any case, as transformers reads its own
SWITCHES = ("linear", "attention", "cache")  # the keywords that are on where nothing is said
ALLOWED = {  # what each keyword takes beside the words for false: as a pattern, and as one says it
    "gqa": (r"[1-9]\d*", "a number of key/value heads"),
    "rope": (
        r"(linear|dynamic|yarn|llama3|self-extend):[1-9]\d*(\.\d+)?",
        "linear:F, dynamic:F, yarn:F, llama3:F or self-extend:F with a factor of at least 1",
    ),
    "quantize": (r"int8|int4|nf4|llm\.int8", "int8, int4, nf4 or llm.int8"),
    "linear": (r"(?i:1|on|yes|true)", "1"),
    "attention": (r"(?i:1|on|yes|true)", "1"),
    "cache": (
        r"(?i:1|on|yes|true)|exact|int8|int4|sinks:[1-9]\d*",
        "1, int8, int4 or sinks:WINDOW with a number of tokens",
    ),
    "speculative": (r"ngram|self", "ngram or self"),
    "context": (r"[1-9]\d*", "a number of tokens"),
    "batch": (r"[1-9]\d*", "a number of sequences, with HF_ACCEL_BUDGET"),
    "budget": (r"\d+(\.\d+)?\s*([kKmMgG]?[iI]?[bB]?)", "a size such as 6GiB or 500MB, or a number of bytes"),
}
RELATED = {"rope", "attention", "cache", "context", "budget", "batch"}  # two of these may exclude each other


def variable(keyword: str) -> str:
    """'quantize' -> 'HF_ACCEL_QUANTIZE'."""
    return PREFIX + keyword.upper()


def is_on(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether HF_ACCEL_PATCH is true. Raises ValueError for what is neither true nor false."""
    text = environ.get(PATCH, "").strip()
    if text.upper() in TRUE:
        return True
    if text and text.upper() not in FALSE:
        raise ValueError(f"{PATCH}={text!r}; allowed: {', '.join(TRUE)}, or {', '.join(FALSE)}, in any case")
    return False


def given(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The texts of the variables that are set, by keyword. One that is empty counts as not set.

    Raises ValueError for a name that is none of them, and for a value that its keyword cannot have.
    """
    texts = {}
    names = {variable(keyword): keyword for keyword in ALLOWED}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name == PATCH:
            continue
        if name not in names:
            raise ValueError(_unknown(name, [PATCH, *names]))
        keyword, text = names[name], environ[name].strip()
        pattern, words = ALLOWED[keyword]
        if re.fullmatch(pattern, text) or text.upper() in FALSE:
            texts[keyword] = text
        elif text:
            off = "switches it off" if keyword in SWITCHES else "is as if it was not set"
            raise ValueError(f"{name}={text!r}; allowed: {words}; 0 {off}")
    return texts


def asked(texts: Mapping[str, str]) -> dict[str, str]:
    """Those that say something other than what is so without them."""
    return {key: text for key, text in texts.items() if key in SWITCHES or text.upper() not in FALSE}


def may_conflict(texts: Mapping[str, str]) -> bool:
    """Whether values that are allowed one by one have to be looked at by the passes themselves."""
    return len(RELATED & asked(texts).keys()) > 1 or "batch" in texts or texts.get("cache", "")[:5] == "sinks"


def spelled(keywords: Mapping[str, str]) -> str:
    """'HF_ACCEL_ROPE=yarn:4, HF_ACCEL_CACHE=int8'."""
    return ", ".join(f"{variable(keyword)}={text}" for keyword, text in keywords.items())


def _unknown(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{name} is no variable of hf_accel_patch; {hint}Its variables are {', '.join(known)}"
