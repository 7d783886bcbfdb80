"""The checkpoints of a run: safetensors files, each written under another name first, so that a kill at any moment
leaves whole ones only."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_accel_patch.errors import HfAccelError
from hf_accel_patch.logs import get_logger

logger = get_logger(__name__)
KEPT = 2
FILES = "uptrain-????????.safetensors"
HINT = "give another folder, or delete this one to start anew"


@dataclass(frozen=True)
class Saved:
    """One checkpoint: tensors by name on the CPU, and the facts beside them, plain data."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """The folder of one run; `run` is what must be the same for it to go on. What is not of ours is left alone."""

    path: Path
    run: dict[str, Any]

    def latest(self) -> Saved | None:
        """The newest checkpoint that can be read; None where there is none.

        Raises HfAccelError for those of another run, and where none of them can be read.
        """
        files = self._files()
        for file in reversed(files):
            saved = _read(file)
            if saved is None:
                logger.warning(f"{file} is damaged; the checkpoint before it is taken")
                continue
            theirs = saved.facts["run"]
            differs = [key for key in self.run if theirs.get(key) != self.run[key]]
            if differs:
                found = ", ".join(f"{key} {_short(theirs.get(key))}" for key in differs)
                mine = ", ".join(f"{key} {_short(self.run[key])}" for key in differs)
                raise HfAccelError(f"the checkpoints in {self.path} are of another run: {found}, not {mine}", HINT)
            return saved
        if files:
            raise HfAccelError(f"the checkpoints in {self.path} are damaged", HINT)
        return None

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write one, and delete those older than the last two. `facts` has the number of whole steps, "step"."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"uptrain-{facts['step']:08d}.safetensors"
        part = path.with_suffix(".part")
        described = {"facts": json.dumps(facts | {"run": self.run})}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, described)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        for old in self._files()[:-KEPT]:
            with suppress(OSError):
                old.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.path.glob(FILES))


def clear(path: Path) -> None:
    """Delete the checkpoints in a folder, and the folder if nothing else is in it."""
    for file in path.glob(FILES):
        file.unlink()
    with suppress(OSError):
        path.rmdir()


def _read(path: Path) -> Saved | None:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return Saved({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
