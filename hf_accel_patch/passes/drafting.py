"""The decoding loop of speculative decoding: transformers' own, token by token, over passes that cover several tokens.

A pass covers the last token and a draft of the next ones. Then every token is chosen as `_sample` chooses it, with the
same calls of processors, of the random generator, of stopping criteria and of the streamer; a token that is not the
drafted one makes the rest of the pass void. So the tokens are those of the plain loop, sampled ones included, as far as
a pass over several tokens rounds like passes over one. For a draft that is one certain sequence this is the acceptance
rule of arXiv 2211.17192: a drafted token is accepted with the probability that the model gives it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from hf_accel_patch.ops.pacing import Pace

WHOLE = 512  # tokens: a longer prompt may be read in chunks, of which only the last gives logits


@dataclass
class Draft:
    """What may come next: for each sequence the same number of tokens. `kind` and `prior`: how it was found, and how
    often such tokens are right before that is known."""

    tokens: list[list[int]]
    kind: int = 0
    prior: float = 0.5


class Drafter(Protocol):
    """Where drafts come from, for one call of `generate`."""

    def add(self, tokens: list[list[int]]) -> None:
        """These tokens were chosen, for each sequence."""
        ...

    def draft(self, most: int, running: list[bool], state: DecodingState, pace: Pace) -> Draft | None:
        """A draft of as many tokens as pay, at most `most`, for the sequences that are running."""
        ...

    def first(self, most: int) -> Draft | None:
        """A draft that is verified with the prompt."""
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


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    streamer: Any,
    model_kwargs: dict[str, Any],
    drafter: Drafter,
    pace: Pace,
    tally: Tally,
) -> Any:
    """Generate, greedily or by sampling, as `_sample` does. `input_ids` [B, T]."""
    answers = bool(generation_config.return_dict_in_generate)
    scores: tuple[Tensor, ...] | None = () if answers and generation_config.output_scores else None
    raw: tuple[Tensor, ...] | None = () if answers and generation_config.output_logits else None
    pads = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    pad = generation_config._pad_token_tensor
    pad = torch.tensor(0) if pad is None else pad.to(input_ids.device)
    running = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    drafter.add(input_ids.tolist())

    room = (stopping_criteria.max_length or 0) - input_ids.shape[1] - 1
    cache: Cache = model_kwargs["past_key_values"]
    fresh = cache.get_seq_length() == 0 and not any(cache.is_sliding)  # a window would have to keep all of the prompt
    whole = generation_config.prefill_chunk_size is None and model_kwargs.get("inputs_embeds") is None
    if "_prefill" in vars(model):  # a pass that reads a part of a prompt has to know how many logits are needed
        whole = whole and "logits_to_keep" in model_kwargs and input_ids.shape[1] < WHOLE
    draft = drafter.first(room) if fresh and whole and room > 0 else None
    outputs = _prefill(model, input_ids, generation_config, model_kwargs, draft)
    cache = outputs.past_key_values
    cache.activate_past_recording()
    drafting = started = 0.0
    with model._optimize_model_for_decode() if hasattr(model, "_optimize_model_for_decode") else torch.no_grad():
        while True:
            drafted = [] if draft is None else torch.tensor(draft.tokens, device=input_ids.device).unbind(1)
            logits, finished, accepted = outputs.logits[:, -1 - len(drafted) :], False, 0
            chosen: list[Tensor] = []
            for place in range(len(drafted) + 1):
                step_logits = logits[:, place].to(copy=True, dtype=torch.float32, device=input_ids.device)
                step_scores = logits_processor(input_ids, step_logits)
                scores = scores if scores is None else (*scores, step_scores)
                raw = raw if raw is None else (*raw, step_logits)
                if generation_config.do_sample:
                    tokens = torch.multinomial(torch.softmax(step_scores, dim=-1), num_samples=1).squeeze(1)
                else:
                    tokens = torch.argmax(step_scores, dim=-1)
                if pads:
                    tokens = tokens * running + pad * (1 - running)
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                chosen.append(tokens)
                if streamer is not None:
                    streamer.put(tokens.cpu())
                running = running & ~stopping_criteria(input_ids, scores)
                finished = not bool(running.any())
                if finished or place == len(drafted):
                    break
                if bool((tokens != drafted[place]).any()):  # rows that have ended count: caches equal stock's
                    break
                accepted += 1
            new = len(chosen)
            if started or draft is not None:
                _count(
                    tally, pace, draft, accepted, len(drafted), new, (started - drafting, time.perf_counter() - started)
                )
            cache.crop(new - 1 - len(drafted))
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=new)
            del outputs, logits
            if finished:
                break
            drafter.add(torch.stack(chosen, dim=1).tolist())
            drafting = time.perf_counter()
            most = stopping_criteria.max_length - input_ids.shape[1] - 1 if stopping_criteria.max_length else 0
            state = DecodingState(input_ids, model_kwargs)
            live = running.tolist() if pads else [1] * len(input_ids)  # without an end token all go on to the end
            draft = drafter.draft(most, [bool(each) for each in live], state, pace) if most > 0 else None
            if draft is not None:
                ends = zip(draft.tokens, live, strict=True)
                draft.tokens = [row if on else [int(pad)] * len(row) for row, on in ends]
            started = time.perf_counter()
            outputs = _pass(model, input_ids, model_kwargs, draft)
    drafter.finish()
    for layer in cache.layers:
        if getattr(layer, "record_past", False):
            layer.record_past = False
    if streamer is not None:
        streamer.end()
    if not answers:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids, scores=scores, logits=raw, past_key_values=model_kwargs.get("past_key_values")
    )


def _prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    draft: Draft | None,
) -> Any:
    """The prompt, and a draft with it, which costs next to nothing there."""
    if draft is None:
        return model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    tokens = torch.tensor(draft.tokens, device=input_ids.device)
    width = tokens.shape[1]
    more = model._update_model_kwargs_for_generation({}, dict(model_kwargs), num_new_tokens=width)
    if "logits_to_keep" in more:
        more["logits_to_keep"] = 1 + width
    length = getattr(generation_config, "_mask_length", None)
    if length is not None:
        generation_config._mask_length = length + width
    outputs = model._prefill(torch.cat([input_ids, tokens], dim=-1), generation_config, more, is_first_iteration=True)
    model_kwargs["past_key_values"] = outputs.past_key_values
    if length is not None:
        generation_config._mask_length = length
    return outputs


def _pass(model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any], draft: Draft | None) -> Any:
    """One run of the model over the last token and the draft."""
    width = 0
    if draft is not None:
        tokens = torch.tensor(draft.tokens, device=input_ids.device)
        width = tokens.shape[1]
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        model_kwargs = model._update_model_kwargs_for_generation({}, dict(model_kwargs), num_new_tokens=width)
    inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1 + width, **model_kwargs)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = 1 + width
    return model(**inputs, return_dict=True)


def _count(
    tally: Tally, pace: Pace, draft: Draft | None, accepted: int, drafted: int, new: int, seconds: tuple[float, float]
) -> None:
    """`seconds`: of the draft and of the pass. Of the prompt's pass, which has none, only what it has brought beyond
    its token is counted."""
    first = seconds[0] <= 0
    new -= first
    tally.passes += not first
    tally.tokens += new
    tally.drafted += drafted
    tally.accepted += accepted
    if draft is not None:
        pace.learn(draft.kind, draft.prior, drafted, accepted)
        plain = pace.costs.get(1)
        tally.saved_s += 0.0 if plain is None else new * plain - (0.0 if first else sum(seconds))
    if not first:
        pace.timed(1 + drafted, seconds[1])
