"""Where drafts come from: the text, a cheaper copy of the model, another model."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_accel_patch.compat import CACHE, RECORDS_PAST, record_past, returned_cache, take_back
from hf_accel_patch.families import context_tokens
from hf_accel_patch.ops.ngrams import LONGEST, History, NGrams
from hf_accel_patch.ops.pacing import Guess, Pace
from hf_accel_patch.ops.rehearsing import Rehearsal
from hf_accel_patch.passes.choosing import DecodingState, Draft
from hf_accel_patch.passes.replaying import Decoding

FIRST = 8  # tokens that are drafted with the prompt
MODEL_MOST = 8  # tokens that a model drafts at a time
MODEL_KIND, MODEL_PRIOR = 0, 0.8
DOUBT = 0.35  # a model's draft ends with a token of which it is not surer than this
PRIORS = {0: 0.0, 1: 0.3, 2: 0.4, 3: 0.55, 4: 0.7, 6: 0.8, 8: 0.85, 12: 0.9, 16: 0.9}  # by the n-gram's length, from
KINDS = tuple(max(least for least in PRIORS if least <= length) for length in range(LONGEST + 1))


class NGramDrafter:
    """Drafts from the text and from earlier texts."""

    least = 1  # the shortest n-gram that is taken

    def __init__(self, most: int, history: History | None) -> None:
        self.most, self.history = most, history
        self.texts: list[NGrams] = []
        self.rehearsals: list[Rehearsal] = []

    def replay(self, decoding: Decoding) -> None:
        """Nothing runs here that could be replayed."""

    def add(self, tokens: list[list[int]], live: list[bool], pace: Pace) -> None:
        if not self.texts:
            self.texts, self.rehearsals = [NGrams(each) for each in tokens], [Rehearsal() for _ in tokens]
            for text, rehearsal in zip(self.texts, self.rehearsals, strict=True):
                rehearsal.start(*self._look_up(text, self.most))
            return
        for text, rehearsal, new, on in zip(self.texts, self.rehearsals, tokens, live, strict=True):
            if not on:
                text.extend(new)
                continue
            for token in new:
                over = rehearsal.hear(token)
                text.add(token)
                if over:
                    if rehearsal.length:
                        self._learn(rehearsal, pace)
                    rehearsal.start(*self._look_up(text, self.most))

    def first(self, most: int, pace: Pace) -> Draft | None:
        found = [self._draft_of(row, min(most, FIRST)) for row in range(len(self.texts))]
        length = min(length for _, length in found)
        if length < 2:
            return None
        width, least, alone = min(len(tokens) for tokens, _ in found), KINDS[length], len(found) == 1
        kind, prior = _kind(least, len(found)), PRIORS[least]
        if pace.plain is not None:  # more tokens of a prompt cost no less than of a pass, where a model computes much
            width = pace.choose([Guess(kind, prior, width, rehearsed=alone)])
        return Draft([tokens[:width] for tokens, _ in found], kind, prior, alone) if width else None

    def draft(self, most: int, running: list[bool], state: DecodingState, pace: Pace) -> Draft | None:
        found = {row: self._draft_of(row, most) for row, on in enumerate(running) if on}
        length = min(length for _, length in found.values())
        if length < self.least:
            return None
        kind, alone = KINDS[length], len(found) == 1
        trust = min(self.rehearsals[row].trust for row in found)
        shortest = min(len(tokens) for tokens, _ in found.values())
        guess = Guess(_kind(kind, len(found)), PRIORS[kind], shortest, rehearsed=alone, trust=trust if alone else 1.0)
        width = pace.choose([guess])
        if not width:
            return None
        rows = enumerate(self.texts)
        tokens = [found[row][0][:width] if row in found else text.tokens[-1:] * width for row, text in rows]
        return Draft(tokens, guess.kind, guess.prior, alone)

    def finish(self) -> None:
        if self.history is not None:
            for text in self.texts:
                self.history.add(text)

    def of_row(self, row: int, ahead: list[int], most: int) -> tuple[list[int], Guess]:
        tokens, length = self._look_up(self.texts[row], most, ahead) if ahead else self._draft_of(row, most)
        kind, trust = KINDS[length], self.rehearsals[row].trust
        return tokens, Guess(_kind(kind, 1), PRIORS[kind], len(tokens), rehearsed=True, trust=trust)

    def rate(self, row: int) -> float:
        return self.rehearsals[row].rate

    def _learn(self, rehearsal: Rehearsal, pace: Pace) -> None:
        """A draft that was rehearsed has ended."""
        least = KINDS[rehearsal.length]
        kind, prior = _kind(least, 1), PRIORS[least]
        rehearsal.expected(pace.chance(kind, prior).first)
        pace.learn(kind, prior, min(rehearsal.right + 1, len(rehearsal.draft)), rehearsal.right)

    def _draft_of(self, row: int, most: int) -> tuple[list[int], int]:
        """What follows the tokens that were chosen, which may be rehearsed already."""
        rehearsal = self.rehearsals[row]
        if rehearsal.right:
            return self._look_up(self.texts[row], most)
        return rehearsal.draft[:most], rehearsal.length

    def _look_up(self, text: NGrams, most: int, ahead: Sequence[int] = ()) -> tuple[list[int], int]:
        most, end = min(most, self.most), text.tokens[-LONGEST:]
        if ahead:
            end = [*end, *ahead][-LONGEST:]
        found = text.draft(end, most)
        if self.history is not None and found[1] < LONGEST:
            other = self.history.draft(end, most, found[1])
            found = other if other[1] else found
        return found


class ModelDrafter(NGramDrafter):
    """Drafts from the text where it repeats itself, which costs nothing, and else those of a model, where they pay."""

    least = 3

    def __init__(self, most: int, history: History | None, source: ModelSource) -> None:
        super().__init__(most, history)
        self.source = source

    def replay(self, decoding: Decoding) -> None:
        self.source.replay(decoding)

    def draft(self, most: int, running: list[bool], state: DecodingState, pace: Pace) -> Draft | None:
        found = super().draft(most, running, state, pace)
        if found is not None:
            return found
        most = min(most, self.most, MODEL_MOST)
        width = pace.choose([Guess(MODEL_KIND, MODEL_PRIOR, most)], pace.draft_cost)
        if not width:
            return None
        started = time.perf_counter()
        tokens = self.source.propose(width, running, state)
        if tokens is None:
            return None
        drafted = tokens.tolist()  # on a GPU this waits until they are there
        pace.drafted(tokens.shape[1], time.perf_counter() - started)
        return Draft(drafted, MODEL_KIND, MODEL_PRIOR)


class ModelSource:
    """A model that proposes tokens, greedily."""

    def propose(self, width: int, running: list[bool], state: DecodingState) -> Tensor | None:
        """[B, at most width], or None if it cannot read the text."""
        raise NotImplementedError

    def replay(self, decoding: Decoding) -> None:
        """Record and replay steps, if they work on the cache of the model that this decodes."""


class OwnCopy(ModelSource):
    """A copy of the model in 4 bits, or without some layers, that works on the model's own cache; what it has cached is
    dropped before the model verifies."""

    def __init__(self, copy: PreTrainedModel, *, whole: bool = True) -> None:
        self.copy, self.whole = copy, whole
        self.decoding: Decoding | None = None

    def replay(self, decoding: Decoding) -> None:
        if self.whole:  # with all layers, or the others would not have what it writes
            self.decoding = decoding.beside(self.copy)

    def propose(self, width: int, running: list[bool], state: DecodingState) -> Tensor:
        cache = state.model_kwargs[CACHE]
        record_past(cache)
        before = [layer.get_seq_length() for layer in cache.layers]
        try:
            return _greedy(self.copy, state.input_ids, 1, state.model_kwargs, width, running, self.decoding)[0]
        finally:
            for layer, length in zip(cache.layers, before, strict=True):
                take_back(layer, layer.get_seq_length() - length)


class OtherModel(ModelSource):
    """A smaller model with the same tokens, and a cache of its own, which is kept from draft to draft. `vocabulary`: of
    the model for which it drafts, in tokens; None: as large."""

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.known = model.get_input_embeddings().weight.shape[0]
        self.context = context_tokens(model.config.get_text_config(decoder=True))
        self.takes_places = "position_ids" in inspect.signature(model.forward).parameters
        self.cache: DynamicCache | None = None
        self.read: Tensor | None = None  # what the cache holds, [B, T]
        self.places: Tensor | None = None  # where, [B or 1, T]
        self.least = 0  # of how many tokens its windows have all, at least

    def propose(self, width: int, running: list[bool], state: DecodingState) -> Tensor | None:
        device = self.model.get_input_embeddings().weight.device
        ids = state.input_ids.to(device)
        if self.context is not None and ids.shape[1] + width > self.context:
            return None
        if self.model.training:  # dropout draws random numbers, which those of the plain loop would miss
            return None
        if self.vocabulary is not None and self.vocabulary > self.known and int(ids.amax()) >= self.known:
            return None
        mask, places = self._mask_and_places(ids, width, state.model_kwargs)
        known = self._known(ids, places)
        if self.cache is None or self.read is None or known < self.least:
            self.cache, known = DynamicCache(config=self.model.config.get_text_config(decoder=True)), 0
            if self.read is not None:  # a text that has changed may change again
                record_past(self.cache)
        else:
            take_back(self.cache, self.read.shape[1] - known)
        kwargs: dict[str, Any] = {"attention_mask": mask, CACHE: self.cache, "use_cache": True}
        kwargs |= {"position_ids": places} if self.takes_places else {}
        kwargs |= {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        tokens, cache = _greedy(
            self.model, ids, ids.shape[1] - known, kwargs, width, running, vocabulary=self.vocabulary
        )
        self.least = 0
        if cache is not None and any(cache.is_sliding):
            recorded = self.read is not None and cache is self.cache
            self.least = (known if recorded else ids.shape[1]) if RECORDS_PAST else sys.maxsize
        ahead = torch.arange(1, tokens.shape[1], device=ids.device)
        self.read, self.places = torch.cat([ids, tokens[:, :-1]], dim=1), torch.cat([places, places[:, -1:] + ahead], 1)
        self.cache = cache
        return tokens

    def _known(self, ids: Tensor, places: Tensor) -> int:
        """How many of these tokens the cache holds at these places, but for the last, which is read in any case."""
        if self.read is None or self.places is None:
            return 0
        length = min(self.read.shape[1], ids.shape[1] - 1)
        same = (self.read[:, :length] == ids[:, :length]).all(0)
        same &= (self.places[:, :length] == places[:, :length]).all(0)
        return length if bool(same.all()) else int((~same).int().argmax())

    def _mask_and_places(self, ids: Tensor, width: int, given: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        """Of these ids: the model's where they mean the same here, which they do not for a text that goes on behind a
        cache, for positions of images, and beyond the table of this model; else what `generate` makes of the text."""
        mask, places = given.get("attention_mask"), given.get("position_ids")
        mask = None if mask is None or mask.ndim != 2 else mask[:, -ids.shape[1] :].to(ids.device)
        if mask is not None and mask.shape != ids.shape:
            mask = None
        if places is not None and places.ndim == 2 and places.shape[1] == ids.shape[1]:
            first, last = (int(each) for each in places.aminmax())
            if first >= 0 and (self.context is None or last + width <= self.context):
                return mask, places.to(ids.device)
        seen = torch.ones_like(ids) if mask is None else mask.long()
        return mask, (seen.cumsum(-1) - 1).masked_fill(seen == 0, 0)


def _greedy(
    model: PreTrainedModel,
    ids: Tensor,
    new: int,
    kwargs: dict[str, Any],
    width: int,
    running: list[bool],
    decoding: Decoding | None = None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Any]:
    """At most `width` tokens after `ids`, of which the model has read all but the last `new`. It stops where it is not
    sure. `decoding` calls the model; `vocabulary`: how many of its tokens may be drafted, None for all. And the cache,
    which holds all but the last of them; None if they cannot be taken back."""
    drafted: list[Tensor] = []
    live = torch.tensor(running, device=ids.device)
    kwargs, recorded = dict(kwargs), True
    for place in range(width):
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=new, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 1
        outputs = (decoding or model)(**inputs, return_dict=True)
        cache = returned_cache(outputs)  # of Phi-3 a new one, where its frequencies change: windows have dropped some
        recorded = recorded and (place == 0 or cache is kwargs[CACHE])
        record_past(cache)  # what a window drops from here on may be needed again
        logits = outputs.logits[:, -1, :vocabulary].float()
        tokens = logits.argmax(-1)
        drafted.append(tokens)
        if place == width - 1:
            break
        sure = torch.softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]
        if bool((sure[live] < DOUBT).any()):
            break
        ids, new = torch.cat([ids, tokens[:, None]], dim=1), 1
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
    return torch.stack(drafted, dim=1), cache if recorded else None


def _kind(length: int, running: int) -> int:
    """Of several sequences all must be right."""
    return length * 64 + min(running, 63)
