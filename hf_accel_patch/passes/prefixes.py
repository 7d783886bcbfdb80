"""Prompts that begin alike read their common beginning once."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from hf_accel_patch.compat import CACHE, returned_cache, take_back
from hf_accel_patch.families import View, dtype_of
from hf_accel_patch.logs import get_logger
from hf_accel_patch.passes.prefix_folder import Entry, PrefixFolder, remove, touch
from hf_accel_patch.passes.prefix_folder import read as read_file
from hf_accel_patch.plan import size_in_bytes

logger = get_logger(__name__)
LEAST_TOKENS = 16  # shorter beginnings are read again rather than looked up
ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")  # of PEFT: which of them are on
SAMPLE = 16  # numbers of each weight that identify a model
PLAIN = frozenset(  # arguments of a forward under which a prompt is nothing but its tokens
    ("attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "return_dict")
)

Key = tuple[str, bytes]  # what made it, the tokens


class PrefixCache:
    """Caches of prompts, for `KVCache(prefixes=...)`: `generate` takes the longest known beginning of a prompt from
    here and reads the rest; what it has read is kept here.

    `limit`: bytes in memory, and again in `folder`, a number or like "2GiB"; the least recently used goes first. With
    `folder`, prefixes are written as safetensors, and are there for the next process with the same model; patching
    another model with the same folder raises UnsupportedModel, and so does another tokenizer, if `tokenizer` is given.
    Only prompts without padding are kept, one sequence at a time. A model whose weights have changed starts anew; so
    does one of which adapters are switched. Several models may share one without a folder, each has its own prefixes.

    `hits`, `misses` and `reused_tokens` count; `bytes` are those in memory; `clear()` forgets all, in the folder too.
    Raises ValueError for what is no size.

    >>> prefixes = PrefixCache("64MB")
    >>> model = patch(model, cache=KVCache(prefixes=prefixes))
    >>> tokens = [model.generate(ids, max_new_tokens=2) for _ in range(2)]
    >>> prefixes.hits, prefixes.misses
    (1, 1)
    """

    def __init__(self, limit: int | str, folder: str | os.PathLike[str] | None = None, tokenizer: Any = None) -> None:
        self.limit = size_in_bytes(limit)
        self.folder = None if folder is None else Path(folder)
        self._disk = None if self.folder is None else PrefixFolder(self.folder)
        self.tokenizer = "" if tokenizer is None else _digest(sorted(tokenizer.get_vocab().items()))
        self.hits = self.misses = self.reused_tokens = 0
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._models: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()
        self._owner_facts: dict[str, str] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        return self

    def __reduce__(self) -> Any:
        """A pickle is empty, but for what is in the folder."""
        return _made, (self.limit, self.folder, self.tokenizer)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        where = f", folder={str(self.folder)!r}" if self.folder else ""
        return f"PrefixCache(limit={self.limit}{where}, prefixes={len(self)}, bytes={self.bytes})"

    @property
    def bytes(self) -> int:
        """In memory."""
        return sum(entry.bytes for entry in self._entries.values() if entry.state is not None)

    def clear(self) -> None:
        """Forget all of them, those in the folder too."""
        with self._lock:
            for path in self._disk.files() if self._disk else ():
                remove(path)
            self._entries.clear()

    def check(self, view: View) -> None:
        """Raise UnsupportedModel if the folder belongs to another model or tokenizer."""
        if self._disk is not None:
            self._owner_facts = self._owner(view)  # before other passes change the weights
            self._disk.check(self._owner_facts)

    def open(self, view: View) -> None:
        """Take possession of the folder."""
        if self._disk is not None:
            self._disk.claim(self._owner_facts or self._owner(view))

    def restore(self, tokens: Tensor, cache: DynamicCache, device: torch.device, made_by: str, read: int = 1) -> int:
        """Fill an empty cache on `device` with the longest known beginning of `tokens` [T] that `made_by` has, all but
        the last `read` at most. Returns how many tokens that are."""
        with self._lock:
            while True:
                mine = ((key, entry) for key, entry in self._entries.items() if key[0] == made_by)
                known = ((self._common(entry, tokens, read), key) for key, entry in mine)
                length, key = max(known, default=(0, ("", b"")))
                if length < LEAST_TOKENS:
                    self.misses += 1
                    return 0
                entry = self._entries[key]
                if entry.state is None:
                    entry.state = read_file(entry)
                if entry.state is not None:
                    break
                del self._entries[key]  # gone from the disk
            self._entries.move_to_end(key)
            touch(entry.path)
            for layer, state in zip(cache.layers, entry.state, strict=True):
                layer.restore({name: tensor.to(device) for name, tensor in state.items()})
            if length < len(entry.tokens):
                take_back(cache, len(entry.tokens) - length)
            self.hits += 1
            self.reused_tokens += length
            self._shrink()
            return length

    def keep(self, tokens: Tensor, cache: Cache, made_by: str) -> None:
        """Keep the cache of a prompt. What it extends goes, where a part of it serves as well."""
        key = (made_by, tokens.numpy().tobytes())
        with self._lock:
            if key in self._entries:
                return
            state = [layer.state() for layer in cache.layers]
            size = sum(tensor.nbytes for each in state for tensor in each.values())
            if size > self.limit:
                return
            entry = Entry(tokens.clone(), state, all(layer.whole() for layer in cache.layers), size, made_by)
            if entry.croppable:
                for other in [k for k, e in self._entries.items() if e.croppable and _extends(key, k)]:
                    self._forget(other)
            self._entries[key] = entry
            if self._disk is not None and " " not in made_by:
                self._disk.save(entry)
            self._shrink()

    def follow(self, model: PreTrainedModel, kind: str) -> str:
        """What the prefixes of this model, as it is now, are made by, with a cache of this kind. Those of other weights
        that it had are forgotten. The first time, finds what the folder has."""
        now = (kind, _adapters(model), [_identity(p) for p in model.parameters()])
        with self._lock:
            before, made_by = self._models.get(model, (None, ""))
            if before == now:
                return made_by
            for key in [key for key in self._entries if before is not None and key[0] == made_by]:
                del self._entries[key]
            new = _digest((kind, now[1], _weights(model)))
            if new in {taken.split()[0] for _, taken in self._models.values()}:
                new += f" {uuid.uuid4().hex}"  # numbers that the digest has not seen may differ
            self._models[model] = (now, new)
            for entry in self._disk.found(new) if self._disk and " " not in new else ():
                self._entries.setdefault((new, entry.tokens.numpy().tobytes()), entry)
            return new

    def _common(self, entry: Entry, tokens: Tensor, read: int) -> int:
        """How many tokens of an entry serve this prompt, of which the last `read` are read again."""
        length = max(0, min(len(entry.tokens), len(tokens) - read))
        differ = (entry.tokens[:length] != tokens[:length]).nonzero()
        same = int(differ[0]) if len(differ) else length
        return same if entry.croppable or same == len(entry.tokens) else 0

    def _shrink(self) -> None:
        """Keep to the limit, in memory and on the disk."""
        for key, entry in list(self._entries.items()):
            if self.bytes <= self.limit:
                break
            if entry.path is None:
                del self._entries[key]
            else:
                entry.state = None
        if self._disk is not None:
            self._disk.shrink(self.limit)

    def _forget(self, key: Key) -> None:
        remove(self._entries.pop(key).path)

    def _owner(self, view: View) -> dict[str, str]:
        config = {k: v for k, v in view.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
        model = _digest((config, str(dtype_of(view.model)), _weights(view.model)))
        return {"model": model, "tokenizer": self.tokenizer, "name": view.model.name_or_path or view.subject}


@dataclass(frozen=True)
class PrefillWithPrefixes:
    """A `_prefill` that reads what follows the longest known beginning of a prompt. `inner`: what the model had."""

    prefixes: PrefixCache
    converting: Any = field(repr=False)
    inner: Callable[..., Any] | None = field(default=None, repr=False)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: Any,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        prefill = partial(self.inner or type(model)._prefill, model)
        cache = model_kwargs.get(CACHE)
        whole = generation_config.output_attentions or generation_config.output_hidden_states
        given = {name for name, value in model_kwargs.items() if value is not None}
        ours = type(cache) is DynamicCache and bool(cache.layers) and not cache.offloading
        fresh = ours and cache.get_seq_length() == 0
        chunks = generation_config.prefill_chunk_size is not None or self.inner is not None
        plain = fresh and given <= PLAIN and not whole and _plain(model_kwargs, input_ids.shape[1], chunks)
        if not (plain and input_ids.shape[1] > LEAST_TOKENS and bool((input_ids == input_ids[:1]).all())):
            return prefill(input_ids, generation_config, model_kwargs, *rest, **kw)
        tokens = input_ids[0].cpu()
        self.converting.convert(cache)
        made_by = self.prefixes.follow(model, f"{self.converting.options.kind} {self.converting.options.recent}")
        read = model_kwargs.get("logits_to_keep")
        read = read if isinstance(read, int) and read > 0 else 1  # more than 1: a draft is verified with the prompt
        with torch.no_grad():
            known = self.prefixes.restore(tokens, cache, input_ids.device, made_by, read)
            if known and len(input_ids) > 1:
                cache.batch_repeat_interleave(len(input_ids))
        outputs = prefill(input_ids, generation_config, model_kwargs, *rest, **kw)
        if len(input_ids) == 1 and known < len(tokens) - read:
            self.prefixes.keep(tokens, returned_cache(outputs), made_by)
        return outputs


def _made(limit: int, folder: Path | None, tokenizer: str) -> PrefixCache:
    made = PrefixCache(limit, folder)
    made.tokenizer = tokenizer
    return made


def _weights(model: PreTrainedModel) -> str:
    """A digest of some numbers of every weight."""

    def numbers() -> Iterator[bytes]:
        for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
            yield name.encode()
            yield tensor.detach().flatten()[:SAMPLE].cpu().contiguous().view(torch.uint8).numpy().tobytes()

    return hashlib.sha256(b"".join(numbers())).hexdigest()


def _identity(parameter: nn.Parameter) -> tuple[int, int, int]:
    """Another one, or another number, after a change. It holds on to nothing."""
    return id(parameter), parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _adapters(model: PreTrainedModel) -> str:
    """Which adapters are on."""
    modules = (vars(module) for module in model.modules() if "_disable_adapters" in vars(module))
    return str([[own.get(name) for name in ADAPTERS] for own in modules])


def _plain(model_kwargs: dict[str, Any], length: int, chunks: bool) -> bool:
    """Whether no token is hidden, and each is where it is counted. transformers that keep a mask of ones read a prompt
    in chunks from its start, whatever a cache has."""
    mask, places = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is not None and (chunks or not bool((mask == 1).all())):
        return False
    return places is None or bool((places == torch.arange(length, device=places.device)).all())


def _extends(longer: Key, shorter: Key) -> bool:
    return longer[0] == shorter[0] and longer[1].startswith(shorter[1])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
