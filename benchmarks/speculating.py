"""The systems of `benchmarks.speculative`, what they continue, and the process in which one generates.

Peers are transformers' own assisted decoding, on a stock model. Passes are those of the whole model. A stock model's
are counted at its last layer, where a pass that leaves early does not come. A patched model is left without such a
hook, since steps of a hooked model are not replayed: where it speculates it counts itself, else a token takes a pass.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache

from benchmarks.measure import synchronize
from benchmarks.shapes import BUNDLED, build
from hf_accel_patch.passes.choosing import Tally
from hf_accel_patch.texts import held_out_text

LOOKUP = 10  # tokens that transformers' prompt lookup drafts, as its documentation has it
MOST = 8  # tokens that `speculative="self"` drafts at a time
PREFILL = 256  # tokens before a pass whose cost is taken
SURE = 32.0  # the final norm's weight in `hold_in_int4`: of logits as far apart as those of a model that has learned


@dataclass(frozen=True)
class Kind:
    """A way to generate. `patched`: keywords of `patch`, None for a stock model; `given`: those of `generate`."""

    patched: dict[str, Any] | None = None
    given: dict[str, Any] = field(default_factory=dict)


SYSTEMS: dict[str, Kind] = {
    "stock": Kind(),
    "stock-lookup": Kind(given={"prompt_lookup_num_tokens": LOOKUP}),
    "stock-early-exit": Kind(given={"assistant_early_exit": "half of the layers"}),
    "exact": Kind({}),
    "ngram": Kind({"speculative": "ngram"}),
    "self": Kind({"speculative": "self"}),
}


@dataclass(frozen=True)
class Task:
    """What the bundled model goes on with: `prompt` tokens of code that it was not trained on. `tail`: these end with
    the first lines of the code once more, as they are, or with what they define renamed."""

    prompt: int
    tail: str = ""
    temperature: float | None = None


TASKS: dict[str, Task] = {
    "editing": Task(256, "renamed"),
    "continuation": Task(192),
    "summarising": Task(400, "as it is"),
    "unpredictable": Task(192, temperature=3.0),
}
START = re.compile(r"^(?: {4})?(?:async )?(?:def|class) (\w+)", re.MULTILINE)


def prompts(name: str, count: int) -> list[list[int]]:
    """Token ids of so many prompts of a task, all of one length, from definitions spread evenly over the text."""
    task, text, tokenizer = TASKS[name], held_out_text(), AutoTokenizer.from_pretrained(BUNDLED)

    def ids(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    characters = 12 * task.prompt  # more than its tokens can be
    starts = [found for found in START.finditer(text) if found.start() + characters < len(text)]
    made = []
    for number in range(count):
        found = starts[number * len(starts) // count]
        piece = text[found.start() : found.start() + characters]
        first = "".join(piece.splitlines(keepends=True)[:3])
        if task.tail == "renamed":
            first = first.replace(found[1], found[1] + "_new")
        end = ids("\n\n" + first)[: task.prompt // 4] if task.tail else []
        made.append(ids(piece)[: task.prompt - len(end)] + end)
    return made


@dataclass(frozen=True)
class DraftJob:
    """A model and a way to generate. `held`: its weights are such that int4 holds them exactly."""

    system: str
    shape: str
    layers: int | None
    dtype: str
    device: str
    threads: int
    held: bool = False

    def serve(self, pipe: Connection) -> None:
        """Answer messages (name, arguments...) with what the method of this name returns."""
        torch.set_num_threads(self.threads)
        generating = Generating(self)
        pipe.send({})
        while True:
            name, *arguments = pipe.recv()
            pipe.send(getattr(generating, name)(*arguments))


class Generating:
    """The model, in the worker."""

    def __init__(self, job: DraftJob) -> None:
        from hf_accel_patch.families import bind, layer_list

        self.job, self.kind = job, SYSTEMS[job.system]
        self.model = build(job.shape, dtype=job.dtype, device=job.device, layers=job.layers)
        if job.held:
            hold_in_int4(self.model)
        self.given = dict(self.kind.given)
        if "assistant_early_exit" in self.given:
            self.given["assistant_early_exit"] = max(1, self.model.config.num_hidden_layers // 2)
        self.passes = 0
        if self.kind.patched is None:
            layer_list(bind(self.model))[-1].register_forward_pre_hook(self._count)
        self.batches: list[Tensor] = []
        self.tokens, self.temperature = 0, None
        self.copy: Any = None
        self.cache: Any = None
        self.renew()

    def renew(self) -> dict[str, Any]:
        """Forget what the package has learned from earlier tasks."""
        from hf_accel_patch import patch, unpatch

        self.copy = None
        if self.kind.patched is not None:
            unpatch(self.model)
            patch(self.model, **self.kind.patched)
        return {}

    def prepare(
        self, batches: list[list[list[int]]], warm: int, tokens: int, temperature: float | None
    ) -> dict[str, Any]:
        """Take batches of prompts to continue by `tokens` tokens, and continue the first `warm` of them, which no turn
        will. `{"refused": why}` where the system does not do that."""
        self.renew()
        self.tokens, self.temperature = tokens, temperature
        self.batches = [torch.tensor(batch, device=self.job.device) for batch in batches]
        try:
            for number in range(warm):
                self.turn(number)
        except Exception as error:  # transformers raises anything
            return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        facts: dict[str, Any] = {"given": {name: str(value) for name, value in self.given.items()}}
        return facts | ({"held": self._held()} if self.job.held and self.job.system == "self" else {})

    def turn(self, number: int) -> dict[str, Any]:
        """Seconds of one `generate` of this batch, passes of the whole model, the tokens of each prompt, and what was
        drafted and accepted, which only this package tells."""
        ids, before = self.batches[number], self._tally()
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": self.tokens} | self.given
        given["do_sample"] = self.temperature is not None
        if self.temperature is not None:
            given |= {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        self.passes = 0
        torch.manual_seed(number)
        synchronize(self.job.device)
        start = time.perf_counter()
        found = self.model.generate(ids, **given)
        synchronize(self.job.device)
        seconds = time.perf_counter() - start
        new, passes, drafted, accepted = (after - then for after, then in zip(self._tally(), before, strict=True))
        if self.kind.patched is not None:
            self.passes = 1 + passes if passes or new else found.shape[1] - ids.shape[1]  # with the prompt's
        facts = {"seconds": round(seconds, 5), "passes": self.passes, "drafted": drafted, "accepted": accepted}
        return facts | {"tokens": found[:, ids.shape[1] :].tolist()}

    @torch.no_grad()
    def gap(self, ids: list[int], first: int, second: int) -> dict[str, Any]:
        """How far the logits of two tokens after `ids` are from one another."""
        scores = self.model(torch.tensor([ids], device=self.job.device), logits_to_keep=1).logits[0, -1].float()
        return {"gap": abs(scores[first] - scores[second]).item(), "logit": scores.max().item()}

    @torch.no_grad()
    def start_costs(self) -> dict[str, Any]:
        """A cache of random tokens, and for a patched model the copy in 4 bits that `speculative="self"` makes."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, self.model.config.vocab_size, (1, PREFILL + 32), generator=generator)
        self.ids = ids.to(self.job.device)
        self.cache = DynamicCache(config=self.model.config)
        self.model(self.ids[:, :PREFILL], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache.activate_past_recording()
        if self.kind.patched is not None:
            self._make_copy()
        return {"context": PREFILL}

    @torch.no_grad()
    def pass_ms(self, width: int, steps: int) -> dict[str, Any]:
        """Milliseconds of passes over so many tokens, each to the token that was chosen last."""
        return {"ms": [self._timed(self.model, width) for _ in range(steps)]}

    @torch.no_grad()
    def draft_ms(self, steps: int) -> dict[str, Any]:
        """Of a token that the copy drafts on the model's cache."""
        return {"ms": [self._timed(self.copy, 1) for _ in range(steps)]}

    @torch.no_grad()
    def accepted(self, number: int) -> dict[str, Any]:
        """The copy drafts 8 tokens, whether or not it is sure of them, at every token of the model's own greedy
        continuation of a batch of one where `speculative="self"` would let it: where the text does not repeat itself.
        `counts[sure][right]`: drafts of which, from their beginning, so many tokens are what the model says too, and of
        which it would have drafted `sure`. `places`: tokens of the continuation."""
        from hf_accel_patch.ops.ngrams import LONGEST, NGrams
        from hf_accel_patch.passes.drafts import DOUBT, ModelDrafter

        if self.copy is None:
            self._make_copy()
        ids = self.batches[number]
        text = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.tokens + MOST, do_sample=False
        )
        counts = [[0] * (MOST + 1) for _ in range(MOST + 1)]
        cache, read = DynamicCache(config=self.model.config), 0
        for known in range(ids.shape[1] + 1, ids.shape[1] + self.tokens + 1):  # as before a pass over the last token
            earlier = NGrams(text[0, :known].tolist())
            if earlier.draft(earlier.tokens[-LONGEST:], 1)[1] >= ModelDrafter.least:
                continue
            self.model(text[:, read : known - 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            read = known - 1
            cache.activate_past_recording()
            token, drafted, certain = text[:, read:known], [], []
            for _ in range(MOST):
                scores = self.copy(token, past_key_values=cache, use_cache=True).logits[:, -1].float()
                token = scores.argmax(-1, keepdim=True)
                drafted.append(token.item())
                certain.append(torch.softmax(scores, -1).max().item() >= DOUBT)
            sure = next((at + 1 for at in range(MOST) if not certain[at]), MOST)  # the first that is not is drafted too
            cache.crop(read - cache.get_seq_length())
            expected = text[0, known : known + MOST].tolist()
            right = next((at for at in range(MOST) if drafted[at] != expected[at]), MOST)
            counts[sure][right] += 1
        return {"counts": counts, "places": self.tokens}

    def _held(self) -> list[int]:
        """How many weights of the copy in 4 bits are those of the model, bit for bit, and how many it has."""
        from hf_accel_patch.ops.modules import QuantizedLinear

        pairs = zip(self.model.modules(), self._speculating().copy.modules(), strict=True)
        packed = [(ours, theirs) for ours, theirs in pairs if isinstance(theirs, QuantizedLinear)]
        same = [torch.equal(ours.weight, theirs.dequantize(ours.weight.dtype)) for ours, theirs in packed]
        return [sum(same), len(same)]

    def _make_copy(self) -> None:
        from hf_accel_patch.passes.own_copy import own_copy

        self.copy = own_copy(self.model, "int4", ())

    def _timed(self, model: Any, width: int) -> float:
        ids = self.ids[:, PREFILL : PREFILL + width]
        synchronize(self.job.device)
        start = time.perf_counter()
        model(ids, past_key_values=self.cache, use_cache=True).logits.argmax(-1).tolist()
        self.cache.crop(-width)
        return round(1000 * (time.perf_counter() - start), 3)

    def _tally(self) -> tuple[int, int, int, int]:
        """Tokens that speculation gave, its passes beyond the prompts', tokens drafted and accepted."""
        tally = found.tally if (found := self._speculating()) else Tally()
        return tally.tokens, tally.passes, tally.drafted, tally.accepted

    def _speculating(self) -> Any:
        from hf_accel_patch.passes.speculative import Speculating

        return next((each for each in vars(self.model).values() if isinstance(each, Speculating)), None)

    def _count(self, module: nn.Module, arguments: Any) -> None:
        self.passes += 1


@torch.no_grad()
def hold_in_int4(model: Any) -> None:
    """Weights that the format int4 of this package holds exactly, so that a copy in int4 is the same function, up to
    how its kernels round: every group of 64 a multiple of 1/256 with all of -8 and 7, or of -7 and 8, in every half.
    No row is like another, or tokens would be; the final norm makes the model as sure of tokens as trained ones are."""
    device = next(model.parameters()).device
    draw = partial(torch.randint, generator=torch.Generator(device).manual_seed(0), device=device)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            continue
        for part in parameter.view(-1).split(1 << 22):
            codes = draw(-8, 8, (len(part) // 32, 32), dtype=torch.int8)
            lowest = draw(0, 32, (len(codes), 1))
            apart = draw(1, 32, (len(codes), 1))
            codes.scatter_(1, lowest, -8).scatter_(1, (lowest + apart) % 32, 7)
            signs = draw(0, 2, (len(part) // 64, 1), dtype=torch.int8) * 2 - 1
            part.copy_((codes.view(-1, 64) * signs).view(-1).float() / 256)
    norms = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 1]
    norms[-1].fill_(SURE)


def chances(counts: Sequence[Sequence[int]]) -> list[float]:
    """That a drafted token is right if those before it are, by its place in the draft."""
    right = [sum(row[at] for row in counts) for at in range(MOST + 1)]
    reached = [sum(right[at:]) for at in range(MOST + 1)]
    return [after / before if before else 0.0 for before, after in pairwise(reached)]


def expected(counts: Sequence[Sequence[int]], most: int, pass_ms: dict[int, float], draft_ms: float) -> float:
    """Milliseconds per token at drafts of at most `most` tokens that end where the copy is not sure."""
    tokens = spent = 0.0
    for sure, row in enumerate(counts):
        for right, times in enumerate(row):
            width = min(sure, most)
            tokens += times * (1 + min(right, width))
            spent += times * (pass_ms[1 + width] + width * draft_ms)
    return spent / tokens
