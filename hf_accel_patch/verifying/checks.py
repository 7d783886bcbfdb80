"""What is compared: predictions on whole texts, greedy tokens, padded rows, a reading in pieces."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_accel_patch.compat import CACHE
from hf_accel_patch.families import context_tokens
from hf_accel_patch.verifying.agreement import Agreement

LOGITS = 1 << 26  # numbers, of the texts that are read at a time
SHORT = 128  # tokens of the longest text that is padded; twice as many as of a prompt
LONG = 512  # tokens of the text that is read in pieces: lossy caches keep the latest hundred as they are
ROWS = 4  # of the padded batch; prompts to generate from
STEPS = 16  # tokens read one at a time
NEW = 16  # tokens to generate from each prompt


@dataclass(frozen=True)
class Side:
    """A model, and where what it reads has to be."""

    model: PreTrainedModel
    device: torch.device

    @classmethod
    def of(cls, model: PreTrainedModel) -> Side:
        table = model.get_input_embeddings()
        device = table.weight.device
        if device.type == "meta":  # offloaded by accelerate, whose hook says where it runs
            place = getattr(getattr(table, "_hf_hook", None), "execution_device", None)
            device = torch.device("cpu" if place is None else place)
        return cls(model, device)

    def logits(self, ids: Tensor, **more: Any) -> Tensor:
        """Of ids [B, T]: [B, T, V]."""
        return self.output(ids, use_cache=False, **more).logits

    def output(self, ids: Tensor, **more: Any) -> Any:
        more = {name: each.to(self.device) if isinstance(each, Tensor) else each for name, each in more.items()}
        return self.model(input_ids=ids.to(self.device), **more)

    def takes(self, name: str) -> bool:
        return name in inspect.signature(type(self.model).forward).parameters


def batches(windows: Sequence[Tensor], vocabulary: int) -> Iterator[Tensor]:
    """The windows [1, T] as batches [B, T] of equal ones, in order."""
    most = LOGITS // vocabulary
    held: list[Tensor] = []
    for window in windows:
        same = held and held[0].shape == window.shape
        if held and (not same or (len(held) + 1) * window.shape[1] > most):
            yield torch.cat(held)
            held = []
        held.append(window)
    if held:
        yield torch.cat(held)


def compare(stock: Side, patched: Side, batch: Tensor, found: Agreement, *, together: bool = False) -> None:
    """Predictions of both on whole texts [B, T], each of which begins anew, one by one: what rows of a batch give is
    not to the bit what they give alone. `together`: the stock model reads all of them at once."""
    whole = stock.logits(batch) if together else None
    for number, row in enumerate(batch):
        p = stock.logits(row[None])[0] if whole is None else whole[number]
        found.add(p, patched.logits(row[None])[0], torch.cat([row[1:], row.new_full((1,), -1)]))


def padded(side: Side, windows: Sequence[Tensor]) -> Agreement | None:
    """Rows of several lengths, padded on the left, against each of them alone. None where texts are too short."""
    width = min(SHORT, max(window.shape[1] for window in windows))
    if width < ROWS:
        return None
    long = [window for window in windows if window.shape[1] >= width]
    texts = [long[n % len(long)][0, : width * (ROWS - n) // ROWS] for n in range(ROWS)]
    mask = torch.stack([torch.arange(width) >= width - len(text) for text in texts]).long()
    ids = torch.stack([torch.cat([text.new_zeros(width - len(text)), text]) for text in texts])
    more = {"attention_mask": mask}
    if side.takes("position_ids"):  # as `generate` counts them
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    together, found = side.logits(ids, **more), Agreement()
    for text, row in zip(texts, together, strict=True):
        found.add(side.logits(text[None])[0], row[width - len(text) :])
    return found


def cached(side: Side, windows: Sequence[Tensor]) -> Agreement | None:
    """A text read in pieces, the last of which are single tokens, against the same text in one pass. None where the
    model has no cache of keys and values."""
    text = max(windows, key=lambda window: min(window.shape[1], LONG))[:, :LONG]
    length = text.shape[1]
    if length < 4 or not side.takes(CACHE):
        return None
    single = min(STEPS, length // 4)
    ends = [length // 2, length - single, *range(length - single + 1, length + 1)]
    whole, found = side.logits(text)[0], Agreement()
    start, cache = 0, None
    for end in ends:
        output = side.output(text[:, start:end], **{CACHE: cache}, use_cache=True)
        cache = getattr(output, CACHE, None)
        if cache is None:
            return None
        found.add(whole[start:end], output.logits[0])
        start = end
    return found


def greedy(stock: Side, patched: Side, windows: Sequence[Tensor]) -> tuple[int, int]:
    """From some prompts, how many greedy tokens of the patched model are those of the stock model, up to the first one
    that is not, and how many there are.

    The patched model generates. The stock model reads that once: as long as all tokens before are its own, its choices
    are those that it would have made.
    """
    same = total = 0
    for window in windows[:ROWS]:
        prompt = window[:, : max(1, min(SHORT, window.shape[1]) // 2)]
        ids = generated(patched, prompt)
        choices = stock.logits(ids)[0, prompt.shape[1] - 1 : -1].argmax(-1).cpu()
        equal = (choices == ids[0, prompt.shape[1] :]).long()
        same += int(equal.cumprod(0).sum())
        total += len(equal)
    return same, total


def generated(side: Side, prompt: Tensor) -> Tensor:
    """The prompt [1, T] and greedy tokens behind it, with no penalty that the generation config may name."""
    plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    ids = prompt.to(side.device)
    context = context_tokens(side.model.config.get_text_config(decoder=True))
    most = NEW if context is None else max(1, min(NEW, context - ids.shape[1]))
    found: Any = side.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, **plain)
    return found.cpu()
