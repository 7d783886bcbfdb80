"""What the loops of speculative decoding share: drafts, the choice of tokens, and the tally."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

from hf_accel_patch.families.one_by_one import Bounds
from hf_accel_patch.ops.pacing import Guess, Pace


@dataclass
class Draft:
    """What may come next: for each sequence the same number of tokens. `kind` and `prior`: how it was found, and how
    often such tokens are right before that is known; `rehearsed`: whether that becomes known without a try."""

    tokens: list[list[int]]
    kind: int = 0
    prior: float = 0.5
    rehearsed: bool = False


class Drafter(Protocol):
    """Where drafts come from, for one call of `generate`."""

    def replay(self, decoding: Any) -> None:
        """Steps of a model may be recorded and replayed as those that this `Decoding` calls."""
        ...

    def add(self, tokens: list[list[int]], live: list[bool], pace: Pace) -> None:
        """These tokens were chosen, for each sequence, of which these go on."""
        ...

    def draft(self, most: int, running: list[bool], state: DecodingState, pace: Pace) -> Draft | None:
        """A draft of as many tokens as pay, at most `most`, for the sequences that are running."""
        ...

    def of_row(self, row: int, ahead: list[int], most: int) -> tuple[list[int], Guess]:
        """From texts alone, for one sequence, with `ahead` behind the tokens that were chosen."""
        ...

    def rate(self, row: int) -> float:
        """Tokens per pass that drafts would have given this sequence lately."""
        ...

    def first(self, most: int, pace: Pace) -> Draft | None:
        """A draft that is verified with the prompt, where one would pay in a pass."""
        ...

    def finish(self) -> None:
        """The text is complete."""
        ...


@dataclass
class DecodingState:
    """Where the loop stands, for drafters that run a model."""

    input_ids: Tensor
    model_kwargs: dict[str, Any]


@dataclass
class Tally:
    """What speculation has done so far, in one model."""

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    saved_s: float = 0.0
    fallbacks: dict[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """For the report."""
        if not self.passes:
            return {"tokens": 0} | ({"fallbacks": dict(self.fallbacks)} if self.fallbacks else {})
        facts: dict[str, Any] = {
            "tokens": self.tokens,
            "tokens_per_pass": round(self.tokens / self.passes, 2),
            "acceptance": round(self.accepted / max(self.drafted, 1), 3),
            "saved_s": round(self.saved_s, 2),
        }
        return facts | ({"fallbacks": dict(self.fallbacks)} if self.fallbacks else {})

    def count(self, new: int, drafted: int, accepted: int, saved_s: float, *, prompt: bool = False) -> None:
        """A pass has given each sequence `new` tokens. Of the prompt's, only what it brought beyond its own counts."""
        self.passes += not prompt
        self.tokens += new - prompt
        self.drafted += drafted
        self.accepted += accepted
        self.saved_s += saved_s


class Chooser:
    """Chooses tokens as `_sample` does, with the same calls of processors, of the random generator, of stopping
    criteria and of the streamer, one after another."""

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any,
        bounds: Bounds,
    ) -> None:
        self.input_ids, self.finished = input_ids, False
        self.processor, self.criteria, self.streamer = _processing(logits_processor), stopping_criteria, streamer
        own = "transformers."  # whose processors look at one sequence at a time
        self.foreign = any(not type(each).__module__.startswith(own) for each in logits_processor)
        self.bounds = bounds
        self.before: int | None = None  # positions that tokens have which are not in input_ids; None: not known yet
        self.end = min(filter(None, (stopping_criteria.max_length, bounds.positions)), default=0)  # of text and drafts
        self.samples = generation_config.do_sample
        self.answers = bool(generation_config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if self.answers and generation_config.output_scores else None
        self.raw: tuple[Tensor, ...] | None = () if self.answers and generation_config.output_logits else None
        ends = [criteria.eos_token_id for criteria in stopping_criteria if hasattr(criteria, "eos_token_id")]
        self.pads, self.ends = bool(ends), {int(token) for some in ends for token in some}
        pad = generation_config._pad_token_tensor
        self.pad = torch.tensor(0) if pad is None else pad.to(input_ids.device)
        self.running = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        self.chosen: list[int] = []  # the latest tokens
        self.live = [True] * len(input_ids)  # which sequences go on; without an end token all do, to the end

    def step(self, logits: Tensor) -> Tensor:
        """The next tokens [B], from [B, V]."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores = self.processor(self.input_ids, logits)
        self.scores = self.scores if self.scores is None else (*self.scores, scores)
        self.raw = self.raw if self.raw is None else (*self.raw, logits)
        if self.samples:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if self.pads:
            tokens = tokens * self.running + self.pad * (1 - self.running)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        self.running = self.running & ~self.criteria(self.input_ids, self.scores)
        self.chosen, running = torch.stack((tokens, self.running)).tolist()  # at once: a GPU is waited for
        self.finished = not any(running)
        if self.pads:
            self.live = [bool(each) for each in running]
        return tokens

    def room(self, model_kwargs: Mapping[str, Any]) -> int:
        """How many tokens may follow the next one; 0 if nothing says so. `model_kwargs`: of the next pass."""
        room, length = 0, self.input_ids.shape[1]
        if self.criteria.max_length:
            room = max(0, self.end - length - 1)
        if not room or not (self.bounds.lengths or self.bounds.positions):
            return room
        if self.bounds.positions:
            if self.before is None:
                self.before = max(0, max(_texts(model_kwargs), default=0) - length)
            room = max(0, min(room, self.bounds.positions - self.before - length))
        if self.bounds.lengths:
            room = min(room, self.bounds.within({length, *_texts(model_kwargs)}))  # Phi-3 counts padding
        return room


def _texts(model_kwargs: Mapping[str, Any]) -> set[int]:
    """How long texts are with the tokens of the next pass, as far as it says so."""
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is not None and positions.ndim == 2:
        return set((positions.amax(-1) + 1).tolist())
    if mask is not None and mask.ndim == 2:
        return set(mask.sum(-1).tolist())
    return set()


def _processing(processors: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """What a list of processors does, which looks at the signature of each at every step: here once."""
    plain = type(processors) is LogitsProcessorList
    if not plain or any(len(inspect.signature(each.__call__).parameters) > 2 for each in processors):
        return processors

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        for each in processors:
            scores = each(input_ids, scores)
        return scores

    return process


def given_arguments(generate: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of `generate`, which may be a subclass's, by their names."""
    signature = inspect.signature(generate)
    if any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in signature.parameters.values()):
        signature = inspect.signature(GenerationMixin.generate)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for each in signature.parameters.values():
        if each.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(each.name, {})
    return given
