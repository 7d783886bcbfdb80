"""Memory that is free here: of a GPU, or of the host within the limits of its control groups."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

UNLIMITED = 1 << 60  # bytes; version 1 writes about 2^63 where there is no limit
ROOT = Path("/")


def available_bytes(device: torch.device) -> int | None:
    """Memory that a model could still take: of the device, or of this machine within the limits of its container.
    None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return host_bytes()


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model is; where it would be, if it is on no device yet: on a GPU, if there is one."""
    first = next(model.parameters(), None)
    if first is not None and not first.is_meta:
        return first.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def host_bytes(root: Path = ROOT) -> int | None:
    """Free memory of the host, or what is left of the tightest control group around this process."""
    if sys.platform != "linux":
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None
    found = list(group_bytes(root))
    text = _read(root / "proc/meminfo")
    rows = (line.split() for line in text.splitlines())
    found += [int(row[1]) * 1024 for row in rows if row[:1] == ["MemAvailable:"]]
    return min(found, default=None)


def group_bytes(root: Path = ROOT) -> Iterator[int]:
    """What each control group around this process leaves, of version 2 and 1, from its own group up to the outermost
    one that is mounted. A group counts the page cache as used, of which the inactive part is given up first."""
    groups: dict[str, str] = {}  # by controller; version 2 has one group, with no name of a controller
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, kind = line.partition(" - ")
        inside, mounted = (part.replace(r"\040", " ") for part in fields.split()[3:5])
        system, _, options = kind.split(" ", 2)
        if system == "cgroup2":
            controller, files = "", ("memory.max", "memory.current", "inactive_file")
        elif system == "cgroup" and "memory" in options.split(" ")[-1].split(","):
            controller, files = "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        if controller not in groups:
            continue
        top, path = root / mounted.lstrip("/"), groups[controller]
        below = (
            os.path.relpath(path, inside) if path.startswith(inside) else "."
        )  # else a namespace of its own hides it
        folder = top / below if not below.startswith("..") else top
        if not folder.is_dir():
            folder = top
        for group in (folder, *folder.parents):
            if (left := _left(group, *files)) is not None:
                yield left
            if group == top:
                break


def _left(group: Path, limit_name: str, used_name: str, cache_name: str) -> int | None:
    try:
        limit, used = (int(_read(group / name)) for name in (limit_name, used_name))
    except ValueError:  # no such file, or no limit: "max"
        return None
    if limit >= UNLIMITED:
        return None
    rows = (line.split() for line in _read(group / "memory.stat").splitlines())
    cached = next((int(row[1]) for row in rows if row[0] == cache_name), 0)
    return max(0, limit - used + min(cached, used))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
