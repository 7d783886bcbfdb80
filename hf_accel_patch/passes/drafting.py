"""The decoding loop of speculative decoding: transformers' own, token by token, over passes that cover several tokens.

A pass covers the last token and a draft of the next ones. Then every token is chosen as `_sample` chooses it; a token
that is not the drafted one makes the rest of the pass void. So the tokens are those of the plain loop, sampled ones
included, as far as a pass over several tokens rounds like passes over one. For a draft that is one certain sequence
this is the acceptance rule of arXiv 2211.17192: a drafted token is accepted with the probability that the model gives
it.

Here the sequences of a batch go on together, with the shortest accepted draft; in passes/apart.py each at its own pace.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from hf_accel_patch.compat import CACHE, returned_cache, take_back
from hf_accel_patch.ops.pacing import Pace
from hf_accel_patch.passes.apart import decode_apart, why_together
from hf_accel_patch.passes.choosing import Chooser, DecodingState, Draft, Drafter, Tally
from hf_accel_patch.passes.graphs import begin
from hf_accel_patch.passes.replaying import WIDTHS, Decoding

WHOLE = 512  # tokens: a longer prompt may be read in chunks, of which only the last gives logits


def decode(
    model: PreTrainedModel,
    chooser: Chooser,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    drafter: Drafter,
    pace: Pace,
    tally: Tally,
    *,
    apart: bool = False,
) -> Any:
    """Generate, greedily or by sampling, as `_sample` does. `apart`: the sequences of a batch may go on at their own
    pace, if the cache allows it."""
    prompt = chooser.input_ids
    drafter.add(prompt.tolist(), chooser.live, pace)
    room = chooser.room(model_kwargs)
    cache: Cache = model_kwargs[CACHE]
    fresh = cache.get_seq_length() == 0 and not any(cache.is_sliding)  # a window would have to keep all of the prompt
    whole = generation_config.prefill_chunk_size is None and model_kwargs.get("inputs_embeds") is None
    if "_prefill" in vars(model):  # a pass that reads a part of a prompt has to know how many logits are needed
        whole = whole and "logits_to_keep" in model_kwargs and prompt.shape[1] < WHOLE
    draft = drafter.first(room, pace) if fresh and whole and room > 0 else None
    decoding = begin(model, generation_config, pace)
    pace.recorded = () if decoding is None else WIDTHS[1:]
    if decoding is not None:
        drafter.replay(decoding)
    outputs = _prefill(model, prompt, generation_config, model_kwargs, draft)
    cache = returned_cache(outputs)
    with model._optimize_model_for_decode() if hasattr(model, "_optimize_model_for_decode") else torch.no_grad():
        if apart and not why_together(model, chooser, cache, model_kwargs):
            decode_apart(model, chooser, outputs, model_kwargs, draft, drafter, pace, tally, decoding)
        else:
            what = model, chooser, outputs, model_kwargs, draft, drafter, pace, tally, decoding
            model_kwargs = _decode_together(*what)
    drafter.finish()
    if chooser.streamer is not None:
        chooser.streamer.end()
    if not chooser.answers:
        return chooser.input_ids
    return GenerateDecoderOnlyOutput(
        sequences=chooser.input_ids,
        scores=chooser.scores,
        logits=chooser.raw,
        **{CACHE: model_kwargs.get(CACHE)},
    )


def _decode_together(
    model: PreTrainedModel,
    chooser: Chooser,
    outputs: Any,
    model_kwargs: dict[str, Any],
    draft: Draft | None,
    drafter: Drafter,
    pace: Pace,
    tally: Tally,
    decoding: Decoding | None,
) -> dict[str, Any]:
    """`outputs`: of the prompt and this draft. Returns what the next call of the model would get. Whatever is raised,
    by a streamer for instance, the cache is left as the plain loop leaves it."""
    cache: Cache = returned_cache(outputs)
    since, drafting_s = 0.0, 0.0
    unread = 0  # drafted tokens in the cache that were not chosen so far
    try:
        while True:
            drafted = [] if draft is None else [list(column) for column in zip(*draft.tokens, strict=True)]
            logits, accepted = outputs.logits[:, -1 - len(drafted) :], 0
            chosen: list[list[int]] = []
            unread = len(drafted)
            for place in range(len(drafted) + 1):
                chooser.step(logits[:, place])
                chosen.append(chooser.chosen)
                if chooser.finished or place == len(drafted):
                    break
                if chooser.chosen != drafted[place]:  # rows that have ended count: caches equal stock's
                    break
                accepted, unread = accepted + 1, unread - 1
            new, now = len(chosen), time.perf_counter()
            _count(tally, pace, draft, accepted, new, now - since if since else None, drafting_s)
            since = now
            if draft is not None:
                take_back(cache, len(drafted) + 1 - new)
            unread = 0
            model_kwargs = _updated(model, outputs, model_kwargs, new)
            del outputs, logits
            if chooser.finished:
                break
            drafter.add([list(each) for each in zip(*chosen, strict=True)], chooser.live, pace)
            most, live, started = chooser.room(model_kwargs), chooser.live, time.perf_counter()
            state = DecodingState(chooser.input_ids, model_kwargs)
            draft = drafter.draft(most, live, state, pace) if most > 0 else None
            drafting_s = 0.0
            if draft is not None:
                drafting_s = time.perf_counter() - started
                ends = zip(draft.tokens, live, strict=True)
                draft.tokens = [row if on else [int(chooser.pad)] * len(row) for row, on in ends]
            _record_past(cache, draft is not None)
            outputs = _pass(model, chooser.input_ids, model_kwargs, draft, decoding)
            cache = returned_cache(outputs)  # of Phi-3 a new one, where its frequencies change
    finally:
        if unread:
            take_back(cache, unread)
        _record_past(cache, False)
    return model_kwargs


def _record_past(cache: Cache, on: bool) -> None:
    """Whether what leaves a window may have to come back."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = on


def _prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    draft: Draft | None,
) -> Any:
    """The prompt, and a draft with it, which costs no pass of its own."""
    if draft is None:
        return model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    tokens = torch.tensor(draft.tokens, device=input_ids.device)
    width = tokens.shape[1]
    more = _updated(model, {}, dict(model_kwargs), width)
    if "logits_to_keep" in more:
        more["logits_to_keep"] = 1 + width
    length = getattr(generation_config, "_mask_length", None)
    if length is not None:
        generation_config._mask_length = length + width
    outputs = model._prefill(torch.cat([input_ids, tokens], dim=-1), generation_config, more, is_first_iteration=True)
    model_kwargs[CACHE] = returned_cache(outputs)
    if length is not None:
        generation_config._mask_length = length
    return outputs


def _updated(model: PreTrainedModel, outputs: Any, model_kwargs: dict[str, Any], new: int) -> dict[str, Any]:
    """What so many steps of the plain loop would make of it: each repeats the last token's type."""
    types = model_kwargs.get("token_type_ids")
    updated: dict[str, Any] = model._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=new)
    if types is not None and "token_type_ids" in updated:
        updated["token_type_ids"] = torch.cat([types, types[:, -1:].expand(-1, new)], dim=-1)
    return updated


def _pass(
    model: PreTrainedModel,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    draft: Draft | None,
    decoding: Decoding | None,
) -> Any:
    """One run of the model over the last token and the draft."""
    width = 0
    if draft is not None:
        tokens = torch.tensor(draft.tokens, device=input_ids.device)
        width = tokens.shape[1]
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        model_kwargs = _updated(model, {}, dict(model_kwargs), width)
    inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1 + width, **model_kwargs)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = 1 + width
    return (decoding or model)(**inputs, return_dict=True)


def _count(
    tally: Tally, pace: Pace, draft: Draft | None, accepted: int, new: int, seconds: float | None, drafting_s: float
) -> None:
    """`seconds`: of the step, None of the prompt's; `drafting_s` of them for the draft."""
    drafted = 0 if draft is None else len(draft.tokens[0])
    saved_s = 0.0
    if draft is not None:
        if not draft.rehearsed:
            pace.learn(draft.kind, draft.prior, drafted, accepted)
        saved_s = 0.0 if pace.plain is None else (new - (seconds is None)) * pace.plain - (seconds or 0.0)
    tally.count(new, drafted, accepted, saved_s, prompt=seconds is None)
    if seconds is not None and drafted:
        pace.passed(1 + drafted, new, seconds, drafting_s)
    elif seconds is not None:
        pace.timed(seconds)
