"""Drafts of a model with other tokens: the text goes to it, and what follows comes back, as strings, as in the
universal assisted generation of transformers (arXiv 2502.05202), for every sequence of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.logs import get_logger
from hf_accel_patch.passes.choosing import DecodingState
from hf_accel_patch.passes.drafts import ModelSource, OtherModel

logger = get_logger(__name__)
JOIN = 10  # tokens before a draft that are read with it, for spaces and parts of words
UNFINISHED = "\ufffd"  # the bytes of a character that are not all there


@dataclass(frozen=True)
class Translation:
    """Between the tokens of a model and those of its draft model."""

    tokenizer: Any = field(repr=False)
    draft_tokenizer: Any = field(repr=False)
    failed: set[type[Exception]] = field(default_factory=set, repr=False, compare=False)  # that were told of

    def into(self, tokens: list[int]) -> list[int]:
        """A text in the tokens of the draft model; none of one that ends within a character, or that a tokenizer does
        not take."""
        try:
            text = _text(self.tokenizer, tokens)
            if not text or text.endswith(UNFINISHED):
                return []
            ids: list[int] = self.draft_tokenizer(text, verbose=False)["input_ids"]
            return ids
        except Exception as error:  # those in Rust have no other type, such as for a word that is not in a table
            return self._nothing(error)

    def back(self, tokens: list[int], theirs: list[int], drafted: list[int]) -> list[int]:
        """What the draft model wrote after `theirs`, in the tokens of the model, to follow `tokens`; nothing where its
        words end elsewhere."""
        try:
            before = _text(self.draft_tokenizer, theirs[-JOIN:])
            after = _text(self.draft_tokenizer, [*theirs[-JOIN:], *drafted])
            if not after.startswith(before):
                return []
            end = _text(self.tokenizer, tokens[-JOIN:])
            more = after[len(before) :].rstrip(UNFINISHED)
            both: list[int] = self.tokenizer(end + more, add_special_tokens=False, verbose=False)["input_ids"]
            for place in range(1, len(both)):
                if both[place - 1] == tokens[-1] and _text(self.tokenizer, both[:place]) == end:
                    return both[place:]
        except Exception as error:
            return self._nothing(error)
        return []

    def _nothing(self, error: Exception) -> list[int]:
        if type(error) not in self.failed:
            self.failed.add(type(error))
            logger.warning(f"nothing is drafted where a tokenizer fails: {type(error).__name__}: {error}")
        return []


class Translated(ModelSource):
    """A draft model with other tokens, and a cache for each sequence."""

    def __init__(self, model: PreTrainedModel, translation: Translation, vocabulary: int) -> None:
        self.model, self.translation, self.vocabulary = model, translation, vocabulary
        self.sources: dict[int, OtherModel] = {}

    def propose(self, width: int, running: list[bool], state: DecodingState) -> Tensor | None:
        mask = state.model_kwargs.get("attention_mask")
        texts = state.input_ids.tolist()
        if isinstance(mask, Tensor) and mask.shape == state.input_ids.shape:
            texts = [[t for t, on in zip(*pair, strict=True) if on] for pair in zip(texts, mask.tolist(), strict=True)]
        read = {row: self.translation.into(texts[row]) for row, on in enumerate(running) if on}
        found: dict[int, list[int]] = {}
        for row, theirs in read.items():
            source = self.sources.setdefault(row, OtherModel(self.model))
            if not theirs or max(theirs) >= source.known:  # a tokenizer may have tokens that its model has not
                return None
            ids = torch.tensor([theirs])
            drafted = source.propose(width, [True], DecodingState(ids, {"attention_mask": torch.ones_like(ids)}))
            if drafted is None:
                return None
            tokens = self.translation.back(texts[row], theirs, drafted[0].tolist())
            known = next((at for at, token in enumerate(tokens) if token >= self.vocabulary), len(tokens))
            found[row] = tokens[:known] or texts[row][-1:]  # a wrong one, so that what it took is counted
        length = min(width, *(len(tokens) for tokens in found.values()))
        return torch.tensor([found.get(row, [0] * length)[:length] for row in range(len(running))])


def between(model: PreTrainedModel, draft: PreTrainedModel, tokenizer: Any, draft_tokenizer: Any) -> Translation | None:
    """How texts go from a model to its draft model; None where both have the same tokens. Raises UnsupportedModel where
    tokens are others and a tokenizer is missing."""
    sizes = [each.config.get_text_config(decoder=True).vocab_size for each in (model, draft)]
    if sizes[0] == sizes[1] and tokenizer is None and draft_tokenizer is None:
        return None
    pair: list[Any] = []
    for each, given, keyword in ((model, tokenizer, "tokenizer"), (draft, draft_tokenizer, "draft_tokenizer")):
        source = each.name_or_path if given is None else given
        try:
            pair.append(AutoTokenizer.from_pretrained(source) if isinstance(source, str) and source else source)
        except (OSError, ValueError):
            pair.append("")
        if not pair[-1]:
            raise UnsupportedModel(
                f"the draft model has {sizes[1]} tokens, the model {sizes[0]}, and there is no {keyword} at {source!r}",
                f"give Speculative(..., {keyword}=...)",
            )
    same = pair[0].get_vocab() == pair[1].get_vocab()  # models may have more rows than there are tokens
    return None if same else Translation(*pair)


def why_no_draft(draft: PreTrainedModel) -> str:
    """Why this model cannot draft."""
    config = draft.config.get_text_config(decoder=True)
    stateful = config.is_encoder_decoder or draft._is_stateful or not draft._supports_default_dynamic_cache()
    if stateful or not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers):
        return f"the draft model, a {type(draft).__name__}, has a state that cannot be taken back"
    return ""


def _text(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
