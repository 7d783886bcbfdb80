"""Writes docs/api.md: the public names, as their docstrings and the comments beside their options say it.

    python tests/api_page.py --write

It imports the package and reads its source; no model is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

sys.path.append(str(Path(__file__).parent.parent))  # a checkout that is not installed

import hf_accel_patch
from hf_accel_patch.plan import Plan
from hf_accel_patch.report import Report
from hf_accel_patch.uptraining import Uptrained
from hf_accel_patch.verifying import VerifyResult

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
WIDE = 100  # characters of a signature on one line
HEAD = """# Public names

What `from hf_accel_patch import ...` gives, as the docstrings say it. Written by `python tests/api_page.py --write`.

The examples run in a test. In them `model` is a causal LM that was just loaded from the checkpoint at `path`, in
float32, `ids` are the token ids [1, T] of a prompt, and `texts` is a list of one text. In shapes, B is the texts of a
batch and T their tokens.
"""
SECTIONS = {
    "Functions": ("patch", "unpatch", "patched", "plan", "report", "verify", "load", "uptrain"),
    "Options": ("Attention", "Quantize", "RopeScaling", "GQA", "KVCache", "PrefixCache", "Speculative"),
    "Loading with transformers": ("HfAccelConfig",),
    "Errors": ("HfAccelError", "UnsupportedModel", "AlreadyPatched", "NotReversible"),
}
RETURNED = (Plan, Report, VerifyResult, Uptrained)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    sections = {title: [getattr(hf_accel_patch, name) for name in names] for title, names in SECTIONS.items()}
    for title, things in (sections | {"What functions return": RETURNED}).items():
        parts.append(f"## {title}\n")
        parts += [f"### `{thing.__name__}`\n\n{described(thing)}\n" for thing in things]
    return "\n".join(parts)


def described(thing: Any) -> str:
    """How a function or a class is called, its docstring, and the fields of a class."""
    told = thing in RETURNED or (isinstance(thing, type) and issubclass(thing, Exception))
    parts = [] if told else [f"```text\n{signature(thing)}\n```"]
    parts += marked(inspect.getdoc(thing) or "")
    if thing in RETURNED:
        parts.append(f"`to_dict()`: {inspect.getdoc(thing.to_dict)}")
    if "__dataclass_fields__" in vars(thing):
        parts.append("\n".join(["| field | type | default | |", "|---|---|---|---|", *fields(thing)]))
    return "\n\n".join(parts)


def signature(thing: Any) -> str:
    """A call: without types where the table of fields has them."""
    parameters = inspect.signature(thing).parameters.values()
    listed = "__dataclass_fields__" in vars(thing)
    told, star = [], False
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY and not star:
            told, star = [*told, "*"], True
        name = "**" + each.name if each.kind is each.VAR_KEYWORD else each.name
        type_ = "" if listed or each.annotation is each.empty else f": {each.annotation}"
        default = "" if each.default is each.empty else f" = {each.default!r}" if type_ else f"={each.default!r}"
        told.append(name + type_ + default)
    returned = getattr(thing, "__annotations__", {}).get("return", "")
    end = f") -> {returned}" if returned and thing is not hf_accel_patch.patched else ")"
    line = f"{thing.__name__}({', '.join(told)}{end}"
    return line if len(line) <= WIDE else "\n".join([f"{thing.__name__}(", *(f"    {each}," for each in told), end])


def marked(text: str) -> Iterator[str]:
    """The paragraphs of a docstring; its examples as a session."""
    for paragraph in text.split("\n\n"):
        yield f"```pycon\n{paragraph}\n```" if paragraph.startswith(">>>") else paragraph


def fields(thing: Any) -> Iterator[str]:
    """A row for each field of a dataclass: its type and the comment behind it."""
    source, names = inspect.getsource(thing), vars(sys.modules[thing.__module__])
    for each in dataclasses.fields(thing):
        found = re.search(rf"^    {each.name}: [^#\n]*(?:# (.*))?$", source, re.M)
        values = get_args(names.get(each.type))  # of a Literal that has a name
        type_ = ", ".join(map(repr, values)) if values else str(each.type).replace(" | ", " or ")
        default = "" if each.default is dataclasses.MISSING else f"`{each.default!r}`"
        yield f"| `{each.name}` | `{type_}` | {default} | {(found and found[1]) or ''} |".replace("  ", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE}")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
