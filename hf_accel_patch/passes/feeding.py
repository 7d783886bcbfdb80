"""A pass of the model in which each sequence of a batch goes on at its own place."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_accel_patch.compat import CACHE, take_back
from hf_accel_patch.passes.choosing import Chooser
from hf_accel_patch.passes.layers import Places
from hf_accel_patch.passes.replaying import Decoding
from hf_accel_patch.passes.rooms import Pass


class Reading:
    """Runs the model over the next tokens of every sequence, each behind its own last entry."""

    def __init__(
        self,
        model: PreTrainedModel,
        chooser: Chooser,
        cache: Cache,
        model_kwargs: dict[str, Any],
        decoding: Decoding | None,
    ) -> None:
        self.model, self.cache, self.chooser, self.decoding = model, cache, chooser, decoding
        ids, mask = chooser.input_ids, model_kwargs.get("attention_mask")
        self.prompt = ids.shape[1]
        self.seen = None if mask is None or bool(mask.all()) else mask.bool()
        positions = model_kwargs.get("position_ids")
        last = torch.full_like(ids[:, :1], self.prompt - 1) if positions is None else positions[:, -1:]
        self.shift, self.end = last - (self.prompt - 1), chooser.end
        self.kwargs = {
            name: each for name, each in model_kwargs.items() if name not in ("attention_mask", "position_ids")
        }
        self.kwargs[CACHE] = cache
        self.adds = model.config._attn_implementation == "eager"
        self.parted = False  # whether the layers of the cache are told where to write

    def __call__(self, lengths: list[int | None], fed: list[list[int]], *, plain: bool) -> Any:
        """`lengths`: entries of each sequence, None where it has ended. `fed`: what each reads next. `plain`: that is
        the last chosen token of each."""
        width, device = max(map(len, fed)), self.shift.device
        live = [length for length in lengths if length is not None]
        first, last = min(live), max(live)
        places: Tensor | int = first
        if plain:
            tokens, positions = self.chooser.input_ids[:, -1:], self.shift + first
        else:
            tokens = torch.tensor([each or [0] * width for each in fed], device=device)
            starts = torch.tensor([[first if length is None else length] for length in lengths], device=device)
            places = starts + torch.arange(width, device=device)
            positions = (places.clamp(max=self.end - 1) if self.end else places) + self.shift  # tables may end there
        run = partial(self._plain, tokens, places, positions, first, last)
        if self.decoding is None:
            return run()
        return self.decoding.run(
            Pass(self.cache, tokens, places, positions, last + width, self.seen, run, changing=False)
        )

    def _plain(self, tokens: Tensor, places: Tensor | int, positions: Tensor, first: int, last: int) -> Any:
        width = tokens.shape[1]
        if first == last or isinstance(places, int):
            mask = self._together(first, width)
        else:
            mask = self._apart(places, last + width)
        inputs = self.model.prepare_inputs_for_generation(
            tokens, next_sequence_length=width, attention_mask=mask, position_ids=positions, **self.kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = width
        return self.model(**inputs, return_dict=True)

    def _together(self, length: int, width: int) -> Tensor | None:
        """All go on at the same place, so nothing is new to the model: it gets the padding."""
        if self.parted:
            self.parted = False
            for layer in self.cache.layers:
                layer.apart = None
        if held := self.cache.get_seq_length() - length:
            take_back(self.cache, held)
        if self.seen is None:
            return None
        return torch.nn.functional.pad(self.seen, (0, length + width - self.prompt), value=True)

    def _apart(self, places: Tensor, stop: int) -> Tensor:
        """What each token sees, [B, 1, T, S]."""
        self.parted, reached = True, Places(places, stop)
        for layer in self.cache.layers:
            layer.apart = reached
        mask = torch.arange(stop, device=places.device) <= places[:, :, None]
        if self.seen is not None:
            mask[:, :, : self.prompt] &= self.seen[:, None]
        if not self.adds:
            return mask[:, None]
        dtype = self.model.dtype
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return added.masked_fill(~mask, torch.finfo(dtype).min)[:, None]
