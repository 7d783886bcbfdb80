"""Prefixes on the disk: one safetensors file for the cache of a prompt, and a note of which model they are."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.logs import get_logger

logger = get_logger(__name__)
OWNER = "model.json"  # which model the prefixes are of
FILES = f"prefix-{'?' * 32}.safetensors"  # others may keep weights in such files

State = list[dict[str, Tensor]]  # what each layer of a cache holds


@dataclass
class Entry:
    """The cache of one prompt."""

    tokens: Tensor  # int64 [T], on the CPU
    state: State | None  # None: on the disk only
    croppable: bool  # whether a shorter beginning can be used, too
    bytes: int
    made_by: str  # weights and options
    path: Path | None = None


@dataclass(frozen=True)
class PrefixFolder:
    """A folder of prefixes, which processes share: any file may be gone at any time, and is written under another name
    first. What is not of ours is left alone."""

    path: Path

    def check(self, mine: dict[str, str]) -> None:
        """Raise UnsupportedModel if it belongs to another model or tokenizer than `mine` says."""
        if not (self.path / OWNER).exists():
            return
        try:
            owner = dict(json.loads((self.path / OWNER).read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise UnsupportedModel(
                f"{self.path / OWNER} does not say of which model its prefixes are: {error}",
                "give PrefixCache a folder of its own",
            ) from error
        for key in ("model", "tokenizer"):
            if owner.get(key, "") != mine[key] and (mine[key] or key != "tokenizer"):
                raise UnsupportedModel(
                    f"the prefixes in {self.path} are of another {key} ({owner.get('name') or 'without a name'})",
                    "give PrefixCache a folder for each model, or delete this one",
                )

    def claim(self, mine: dict[str, str]) -> None:
        """Note whose it is, where nothing says so."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / OWNER).exists():
            _write(self.path / OWNER, lambda path: path.write_text(json.dumps(mine, indent=1)))

    def files(self) -> list[Path]:
        """The least recently used first."""
        return sorted(self.path.glob(FILES), key=lambda path: _status(path, "st_mtime"))

    def save(self, entry: Entry) -> None:
        """Write an entry; a disk that cannot take it is no reason to stop."""
        assert entry.state is not None
        tensors = {f"{i}.{name}": t.contiguous() for i, each in enumerate(entry.state) for name, t in each.items()}
        facts = {"made_by": entry.made_by, "croppable": str(entry.croppable), "layers": str(len(entry.state))}
        name = hashlib.sha256(entry.tokens.numpy().tobytes() + entry.made_by.encode()).hexdigest()[:32]
        path = self.path / f"prefix-{name}.safetensors"
        try:
            _write(path, lambda path: save_file({**tensors, "tokens": entry.tokens}, path, facts))
            entry.path = path
        except (OSError, SafetensorError) as error:
            logger.warning_once(f"prefixes are kept in memory only: {error}")

    def found(self, made_by: str) -> list[Entry]:
        """What there is of these weights and options, without reading it."""
        return [entry for path in self.files() if (entry := _index(path, made_by)) is not None]

    def shrink(self, limit: int) -> None:
        """Keep to so many bytes."""
        sizes = [(path, int(_status(path, "st_size"))) for path in self.files()]
        used = sum(size for _, size in sizes)
        for path, size in sizes:
            if used <= limit:
                break
            used -= size
            remove(path)


def read(entry: Entry) -> State | None:
    """What the file of an entry holds; None if it is gone or damaged."""
    try:
        with safe_open(entry.path, "pt") as file:
            state: State = [{} for _ in range(int((file.metadata() or {})["layers"]))]
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                layer, _, what = name.partition(".")
                if what:
                    state[int(layer)][what] = file.get_tensor(name)
            return state
    except (OSError, SafetensorError, KeyError, ValueError, IndexError):
        return None


def remove(path: Path | None) -> None:
    """Delete a file, if it is there."""
    if path is not None:
        with suppress(OSError):
            path.unlink()


def touch(path: Path | None) -> None:
    """Note that a file was used."""
    if path is not None:
        with suppress(OSError):
            os.utime(path)


def _index(path: Path, made_by: str) -> Entry | None:
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("made_by") != made_by:
                return None
            croppable, size = facts["croppable"] == "True", path.stat().st_size
            return Entry(file.get_tensor("tokens"), None, croppable, size, made_by, path)
    except (OSError, SafetensorError, KeyError):
        return None


def _status(path: Path, what: str) -> float:
    try:
        return float(getattr(path.stat(), what))
    except OSError:
        return 0.0


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        write(whole)
        os.replace(whole, path)
