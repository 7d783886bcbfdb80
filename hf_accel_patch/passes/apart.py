"""Speculative decoding in which each sequence of a batch goes on at its own pace.

Drafts are right for some sequences of a batch and wrong for others, so what one pass accepts differs. Here every
sequence keeps what it has: the cache has an entry per token and no gaps, a pass writes each sequence's keys and values
behind its own last entry, and a mask says how far each may look. Tokens are still chosen for all sequences together,
one place after another, exactly as transformers does it (see `Chooser`): a sequence that is ahead keeps the logits that
it has read, and is believed to go on with the likeliest token until the others have come as far.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_accel_patch.compat import CACHE, returned_cache
from hf_accel_patch.ops.pacing import Guess, Pace
from hf_accel_patch.passes.choosing import Chooser, Draft, Drafter, Tally
from hf_accel_patch.passes.feeding import Reading
from hf_accel_patch.passes.handwritten import KEY
from hf_accel_patch.passes.layers import InPlaceLayer
from hf_accel_patch.passes.replaying import Decoding

LEAD = 64  # tokens that a sequence may be ahead of the slowest: as many rows of logits are kept
HORIZON = 48  # tokens to come, by which the sequences are compared: the slowest says when all are done
UNSURE = 4.0  # passes: a sequence that needs so many fewer than the slowest counts exp(-1) of it
KNOWN = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}


@dataclass
class Row:
    """One sequence. `ahead` are tokens that the model has read beyond the chosen ones, `logits` [V] and their `best`
    what it said before each of them and after the last: one more, or none where the last chosen token is unread."""

    length: int  # entries in the cache
    ahead: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    guess: Guess | None = None  # the draft of the current pass
    before: int = 0  # entries without it
    live = True

    def read(self, tokens: list[int], logits: Tensor, best: list[int]) -> None:
        """`tokens` went through the model; the first is the last chosen one where there is nothing ahead."""
        self.ahead += tokens if self.logits else tokens[1:]
        self.logits += logits.unbind(0)
        self.best += best
        self.length += len(tokens)

    def choose(self, token: int) -> None:
        """The next token is this one: if another was read, all from there on is void."""
        if self.ahead and self.ahead[0] == token:
            del self.ahead[0], self.logits[0], self.best[0]
        else:
            self._forget(len(self.ahead))
            self.logits, self.best = [], []

    def settle(self) -> None:
        """Believe what is ahead as far as it is the likeliest, and keep no more of a pass's logits than that."""
        wrong = (place for place, token in enumerate(self.ahead) if token != self.best[place])
        self._forget(len(self.ahead) - next(wrong, len(self.ahead)))
        self.logits = [each.clone() if each.untyped_storage().nbytes() > each.nbytes else each for each in self.logits]

    def fall_back(self, length: int) -> None:
        """Forget all that is ahead; what is left in the cache are so many entries."""
        self.length, self.ahead, self.logits, self.best = length, [], [], []

    def _forget(self, count: int) -> None:
        if count:
            self.length -= count
            del self.ahead[-count:], self.logits[-count:], self.best[-count:]


def why_together(model: PreTrainedModel, chooser: Chooser, cache: Cache, model_kwargs: dict[str, Any]) -> str:
    """Why the sequences of this batch have to go on together."""
    if len(chooser.input_ids) == 1:
        return "there is one"
    if model.config._attn_implementation not in (KEY, "sdpa", "eager"):
        return "its attention may not take a mask of its own for each token"
    if chooser.bounds.lengths:
        return "its positions depend on the length of the text"
    if chooser.before:
        return "its table of positions ends, and they are not those of the tokens that are given"
    if chooser.foreign:
        return "a logits processor of the caller's may compare sequences, those that have ended too"
    if chooser.answers:
        return "scores, logits or the cache are asked for, of all tokens"
    if other := {name for name, value in model_kwargs.items() if value is not None} - KNOWN:
        return f"the model is given {', '.join(sorted(other))}"
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if any(each is not None and each.ndim != 2 for each in (mask, positions)):
        return "the mask or the positions have more than two dimensions"
    if not all(type(layer) is InPlaceLayer and layer.is_initialized for layer in cache.layers):
        return "a layer of the cache cannot be written at several places"
    return ""


def decode_apart(
    model: PreTrainedModel,
    chooser: Chooser,
    outputs: Any,
    model_kwargs: dict[str, Any],
    draft: Draft | None,
    drafter: Drafter,
    pace: Pace,
    tally: Tally,
    decoding: Decoding | None = None,
) -> None:
    """Choose tokens to the end. `outputs`: of the prompt and this draft. The cache is left with gaps behind the shorter
    sequences. While nothing is ahead and nothing is drafted, this is the plain loop."""
    cache, B, T = returned_cache(outputs), *chooser.input_ids.shape
    rows, reading = [Row(T - 1) for _ in range(B)], Reading(model, chooser, cache, model_kwargs, decoding)
    fed = [[0, *(draft.tokens[row] if draft else ())] for row in range(B)]
    for row in rows:
        row.before = row.length
        row.guess = None if draft is None else Guess(draft.kind, draft.prior, len(draft.tokens[0]))
    plain, since = draft is None, 0.0
    try:
        while True:
            if plain:
                chooser.step(outputs.logits[:, -1])
                chosen, width = [chooser.chosen], 1
                for row in rows:
                    row.length += 1
            else:
                width = max(map(len, fed))
                logits = outputs.logits[:, -width:]
                for row, tokens, rated, best in zip(rows, fed, logits, logits.argmax(-1).tolist(), strict=True):
                    if tokens:
                        row.read(tokens, rated, best)
                chosen = _choose(chooser, rows, logits[:, 0])
                for row in rows:
                    row.settle()
                del logits
            del outputs
            now = time.perf_counter()
            _count(tally, pace, rows, len(chosen), width, now - since if since else None, plain=plain)
            since = now
            if chooser.finished:
                return
            for row, live in zip(rows, chooser.live, strict=True):
                row.live = live
            drafter.add([list(each) for each in zip(*chosen, strict=True)], chooser.live, pace)
            fed = _feed(chooser, rows, drafter, pace)
            plain = max(map(len, fed)) == 1 and not any(row.logits for row in rows if row.live)
            outputs = reading([row.length if row.live else None for row in rows], fed, plain=plain)
    finally:
        for layer in cache.layers:
            layer.apart = None


def _choose(chooser: Chooser, rows: list[Row], like: Tensor) -> list[list[int]]:
    """The tokens of all places for which every sequence has logits."""
    chosen: list[list[int]] = []
    while not chooser.finished and all(row.logits for row in rows if row.live):
        chooser.step(torch.stack([row.logits[0] if row.live else each for row, each in zip(rows, like, strict=True)]))
        chosen.append(chooser.chosen)
        for row, token, live in zip(rows, chooser.chosen, chooser.live, strict=True):
            if row.live:
                row.choose(token)
            row.live = live
    return chosen


def _feed(chooser: Chooser, rows: list[Row], drafter: Drafter, pace: Pace) -> list[list[int]]:
    """What each sequence reads next: its last token and a draft, of the same number of tokens for all; nothing where it
    has ended or is far ahead."""
    room, last = chooser.room({}), chooser.chosen
    drafts: list[list[int] | None] = []
    for index, row in enumerate(rows):
        row.guess, row.before, lead = None, row.length, len(row.logits)
        ahead = [*row.ahead, row.best[-1]] if lead else []
        if not row.live or lead >= LEAD or (lead and (lead > room or not chooser.ends.isdisjoint(ahead))):
            drafts.append(None)
            continue
        found: list[int] = []
        if room > lead:
            found, row.guess = drafter.of_row(index, ahead, min(room - lead, LEAD - lead))
        drafts.append([ahead[-1] if lead else last[index], *found])
    guesses = [row.guess for row in rows if row.guess is not None]
    if not any(guess.most for guess in guesses) and not any(row.logits for row in rows):
        return [[token] if row.live else [] for row, token in zip(rows, last, strict=True)]
    rates, horizon = [drafter.rate(index) for index in range(len(rows))], min(room, HORIZON)
    _weigh(rows, rates, horizon)
    width = pace.choose(guesses) if guesses else 0
    if not width:
        if _falls_back(rows, rates, horizon, pace):
            for row in rows:
                row.fall_back(chooser.input_ids.shape[1] - 1)
        waits = [not row.live or bool(row.logits) for row in rows]  # for the others, until all go on together
        return [[] if wait else [token] for wait, token in zip(waits, last, strict=True)]
    return [[] if each is None else (each + each[-1:] * width)[: 1 + width] for each in drafts]


def _weigh(rows: list[Row], rates: list[float], horizon: int) -> None:
    """Say what a token of each draft counts: the batch is done when its slowest sequence is, so those that are likely
    to be that count for all."""
    passes = [(horizon - len(row.logits)) / rate for row, rate in zip(rows, rates, strict=True)]
    slowest = max(some for row, some in zip(rows, passes, strict=True) if row.live)
    for row, some, rate in zip(rows, passes, rates, strict=True):
        if row.guess is not None:
            row.guess.weight = math.exp((some - slowest) / UNSURE) / rate


def _falls_back(rows: list[Row], rates: list[float], horizon: int, pace: Pace) -> bool:
    """Whether what some sequences are ahead is worth less than passes cost in which these are not at the same place."""
    lead, apart = max(len(row.logits) for row in rows), pace.ratios.get(1)
    if not lead or apart is None:
        return False
    live = [(rate, len(row.logits)) for row, rate in zip(rows, rates, strict=True) if row.live]
    saved = _passes([horizon / rate for rate, _ in live]) - _passes([(horizon - ahead) / rate for rate, ahead in live])
    return saved < lead * (apart - 1)


def _passes(needed: list[float]) -> float:
    """About how many passes a batch needs of which the sequences need so many, give or take a few."""
    most = max(needed)
    return most + UNSURE * math.log(sum(math.exp((each - most) / UNSURE) for each in needed))


def _count(
    tally: Tally, pace: Pace, rows: list[Row], new: int, width: int, seconds: float | None, *, plain: bool
) -> None:
    """`seconds`: of the step, None of the prompt's."""
    drafted = accepted = 0
    for row in rows if width > 1 else ():
        if row.guess is not None and row.guess.most:
            tried = min(width - 1, row.guess.most)
            right = min(max(row.length - row.before - 1, 0), tried)
            if not row.guess.rehearsed:
                pace.learn(row.guess.kind, row.guess.prior, tried, right)
            drafted, accepted = drafted + tried, accepted + right
    usual, prompt = 0.0 if plain or pace.plain is None else pace.plain, seconds is None
    tally.count(new, drafted, accepted, usual and (new - prompt) * usual - (seconds or 0.0), prompt=prompt)
    if seconds is not None and plain:
        pace.timed(seconds)
    elif seconds is not None:
        pace.passed(width, new, seconds)
