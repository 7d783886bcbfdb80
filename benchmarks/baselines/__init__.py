"""The systems compared: one file each, with the same two functions.

`available(variant, device)` gives the reason why the system cannot run here, or None; `load(model, variant, texts)`
turns a stock model, which it may consume, into something that generates. Peers are imported inside these functions
only, and used as their documentation says: each decides, with its own defaults, what becomes of the head and the
embedding. `texts` are for a system that calibrates; all others quantize without data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor


class Tick(Protocol):
    """What a system calls as it generates: once when the prompt goes in, then at each new token."""

    def put(self, value: Any = None) -> None: ...


@dataclass(frozen=True)
class Loaded:
    """A system that holds the weights and is ready to run.

    `generate(ids, mask, new_tokens, clock)` is greedy; `logits(ids)` of one prompt [1, T] are [T, vocabulary]. `model`:
    the torch model whose tensors are the weights; None if there is none, then `weight_bytes` says how many a token
    reads. `note`: what a reader of the numbers must know.
    """

    generate: Callable[[Tensor, Tensor, int, Tick], None]
    logits: Callable[[Tensor], Tensor]
    model: Any = None
    weight_bytes: int = 0
    note: str = ""


class Baseline(Protocol):
    """A module of this package."""

    distributions: tuple[str, ...]  # whose versions the row names

    def available(self, variant: str, device: str) -> str | None: ...

    def load(self, model: Any, variant: str, texts: Sequence[str]) -> Loaded: ...


SYSTEMS: dict[str, tuple[str, str]] = {  # name: module, variant
    "stock": ("stock", ""),
    "exact": ("ours", "exact"),
    "int8": ("ours", "int8"),
    "int4": ("ours", "int4"),
    "nf4": ("ours", "nf4"),
    "llm.int8": ("ours", "llm.int8"),
    "int4-calibrated": ("ours", "int4-calibrated"),
    "eager": ("ours", "eager"),
    "int8-eager": ("ours", "int8-eager"),
    "int4-eager": ("ours", "int4-eager"),
    "quanto-int8": ("quanto", "int8"),
    "quanto-int4": ("quanto", "int4"),
    "torchao-int8": ("torchao", "int8"),
    "torchao-int4": ("torchao", "int4"),
    "bitsandbytes-int8": ("bitsandbytes", "int8"),
    "bitsandbytes-nf4": ("bitsandbytes", "nf4"),
    "hqq-int4": ("hqq", "int4"),
    "llama.cpp-q8_0": ("llama_cpp", "Q8_0"),
    "llama.cpp-q4_0": ("llama_cpp", "Q4_0"),
    "llama.cpp-q4_k_m": ("llama_cpp", "Q4_K_M"),
}
EAGER = ("eager", "int8-eager", "int4-eager")  # systems that are others on a GPU only, to be asked for by name
FORMATS = {"int4-calibrated": "int4"}  # systems that keep another one's format and run its code: other codes, no more


def find(system: str) -> tuple[Baseline, str]:
    """The module and the variant of a system."""
    module, variant = SYSTEMS[system]
    return import_module(f"{__name__}.{module}"), variant


def hugging_face(model: Any, note: str = "") -> Loaded:
    """A model with transformers' own `generate`."""

    def generate(ids: Tensor, mask: Tensor, new_tokens: int, clock: Tick) -> None:
        model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, streamer=clock)

    def logits(ids: Tensor) -> Tensor:
        scores: Tensor = model(ids, use_cache=False).logits[0]
        return scores

    return Loaded(generate, logits, model, note=note)


def missing(*modules: str) -> str | None:
    """Why these modules cannot be imported, or None. Imports them, so that they do not count as a model's memory."""
    for name in modules:
        try:
            import_module(name)
        except Exception as error:  # a broken installation raises anything
            return f"{type(error).__name__}: {error}"
    return None
