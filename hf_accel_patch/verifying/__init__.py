"""verify: a patched model compared with the unpatched one, measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View, bind, context_tokens, weight_bytes
from hf_accel_patch.measure import PeakMemory, interleaved_ms, spread, token_ms
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.passes.calibrate import tokenized
from hf_accel_patch.progress import stages
from hf_accel_patch.texts import held_out_text
from hf_accel_patch.verifying import checks
from hf_accel_patch.verifying.agreement import Agreement
from hf_accel_patch.verifying.checks import Side
from hf_accel_patch.verifying.original import Original, original_of
from hf_accel_patch.verifying.result import VerifyResult
from hf_accel_patch.verifying.untouched import untouched

__all__ = ["VerifyResult", "verify"]

WINDOW = 2048  # tokens, or what the model was made for if that is less
DEFAULT_WINDOWS = 16, 512  # of the default text: how many, of how many tokens
PROMPT, TIMED = 128, 16  # tokens that are timed: of the prompt, and behind it
SECONDS, ROUNDS = 10.0, 5  # at most, of timing in turn


def verify(
    model: object,
    texts: Sequence[Any] | str | Tensor | None = None,
    *,
    tokenizer: Any = None,
    original: PreTrainedModel | str | os.PathLike[str] | None = None,
    window: int | None = None,
    tokens: int | None = None,
    speed: bool = True,
    stream: bool | None = None,
    progress: bool = True,
) -> VerifyResult:
    """Compare a patched model with the unpatched one: predictions, perplexity, greedy tokens, padding, cache, speed and
    memory. The model stays as it is.

    `texts`: strings, or tensors of token ids [T] or [B, T]; by default 8192 tokens of the source of this Python's json
    and asyncio. `tokenizer`: for strings; by default that of the pipeline, or at `model.name_or_path`. Texts are cut
    into windows of `window` tokens (2048, or what the model was made for), each of which begins anew; the perplexity is
    exp of the mean loss of all tokens but the first of each window. `tokens`: read no more than that.

    `original`: the unpatched model, or the path or id of its checkpoint. By default the originals that the patch has
    kept; where they were discarded, the checkpoint at `model.name_or_path`. `stream`: read the weights of a checkpoint
    module by module for each pass, so that it is never in memory as a whole (None: where it would not fit); its speed
    and its cache are not measured then. `speed=False` leaves the timing out.

    Raises HfAccelError for a model that is not patched, and where there is no original; ValueError for texts without
    two tokens in a row, or ids that the model does not have.

    >>> found = verify(patch(model, quantize="int8"), texts, speed=False, progress=False)
    >>> found.top1_agreement > 0.95, found.max_kl < 0.1
    (True, True)
    """
    view = bind(model)
    found = view.model
    if found.config.is_encoder_decoder:
        raise UnsupportedModel(f"verify: {view.subject} is an encoder-decoder", "there is no hint for these yet")
    windows = _windows(view, texts, tokenizer or view.tokenizer, window, tokens)
    batches = list(checks.batches(windows, found.get_input_embeddings().weight.shape[0]))
    with stages(len(batches) + 4, on=progress) as advance, torch.random.fork_rng(devices=_cuda(found)), torch.no_grad():
        advance("finding the original")
        with original_of(found, original, stream) as stock, untouched(found):
            before, after, agreement = Side.of(stock.model), Side.of(found), Agreement()
            for side in (before, after):
                _name_padding(side.model)
            for batch in batches:
                advance("comparing predictions")
                checks.compare(before, after, batch, agreement, together=stock.streamed)
            advance("padding and caching")
            padded = [_plain(checks.padded(side, windows)) for side in (before, after)]
            cached = [None if stock.streamed else _plain(checks.cached(before, windows))]
            cached.append(_plain(checks.cached(after, windows)))
            advance("generating")
            common, generated = checks.greedy(before, after, windows)
            advance("timing")
            measured = _measured(stock, after, windows[0]) if speed else {}
            sizes = stock.weight_bytes, weight_bytes(found)
            quantized = any(isinstance(module, QuantizedModule) for module in stock.model.modules())
    ppl_before, ppl_after = agreement.perplexities
    return VerifyResult(
        model=view.subject,
        original=stock.source,
        streamed=stock.streamed,
        tokens=agreement.tokens,
        windows=len(windows),
        top1_agreement=agreement.top1,
        mean_kl=agreement.mean_kl,
        max_kl=agreement.kl_max,
        perplexity_before=ppl_before,
        perplexity_after=ppl_after,
        greedy_common=common,
        greedy_tokens=generated,
        padded_before=padded[0],
        padded_after=padded[1],
        cached_before=cached[0],
        cached_after=cached[1],
        weight_bytes_before=sizes[0],
        weight_bytes_after=sizes[1],
        remarks=_remarks(stock, cached[1], quantized),
        **measured,
    )


def _windows(view: View, texts: Any, tokenizer: Any, window: int | None, tokens: int | None) -> list[Tensor]:
    """Token ids [1, T] to read. Raises ValueError, TypeError, or HfAccelError where there is no tokenizer."""
    for name, value, least in (("window", window, 2), ("tokens", tokens, 2)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"verify: {name}={value!r}; give a whole number from {least} on")
    context = context_tokens(view.config)
    if window is not None and context is not None and window > context:
        raise ValueError(f"verify: window={window} tokens, but the model was made for {context}")
    hint = "give tokenizer= beside the texts, or texts as tensors of token ids"
    if texts is None:
        ids = tokenized([held_out_text()], view.model, tokenizer, "texts", hint)[0]
        count, length = DEFAULT_WINDOWS
        length = window or min(length, context or length)
        windows = spread(torch.tensor([ids]), max(1, (tokens or count * length) // length), length)
    else:
        size = window or min(WINDOW, context or WINDOW)
        rows = tokenized(_checked(texts), view.model, tokenizer, "texts", hint)
        pieces = [row[start : start + size] for row in rows for start in range(0, len(row), size)]
        windows = [torch.tensor([piece]) for piece in pieces if len(piece) > 1]
    if tokens is not None:
        windows = _first(windows, tokens)
    if not windows:
        given = (
            "texts= holds no text of two tokens" if texts is not None else f"the text is shorter than window={window}"
        )
        raise ValueError(f"verify: {given}")
    return windows


def _checked(texts: Any) -> list[Any]:
    texts = [texts] if isinstance(texts, str | Tensor) else texts
    if isinstance(texts, bytes | dict) or not hasattr(texts, "__iter__"):
        raise TypeError(f"verify: texts= takes texts or tensors of token ids, not {type(texts).__name__}")
    texts = list(texts)
    for text in texts:
        ids = isinstance(text, Tensor) and text.ndim in (1, 2) and not (text.is_floating_point() or text.is_complex())
        plain = isinstance(text, list | tuple) and all(isinstance(token, int) for token in text)
        if not (isinstance(text, str) or ids or plain):
            what = f"a {text.dtype} tensor {list(text.shape)}" if isinstance(text, Tensor) else type(text).__name__
            raise TypeError(f"verify: texts= takes strings, or tensors of token ids [T] or [B, T], not {what}")
    return texts


def _first(windows: list[Tensor], tokens: int) -> list[Tensor]:
    """No more than so many tokens."""
    kept: list[Tensor] = []
    for window in windows:
        left = tokens - sum(each.shape[1] for each in kept)
        if left < 2:
            break
        kept.append(window[:, :left])
    return kept


def _measured(stock: Original, after: Side, window: Tensor) -> dict[str, Any]:
    """Speed and memory, as fields of the result. Both models are timed in turn."""
    context = context_tokens(after.model.config.get_text_config(decoder=True)) or PROMPT + TIMED + 1
    prompt = window[:, : max(1, min(PROMPT, context - TIMED - 1))].to(after.device)
    sides = {"after": after.model} if stock.streamed else {"before": stock.model, "after": after.model}
    memory = PeakMemory(after.device)
    fields: dict[str, Any] = {}
    for when, model in sides.items():
        memory.reset()
        token_ms(model, prompt, TIMED)
        beside = memory.read()
        fields[f"peak_memory_bytes_{when}"] = None if beside is None else weight_bytes(model) + beside
    times = interleaved_ms(list(sides.values()), prompt, TIMED, ROUNDS, SECONDS)
    for when, (prefill, decode) in zip(sides, times, strict=True):
        fields |= {f"prefill_speed_{when}": 1000 / prefill, f"speed_{when}": 1000 / decode}
    return fields


def _name_padding(model: PreTrainedModel) -> None:
    """Say what `generate` takes for padding, which it warns of otherwise. Comes off with the rest."""
    config = model.generation_config
    if config.pad_token_id is None and config.eos_token_id is not None:
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list | tuple) else ends


def _remarks(stock: Original, cached: dict[str, float] | None, quantized: bool) -> tuple[str, ...]:
    streamed = "the original was read from the disk for each pass: its cache and its speed are not measured"
    none = "the model has no cache of keys and values that could be compared"
    before = "the weights were quantized before the patch; original= compares with others"
    said = ((streamed, stock.streamed), (none, cached is None), (before, quantized))
    return tuple(text for text, holds in said if holds)


def _plain(found: Agreement | None) -> dict[str, float] | None:
    return None if found is None else found.to_dict()


def _cuda(model: PreTrainedModel) -> list[int]:
    return [torch.cuda.current_device()] if any(each.is_cuda for each in model.parameters()) else []
