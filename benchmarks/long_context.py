"""What is each way to scale rotary positions worth? Perplexity by context, a passkey, and what the cache costs dynamic.

    python -m benchmarks.long_context
    python -m benchmarks.long_context --windows 2 --places 4 --contexts 512 1024     # tries the benchmark itself
    python -m benchmarks.long_context --model path-or-id --contexts 4096 8192 --dtype bfloat16 --device cuda

Perplexity: of the same tokens, the last (trained length - 1) of each window, given contexts of several lengths. The
text is source that the bundled model was not trained on, or --text. Passkey: a number is told once, at several depths
of a long text, and asked for at its end; counted only for models that can do it within the length that they were
trained on. Cache: texts are read to the trained length at once and then token by token; at some places the answer is
compared with that of a forward over all tokens so far. Speed: a prompt of each context, and steps after it, by turns.
Rows of JSON are added to --out.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.decode import RESULTS, record, start
from benchmarks.shapes import BUNDLED
from hf_accel_patch import HfAccelError, RopeScaling, patch
from hf_accel_patch.texts import held_out_text

PARTS = ("perplexity", "passkey", "cache", "speed")
METHODS = ("unscaled", "linear", "dynamic", "dynamic-fixed", "yarn", "llama3", "self-extend")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the text, where the number is told
ABLE = 0.8  # of the numbers within the trained length, below which a model is not asked further
TURNS, STEPS = 5, 16  # of each method, and steps in a turn
Rows = list[dict[str, Any]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(BUNDLED), help="a path or an id (default: the bundled model)")
    parser.add_argument("--text", type=Path, help="a file of text (default: source that the bundled model never saw)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--contexts", nargs="+", type=int, help="tokens (default: 1, 2, 3 and 4 times the trained ones)"
    )
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--windows", type=int, default=32, help="of text (default: 32; fewer say little)")
    parser.add_argument("--keys", type=int, default=4, help="numbers at each depth (default: 4)")
    parser.add_argument("--places", type=int, default=32, help="compared in each text with the cache (default: 32)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "long_context.jsonl")
    return parser.parse_args()


class Subject:
    """A model, its text, and what was asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        text = options.text.read_text(encoding="utf-8") if options.text else held_out_text()
        self.ids = torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        self.trained: int = self.stock().config.get_text_config(decoder=True).max_position_embeddings
        self.contexts = sorted(options.contexts or [times * self.trained for times in (1, 2, 3, 4)])
        if len(self.ids) < 2 * max(self.contexts):
            raise SystemExit(
                f"the text has {len(self.ids)} tokens; a context of {max(self.contexts)} needs a longer --text"
            )

    def stock(self, **changes: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            self.options.model, dtype=getattr(torch, self.options.dtype), **changes
        )
        return model.to(self.options.device).eval()

    def scaled(self, method: str, length: int) -> Any:
        """The patched model, for texts of `length` tokens where a method wants to know."""
        factor = self.options.factor
        if method == "unscaled":
            return patch(self.stock())
        if method == "dynamic-fixed":
            return patch(self.stock(), rope=RopeScaling("dynamic", factor, length=length))
        return patch(self.stock(), rope=f"{method}:{factor}")

    def windows(self, length: int, count: int) -> list[Tensor]:
        """Texts [1, length] that end at the same places for every length."""
        ends = torch.linspace(max(self.contexts), len(self.ids), count).long().tolist()
        return [self.ids[None, end - length : end].to(self.options.device) for end in ends]


@torch.no_grad()
def perplexity(subject: Subject, method: str, context: int) -> dict[str, Any]:
    model, scored = subject.scaled(method, context), min(subject.trained, min(subject.contexts)) - 1
    losses = []
    for window in subject.windows(context, subject.options.windows):
        logits = model(window, use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
        losses.append(cross_entropy(logits.float(), window[0, -scored:]).item())
    return {"perplexity": torch.tensor(losses).mean().exp().item(), "losses": losses, "scored_tokens": scored}


@torch.no_grad()
def passkey(subject: Subject, method: str, context: int) -> dict[str, Any]:
    """Of numbers told somewhere in a text of `context` tokens, how many a greedy answer at its end has right."""
    model, draw, found = subject.scaled(method, context), random.Random(0), []

    def tokens(text: str) -> Tensor:
        return torch.tensor(subject.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    for depth in DEPTHS:
        for _ in range(subject.options.keys):
            key = str(draw.randrange(10000, 100000))
            told, asked = tokens(f"\nThe pass key is {key}. Remember it.\n"), tokens("\nThe pass key is")
            answer = tokens(f"\nThe pass key is {key}")[len(asked) :]
            room = context - len(told) - len(asked) - len(answer)
            first = draw.randrange(len(subject.ids) - room)
            text, cut = subject.ids[first : first + room], int(depth * room)
            whole = torch.cat((text[:cut], told, text[cut:], asked, answer))[None].to(subject.options.device)
            logits = model(whole, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
            found.append(bool((logits.argmax(-1).cpu() == answer).all()))
    return {"passkey": sum(found) / len(found), "numbers": len(found)}


@torch.no_grad()
def cache(subject: Subject) -> Rows:
    """Dynamic NTK token by token, from the trained length to twice as many, in stock and here."""
    trained, options, rows = subject.trained, subject.options, []
    rope = subject.stock().config.rope_parameters | {"rope_type": "dynamic", "factor": options.factor}
    places = torch.linspace(trained, 2 * trained - 2, options.places).long().tolist()
    texts = subject.windows(2 * trained, max(1, options.windows // 8))
    systems: dict[str, Callable[[], Any]] = {
        "stock": lambda: subject.stock(rope_parameters=rope),
        "dynamic": lambda: subject.scaled("dynamic", 2 * trained),
        "dynamic-fixed": lambda: subject.scaled("dynamic-fixed", 2 * trained),
    }
    for name, make in systems.items():
        at_once = subject.scaled("dynamic" if name == "stock" else name, 2 * trained)
        truths = [
            [log_softmax(at_once(text[:, : at + 1], use_cache=False).logits[0, -1].float(), -1) for at in places]
            for text in texts
        ]
        divergences, losses, best = [], [], []
        for text, truth in zip(texts, truths, strict=True):
            model = make()
            past = model(text[:, :trained], use_cache=True, logits_to_keep=1).past_key_values
            for at in range(trained, 2 * trained - 1):
                scores = model(text[:, at : at + 1], past_key_values=past, use_cache=True).logits[0, -1].float()
                losses.append(cross_entropy(scores, text[0, at + 1]).item())
                if at in places:
                    expected = truth[places.index(at)]
                    found = log_softmax(scores, -1)
                    divergences.append(kl_div(found, expected, reduction="sum", log_target=True).item())
                    best.append(bool(found.argmax() == expected.argmax()))
        rows.append(
            {
                "system": name,
                "context": 2 * trained,
                "perplexity": torch.tensor(losses).mean().exp().item(),
                "mean_kl": sum(divergences) / len(divergences),
                "max_kl": max(divergences),
                "top1_agreement": sum(best) / len(best),
            }
        )
    return rows


@torch.no_grad()
def speed(subject: Subject, context: int) -> Rows:
    """Milliseconds of a prompt of `context` tokens and of a step after it: all methods take turns."""
    models: dict[str, Any] = {}
    for method in subject.options.methods:
        try:
            models[method] = subject.scaled(method, context)
        except HfAccelError:
            continue
    text, prompts, caches = subject.windows(context, 1)[0], {name: [] for name in models}, {}
    steps: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(TURNS):
        for name in list(models)[:: -1 if turn % 2 else 1]:
            begin = perf_counter()
            output = models[name](text, use_cache=True, logits_to_keep=1)
            prompts[name].append(1e3 * (perf_counter() - begin))
            caches.setdefault(name, output.past_key_values)
    for turn in range(TURNS):
        for name in list(models)[:: -1 if turn % 2 else 1]:
            for at in range(STEPS):
                begin = perf_counter()
                models[name](text[:, at : at + 1], past_key_values=caches[name], use_cache=True)
                steps[name].append(1e3 * (perf_counter() - begin))
    return [
        {"system": name, "context": context, "prefill_ms": prompts[name], "decode_ms": median(steps[name])}
        for name in models
    ]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    subject, run = Subject(options), start(options.device)
    setting = {
        "model": Path(options.model).name,
        "trained": subject.trained,
        "factor": options.factor,
        "windows": options.windows,
        "dtype": options.dtype,
        "threads": options.threads,
    }

    def save(part: str, rows: Rows) -> None:
        for row in record(run, [{"part": f"long-context-{part}", **setting, **row} for row in rows], options.out):
            shown = {
                key: row[key]
                for key in ("system", "context", "perplexity", "passkey", "mean_kl", "decode_ms", "reason")
                if key in row
            }
            print(part, *(f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in shown.items()))

    measures = {"perplexity": perplexity, "passkey": passkey}
    for part in (part for part in options.parts if part in measures):
        if part == "passkey" and (able := passkey(subject, "unscaled", subject.trained)["passkey"]) < ABLE:
            reason = f"within {subject.trained} tokens it finds {able:.0%} of the numbers"
            save(part, [{"system": "unscaled", "context": subject.trained, "passkey": able, "reason": reason}])
            continue
        for method in options.methods:
            for context in subject.contexts:
                try:
                    row = measures[part](subject, method, context)
                except HfAccelError as error:
                    row = {"reason": str(error).partition("\n")[0]}
                save(part, [{"system": method, "context": context, **row}])
    if "cache" in options.parts:
        save("cache", cache(subject))
    for context in subject.contexts if "speed" in options.parts else ():
        save("speed", speed(subject, context))


if __name__ == "__main__":
    main()
