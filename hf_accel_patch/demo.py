"""The demo: a stock model measured, patched with one call, measured again, and taken back bit for bit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import Pipeline, pipeline

from hf_accel_patch import Quantize, patch, plan, report, unpatch
from hf_accel_patch.families import weight_bytes
from hf_accel_patch.measure import (
    PeakMemory,
    interleaved_ms,
    perplexity,
    spread_windows,
    token_ms,
)
from hf_accel_patch.progress import stages
from hf_accel_patch.report import Report
from hf_accel_patch.shapes import empty_model, random_model
from hf_accel_patch.texts import held_out_text
from hf_accel_patch.trials import BUNDLED, begin, refuse_too_large, warm_up

DTYPE = "bfloat16"
PROMPTS = (
    'import json\n\n\ndef read_settings(path):\n    """Read a JSON file and return its content."""\n    with open(path',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def test_sum_of_empty_list():\n    result = total([])\n    assert",
)
WINDOW_TOKENS, PROMPT_TOKENS, TIMED_TOKENS = 512, 128, 16
ROOM = 1.1  # times the weights of stock and patched, side by side while they are timed: what runs need


@dataclass(frozen=True)
class Settings:
    """What is shown: `model` is a path or id, `shape` a name in SHAPES; with neither, the bundled model."""

    model: str | None = None
    shape: str | None = None
    quantize: str = "int4"
    tokens: int = 48  # to generate per prompt
    windows: int = 16  # of held-out text, WINDOW_TOKENS each
    threads: int | None = None
    device: str = "cpu"

    @property
    def name(self) -> str:
        return self.shape or self.model or BUNDLED.name


@dataclass
class Side:
    """The measured figures of the stock or of the patched model. None: not measured here."""

    weight_bytes: int
    peak_memory_bytes: int | None = None  # while generating, above what was in use before the model was loaded
    prefill_ms: float = 0.0  # per token
    decode_ms: float = 0.0  # per token
    perplexity: float | None = None
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """Everything that a demo found; `report` is the report of the patched model."""

    settings: Settings
    threads: int
    stock: Side
    patched: Side
    patch_seconds: float
    patch_peak_memory_bytes: int | None
    taken_back: bool  # logits other than stock's while patched, and bit-equal to stock's after `unpatch`
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """Plain data for programs."""
        prompts = [] if self.settings.shape else list(PROMPTS)
        said = {"model": self.settings.name, "random_weights": bool(self.settings.shape), "dtype": DTYPE}
        said |= {"quantize": self.settings.quantize, "device": self.settings.device, "threads": self.threads}
        sides = {"prompts": prompts, "stock": asdict(self.stock), "patched": asdict(self.patched)}
        cost = {"patch_seconds": self.patch_seconds, "patch_peak_memory_bytes": self.patch_peak_memory_bytes}
        return said | sides | cost | {"taken_back": self.taken_back, "report": self.report.to_dict()}


def run(settings: Settings) -> Result:
    """Measure, patch, measure, take back. Raises before anything is loaded where the options or the model do not fit.

    The patch discards the float weights, as it does by default, so that the memory measured is what a user gets. What
    is timed in turn with it, and then patched with its originals kept and taken back, is a second stock model.
    """
    Quantize(settings.quantize)  # type: ignore[arg-type]  # raises for what is no scheme
    device = begin(settings.device, settings.threads)
    _check(settings, device)
    torch.manual_seed(0)
    with stages(8 if settings.shape else 9) as advance:
        advance("warming up")
        warm_up(device, settings.quantize)
        memory = PeakMemory(device)

        advance("loading the stock model")
        target = _load(settings, device)
        model = _model(target)
        prompt, windows = _inputs(settings, target)
        advance("measuring the stock model")
        stock = _measure(target, memory, prompt, settings)
        advance("patching")
        memory.reset()
        start = time.perf_counter()
        patch(target, quantize=settings.quantize)
        seconds, patch_peak = time.perf_counter() - start, memory.read()
        advance("measuring the patched model")
        patched = _measure(target, memory, prompt, settings)

        advance("loading a second stock model")
        other = _load(settings, device)
        twin = _model(other)
        advance("timing both in turn")
        times = interleaved_ms((twin, model), prompt, TIMED_TOKENS)
        for side, (prefill, decode) in zip((stock, patched), times, strict=True):
            side.prefill_ms, side.decode_ms = prefill, decode
        if windows:
            advance("measuring perplexity")
            stock.perplexity, patched.perplexity = perplexity(twin, windows), perplexity(model, windows)
        advance("taking the patch off")
        found = report(target)
        del target, model
        gc.collect()
        taken_back = _takes_back(other, prompt, settings.quantize)
    return Result(settings, torch.get_num_threads(), stock, patched, seconds, patch_peak, taken_back, found)


def _check(settings: Settings, device: torch.device) -> None:
    """Raise for a model that cannot have the pass, and for a shape that memory does not hold."""
    if not settings.shape:
        plan(settings.model or str(BUNDLED), quantize=settings.quantize)
        return
    model = empty_model(settings.shape)
    patched = next(row for row in plan(model, quantize=settings.quantize).shown_rows() if row["pass"] == "quantize")
    refuse_too_large(settings.shape, int(ROOM * (weight_bytes(model) + patched["bytes_after"])), device)


def _model(target: Any) -> Any:
    """The model in a pipeline, or the model itself where there is none."""
    return target.model if isinstance(target, Pipeline) else target


def _load(settings: Settings, device: torch.device) -> Any:
    """The stock pipeline; for a shape, a model alone."""
    if settings.shape:
        return random_model(settings.shape).to(device)
    return pipeline("text-generation", model=settings.model or str(BUNDLED), dtype=torch.bfloat16, device=device)


def _inputs(settings: Settings, target: Any) -> tuple[Tensor, list[Tensor]]:
    """The prompt [1, T] for timing, and the windows for perplexity: none for random weights."""
    model = _model(target)
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS
    length = min(PROMPT_TOKENS, limit - TIMED_TOKENS - 1)
    if settings.shape:
        return torch.randint(config.vocab_size, (1, length)).to(model.device), []
    windows = spread_windows(target.tokenizer, held_out_text(), settings.windows, min(WINDOW_TOKENS, limit))
    return windows[0][:, :length].to(model.device), windows


def _measure(target: Any, memory: PeakMemory, prompt: Tensor, settings: Settings) -> Side:
    """Size, memory and texts. Speed and perplexity come after both, for what they leave in the memory allocator."""
    model = _model(target)
    side = Side(weight_bytes(model))
    memory.reset()
    token_ms(model, prompt, TIMED_TOKENS)
    if not settings.shape:
        limits = {"max_new_tokens": settings.tokens, "do_sample": False, "return_full_text": False}
        side.texts = [target(text, **limits)[0]["generated_text"] for text in PROMPTS]
    side.peak_memory_bytes = memory.read()
    return side


@torch.no_grad()
def _takes_back(target: Any, prompt: Tensor, scheme: str) -> bool:
    """Whether patching changes the logits of a stock model, and `unpatch` gives back the very same bits."""
    model = _model(target)
    before = model(prompt).logits
    patch(target, quantize=Quantize(scheme, originals="keep"))  # type: ignore[arg-type]
    during = model(prompt).logits
    unpatch(target)
    after = model(prompt).logits
    return torch.equal(before, after) and not torch.equal(before, during)


def show(result: Result, console: Console | None = None) -> None:
    """Print a result: the texts, the table, the report, and whether the patch came off."""
    console = console or Console(highlight=False)
    settings, stock, patched = result.settings, result.stock, result.patched
    kind = "random weights show speed, not quality" if settings.shape else "real weights"
    console.print(Text(f"{settings.name}, {settings.device}, threads: {result.threads}; {kind}"))
    for prompt, *texts in zip(PROMPTS, stock.texts, patched.texts, strict=False):
        console.print(Text(f"\nprompt\n{prompt}", style="dim"))
        same = texts[0] == texts[1]
        for label, text in zip((f"stock {DTYPE}", f"patched {settings.quantize}"), texts, strict=True):
            console.print(Text(f"\n{label}", style="bold"))
            console.print(Text("the same text" if same and label.startswith("patched") else text.strip("\n")))
    console.print()
    console.print(_table(result))
    if patched.perplexity is not None:
        held_out = "text the model never saw" if settings.model is None else "the model may have seen it"
        console.print(Text(f"perplexity: source of this Python's json and asyncio; {held_out}"))
    spent = f"patched in {result.patch_seconds:.1f} s"
    peak = result.patch_peak_memory_bytes
    console.print(Text(spent + (f", peak memory meanwhile {_megabytes(peak)}" if peak is not None else "")))
    if not settings.shape and not settings.model:
        console.print(Text("this model fits into a processor's cache; for a real size: --shape llama-3.2-1b"))
    console.print()
    print(result.report)
    console.print(Text(f"\ntaken back bit for bit: {'yes' if result.taken_back else 'NO'}", style="bold"))


def _table(result: Result) -> Table:
    stock, patched = result.stock, result.patched
    table = Table("", f"before: stock {DTYPE}", f"after: patched {result.settings.quantize}", "after / before")
    for column in table.columns[1:]:
        column.justify = "right"
    rows: tuple[tuple[str, float | None, float | None, Callable[[float], str]], ...] = (
        ("weights", stock.weight_bytes, patched.weight_bytes, _megabytes),
        ("peak memory, generating", stock.peak_memory_bytes, patched.peak_memory_bytes, _megabytes),
        ("prefill, ms per token", stock.prefill_ms, patched.prefill_ms, "{:.3f}".format),
        ("decode, ms per token", stock.decode_ms, patched.decode_ms, "{:.2f}".format),
        ("perplexity", stock.perplexity, patched.perplexity, "{:.3f}".format),
    )
    for label, before, after, words in rows:
        if before is None or after is None:
            table.add_row(label, "n/a", "n/a", "")
        else:
            table.add_row(label, words(before), words(after), f"{after / before:.3f}" if before else "")
    return table


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
