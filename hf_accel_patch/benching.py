"""Speed and memory of the stock and of the patched model, timed in turn."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_accel_patch import patch, plan, report
from hf_accel_patch.comparison import Comparison
from hf_accel_patch.display import in_words
from hf_accel_patch.families import context_tokens, weight_bytes
from hf_accel_patch.measure import PeakMemory, spread, timed_in_turn, token_ms
from hf_accel_patch.planning.machine import available_bytes
from hf_accel_patch.progress import stages
from hf_accel_patch.report import Report
from hf_accel_patch.shapes import empty_model, random_model
from hf_accel_patch.texts import held_out_text
from hf_accel_patch.trials import begin, refuse_too_large, warm_up

ROOM = 1.2  # times its weights: a model, and what running it needs
SECONDS = 600.0  # of timing, after which no further round begins


@dataclass(frozen=True)
class Settings:
    """What is timed: `model` is a path or id, `shape` a name in SHAPES."""

    model: str | None = None
    shape: str | None = None
    asked: dict[str, Any] = field(default_factory=dict)  # keywords of `patch`
    prompt: int = 128  # tokens of each row
    tokens: int = 32  # to generate behind it
    batch: int = 1  # rows
    rounds: int = 7
    threads: int | None = None
    dtype: str = "auto"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return str(self.shape or self.model)


@dataclass
class Side:
    """The measured figures of one model. Milliseconds are per token, one for each round."""

    weight_bytes: int
    peak_memory_bytes: int | None  # while generating, above what was in use before the model was loaded
    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Speeds are tokens per second: median, and first and third quartile."""
        speeds = {"prefill_speed": speed(self.prefill_ms), "decode_speed": speed(self.decode_ms)}
        return asdict(self) | speeds


@dataclass(frozen=True)
class BenchResult(Comparison):
    """The measured facts of one run. Prints as a table; `to_dict` is plain data for programs."""

    settings: Settings
    threads: int
    in_turn: bool  # whether both models were in memory, and timed in turn
    stock: Side
    patched: Side
    report: Report = field(repr=False)  # of the patched model

    def to_dict(self) -> dict[str, Any]:
        """The settings, and the figures of both sides: bytes, milliseconds per token, tokens per second."""
        said = asdict(self.settings) | {"threads": self.threads, "in_turn": self.in_turn}
        return said | {
            "stock": self.stock.to_dict(),
            "patched": self.patched.to_dict(),
            "report": self.report.to_dict(),
        }

    @property
    def title(self) -> str:
        s = self.settings
        rows = f"{s.batch} rows of " if s.batch > 1 else ""
        return f"{s.name}, {s.device}, threads: {self.threads}; {rows}{s.prompt} tokens, {s.tokens} generated"

    @property
    def sides(self) -> Sequence[str]:
        return "stock", "patched", "patched / stock"

    @property
    def notes(self) -> Sequence[str]:
        turn = "both models timed in turn" if self.in_turn else "one model after the other: no room for both"
        return (f"tokens per second of all rows: median, and quartiles of {len(self.stock.decode_ms)} rounds; {turn}",)

    def cells(self) -> Sequence[Sequence[str]]:
        stock, patched = self.stock, self.patched
        return (
            _sizes("weights", stock.weight_bytes, patched.weight_bytes),
            _sizes("peak memory, generating", stock.peak_memory_bytes, patched.peak_memory_bytes),
            _speeds("prefill, tokens/s", stock.prefill_ms, patched.prefill_ms),
            _speeds("decode, tokens/s", stock.decode_ms, patched.decode_ms),
        )


def speed(times_ms: Sequence[float]) -> dict[str, float]:
    """Tokens per second of such milliseconds per token: the median, and the first and third quartile."""
    low, _, high = quantiles([1000 / each for each in times_ms], n=4, method="inclusive")
    return {"median": 1000 / median(times_ms), "q1": low, "q3": high}


def run(settings: Settings) -> BenchResult:
    """Time both. Raises before anything is loaded where the options or the model do not fit.

    The stock model is measured and then patched in place, as a user would; then a second stock model is loaded to be
    timed in turn with it, where memory has room for both.
    """
    device = begin(settings.device, settings.threads)
    needed = _check(settings, device)
    torch.manual_seed(0)
    quantize = settings.asked.get("quantize")
    with stages(5) as advance, torch.no_grad():
        advance("warming up")
        warm_up(device, quantize if isinstance(quantize, str) else None)
        memory = PeakMemory(device)
        available = available_bytes(device)
        in_turn = available is None or 2 * needed <= available
        advance("measuring the stock model")
        model = _load(settings, device)
        prompt = _prompt(settings, model)
        stock = _measured(model, memory, prompt, settings)
        if not in_turn:
            _time([stock], [model], prompt, settings)
        advance("patching")
        patch(model, **settings.asked)
        advance("measuring the patched model")
        patched = _measured(model, memory, prompt, settings)
        advance("timing")
        if in_turn:
            twin = _load(settings, device)
            _time([stock, patched], [twin, model], prompt, settings)
        else:
            _time([patched], [model], prompt, settings)
        found = report(model)
    return BenchResult(settings, torch.get_num_threads(), in_turn, stock, patched, found)


def _check(settings: Settings, device: torch.device) -> int:
    """Bytes that the stock model needs. Raises for a model that cannot have a pass or so many tokens, and for what
    memory does not hold."""
    if settings.shape:
        empty = empty_model(settings.shape)
    else:
        config = AutoConfig.from_pretrained(settings.model)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=_dtype(settings, config))
    context = context_tokens(empty.config.get_text_config(decoder=True))
    length = settings.prompt + settings.tokens + 1
    if context is not None and length > context and not {"rope", "context"} & settings.asked.keys():
        raise ValueError(f"--prompt and --tokens are {length} tokens; {settings.name} was made for {context}")
    needed = int(ROOM * weight_bytes(empty))
    plan(empty, **settings.asked)
    refuse_too_large(settings.name, needed, device)
    return needed


def _dtype(settings: Settings, config: Any) -> Any:
    found = getattr(config, "dtype", None) if settings.dtype == "auto" else settings.dtype
    found = getattr(torch, found, found) if isinstance(found, str) else found
    if found is not None and not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {settings.dtype!r} is none of PyTorch's; give bfloat16, float16 or float32")
    return found


def _load(settings: Settings, device: torch.device) -> Any:
    """The stock model."""
    if settings.shape:
        return random_model(settings.shape).to(device)
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype)
    return model.to(device).eval()


def _prompt(settings: Settings, model: Any) -> Tensor:
    """Rows of real text, for drafts depend on it; of random tokens where there is no tokenizer."""
    ids = torch.randint(model.config.get_text_config(decoder=True).vocab_size, (1, settings.batch * settings.prompt))
    if settings.model:
        try:
            read = AutoTokenizer.from_pretrained(settings.model)(held_out_text(), return_tensors="pt", verbose=False)
            ids = read["input_ids"] if read["input_ids"].shape[1] >= ids.shape[1] else ids
        except (OSError, ValueError):
            pass
    return torch.cat(spread(ids, settings.batch, settings.prompt)).to(model.device)


def _measured(model: Any, memory: PeakMemory, prompt: Tensor, settings: Settings) -> Side:
    gc.collect()
    memory.reset()
    token_ms(model, prompt, settings.tokens)
    return Side(weight_bytes(model), memory.read())


def _time(sides: Sequence[Side], models: Sequence[Any], prompt: Tensor, settings: Settings) -> None:
    for side, times in zip(
        sides, timed_in_turn(models, prompt, settings.tokens, settings.rounds, SECONDS), strict=True
    ):
        side.prefill_ms, side.decode_ms = [each[0] for each in times], [each[1] for each in times]


def _sizes(name: str, stock: int | None, patched: int | None) -> tuple[str, str, str, str]:
    if stock is None or patched is None:
        return name, "n/a", "n/a", ""
    return name, in_words(stock), in_words(patched), f"{patched / stock:.3f}" if stock else ""


def _speeds(name: str, stock: Sequence[float], patched: Sequence[float]) -> tuple[str, str, str, str]:
    found = [speed(each) for each in (stock, patched)]
    cells = [f"{each['median']:.1f} ({each['q1']:.1f} to {each['q3']:.1f})" for each in found]
    return name, cells[0], cells[1], f"{found[1]['median'] / found[0]['median']:.2f} x"
