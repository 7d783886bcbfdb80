"""Prompts that begin alike read their common beginning once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View, dtype_of

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LEAST_TOKENS = 16  # shorter beginnings are read again rather than looked up
OWNER = "model.json"  # in the folder: which model its prefixes are of
SAMPLE = 16  # numbers of each weight that identify a model
PLAIN = frozenset(  # arguments of a forward under which a prompt is nothing but its tokens
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict")
)

Key = bytes  # the tokens
State = list[dict[str, Tensor]]  # what each layer of a cache holds


@dataclass
class Entry:
    """The cache of one prompt."""

    tokens: Tensor  # int64 [T], on the CPU
    state: State | None  # None: on the disk only
    croppable: bool  # whether a shorter beginning can be used, too
    bytes: int
    path: Path | None = None


class PrefixCache:
    """Caches of prompts, for `KVCache(prefixes=...)`: `generate` takes the longest known beginning of a prompt from
    here and reads the rest; what it has read is kept here.

    `limit`: bytes in memory, and again in `folder`, a number or like "2GiB"; the least recently used goes first. With
    `folder`, prefixes are written as safetensors, and are there for the next process with the same model; patching
    another model with the same folder raises UnsupportedModel, and so does another tokenizer, if `tokenizer` is given.
    Only prompts without padding are kept, one sequence at a time. A model whose weights have changed starts anew.
    """

    def __init__(self, limit: int | str, folder: str | os.PathLike[str] | None = None, tokenizer: Any = None) -> None:
        self.limit = size_in_bytes(limit)
        self.folder = None if folder is None else Path(folder)
        self.tokenizer = "" if tokenizer is None else _digest(sorted(tokenizer.get_vocab().items()))
        self.hits = self.misses = self.reused_tokens = 0
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._weights: tuple[int, ...] | None = None
        self._made_by = ""
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        return self

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
        for entry in self._entries.values():
            if entry.path is not None:
                entry.path.unlink(missing_ok=True)
        self._entries.clear()

    def check(self, view: View) -> None:
        """Raise UnsupportedModel if the folder belongs to another model or tokenizer."""
        if self.folder is None or not (self.folder / OWNER).exists():
            return
        owner, mine = json.loads((self.folder / OWNER).read_text()), self._owner(view)
        for key, value in mine.items():
            if owner.get(key, "") != value and (value or key != "tokenizer"):
                raise UnsupportedModel(
                    f"the prefixes in {self.folder} are of another {key} ({owner.get('name') or 'without a name'})",
                    "give PrefixCache a folder for each model, or delete this one",
                )

    def open(self, view: View) -> None:
        """Take possession of the folder, and learn which prefixes it has."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / OWNER).exists():
            _write(self.folder / OWNER, lambda path: path.write_text(json.dumps(self._owner(view), indent=1)))

    def restore(self, tokens: Tensor, cache: DynamicCache, device: torch.device) -> int:
        """Fill an empty cache on `device` with the longest known beginning of `tokens` [T], all but the last at most.
        Returns how many tokens that are."""
        with self._lock:
            known = ((self._common(entry, tokens), key) for key, entry in self._entries.items())
            length, key = max(known, default=(0, b""))
            if length < LEAST_TOKENS:
                self.misses += 1
                return 0
            entry = self._entries[key]
            if entry.state is None:
                entry.state = self._read(entry)
            if entry.state is None:  # gone from the disk
                del self._entries[key]
                return 0
            self._entries.move_to_end(key)
            if entry.path is not None and entry.path.exists():
                os.utime(entry.path)
            for layer, state in zip(cache.layers, entry.state, strict=True):
                layer.restore({name: tensor.to(device) for name, tensor in state.items()})
            if length < len(entry.tokens):
                cache.crop(length - len(entry.tokens))
            self.hits += 1
            self.reused_tokens += length
            self._shrink()
            return length

    def keep(self, tokens: Tensor, cache: Cache) -> None:
        """Keep the cache of a prompt. What it extends goes, where a part of it serves as well."""
        key = tokens.numpy().tobytes()
        with self._lock:
            if key in self._entries:
                return
            state = [layer.state() for layer in cache.layers]
            size = sum(tensor.nbytes for each in state for tensor in each.values())
            if size > self.limit:
                return
            entry = Entry(tokens.clone(), state, all(layer.whole() for layer in cache.layers), size)
            if entry.croppable:
                for other in [k for k, e in self._entries.items() if e.croppable and key.startswith(k)]:
                    self._forget(other)
            self._entries[key] = entry
            if self.folder is not None:
                self._save(entry)
            self._shrink()

    def follow(self, model: PreTrainedModel) -> None:
        """Start anew if the weights have changed since the last prompt, and find what the folder has for these."""
        versions = tuple(p._version for p in model.parameters() if not p.is_inference())
        if versions == self._weights:
            return
        if self._weights is not None:
            with self._lock:
                self._entries.clear()
        self._weights, self._made_by = versions, _weights(model)
        for path in sorted(self.folder.glob("*.safetensors"), key=_age) if self.folder else ():
            entry = self._index(path)
            if entry is not None:
                self._entries.setdefault(entry.tokens.numpy().tobytes(), entry)

    def _common(self, entry: Entry, tokens: Tensor) -> int:
        """How many tokens of an entry serve this prompt."""
        length = min(len(entry.tokens), len(tokens) - 1)
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
        files = sorted(self.folder.glob("*.safetensors"), key=_age) if self.folder else []
        used = sum(path.stat().st_size for path in files)
        for path in files:
            if used <= self.limit:
                break
            used -= path.stat().st_size
            path.unlink(missing_ok=True)

    def _forget(self, key: Key) -> None:
        entry = self._entries.pop(key)
        if entry.path is not None:
            entry.path.unlink(missing_ok=True)

    def _owner(self, view: View) -> dict[str, str]:
        config = {k: v for k, v in view.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
        model = _digest((config, str(dtype_of(view.model)), _weights(view.model)))
        return {"model": model, "tokenizer": self.tokenizer, "name": view.model.name_or_path or view.subject}

    def _save(self, entry: Entry) -> None:
        assert self.folder is not None and entry.state is not None
        tensors = {f"{i}.{name}": t.contiguous() for i, each in enumerate(entry.state) for name, t in each.items()}
        facts = {"made_by": self._made_by, "croppable": str(entry.croppable), "layers": str(len(entry.state))}
        name = hashlib.sha256(entry.tokens.numpy().tobytes() + self._made_by.encode()).hexdigest()[:32]
        entry.path = self.folder / f"{name}.safetensors"
        _write(entry.path, lambda path: save_file({**tensors, "tokens": entry.tokens}, path, facts))

    def _index(self, path: Path) -> Entry | None:
        """What a file holds, without reading it; None if it is of other weights, or is none of ours."""
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                if facts.get("made_by") != self._made_by:
                    return None
                return Entry(file.get_tensor("tokens"), None, facts["croppable"] == "True", path.stat().st_size, path)
        except (OSError, SafetensorError, KeyError):
            return None

    def _read(self, entry: Entry) -> State | None:
        try:
            with safe_open(entry.path, "pt") as file:
                state: State = [{} for _ in range(int(file.metadata()["layers"]))]
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    layer, _, what = name.partition(".")
                    if what:
                        state[int(layer)][what] = file.get_tensor(name)
                return state
        except (OSError, SafetensorError):
            return None


@dataclass(frozen=True)
class PrefillWithPrefixes:
    """A `_prefill` that reads what follows the longest known beginning of a prompt. `inner`: what the model had."""

    prefixes: PrefixCache
    converting: Any = field(repr=False)
    inner: MethodType | None = field(default=None, repr=False)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: Any,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        prefill = self.inner or MethodType(type(model)._prefill, model)
        cache = model_kwargs.get("past_key_values")
        whole = generation_config.output_attentions or generation_config.output_hidden_states
        given = {name for name, value in model_kwargs.items() if value is not None}
        ours = type(cache) is DynamicCache and bool(cache.layers) and not cache.offloading
        fresh = ours and cache.get_seq_length() == 0
        plain = model_kwargs.get("attention_mask") is None and given <= PLAIN and not whole
        if not (fresh and plain and input_ids.shape[1] > LEAST_TOKENS and bool((input_ids == input_ids[:1]).all())):
            return prefill(input_ids, generation_config, model_kwargs, *rest, **kw)
        tokens = input_ids[0].cpu()
        self.converting.convert(cache)
        self.prefixes.follow(model)
        with torch.no_grad():
            if self.prefixes.restore(tokens, cache, input_ids.device) and len(input_ids) > 1:
                cache.batch_repeat_interleave(len(input_ids))
        outputs = prefill(input_ids, generation_config, model_kwargs, *rest, **kw)
        if len(input_ids) == 1:
            self.prefixes.keep(tokens, outputs.past_key_values)
        return outputs


def size_in_bytes(size: int | str) -> int:
    """2147483648 or "2GiB" as bytes. Raises ValueError."""
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?[iI]?[bB]?)\s*", size)
        if found is None or found[2].upper() not in UNITS:
            raise ValueError(f"a size of {size!r}; give a number of bytes, or a text such as '2GiB' or '500MB'")
        size = int(float(found[1]) * UNITS[found[2].upper()])
    if size <= 0:
        raise ValueError(f"a size of {size} bytes; give a positive one")
    return size


def _weights(model: PreTrainedModel) -> str:
    """A digest of some numbers of every weight."""

    def numbers() -> Iterator[bytes]:
        for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
            yield name.encode()
            yield tensor.detach().flatten()[:SAMPLE].cpu().contiguous().view(torch.uint8).numpy().tobytes()

    return hashlib.sha256(b"".join(numbers())).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _write(path: Path, write: Any) -> None:
    """Under another name first: others may read the folder."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        write(whole)
        os.replace(whole, path)
