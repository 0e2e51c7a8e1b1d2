"""The memory that a process may take here: of the machine, of its GPU, and of the container or batch job that it is in."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

GROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # on Linux: this process's control groups; all of them
LIMITS = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}  # cgroup v2, v1


def free_memory(device: torch.device) -> int:
    """Bytes that a process may take on a device. ``torchrun``'s processes share the memory of their machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped]

    free = min(int(psutil.virtual_memory().available), left_by_groups())
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def left_by_groups() -> float:
    """Bytes that this process's control groups leave it: a container, or the job of a batch system, may have less than the
    machine, and whoever takes more is killed. Infinity where there is no limit."""
    try:
        groups = [line.split(":", 2) for line in GROUPS.read_text().splitlines()]
    except OSError:  # no Linux
        return math.inf
    left = math.inf
    for _, kinds, path in groups:
        kind = "memory" if "memory" in kinds.split(",") else kinds
        if kind in LIMITS:
            root = MOUNTED / kind
            place = root / path.lstrip("/")  # inside a container it may not be there, but the root is then the container's
            inside = [folder for folder in (place, *place.parents) if folder.is_relative_to(root)]
            left = min(left, *(_left(folder, *LIMITS[kind]) for folder in inside))
    return left


def _left(group: Path, limit: str, taken: str) -> float:
    """Of one control group; what it holds of files is dropped where there is need of room."""
    try:
        most, held = (group / limit).read_text().strip(), int((group / taken).read_text())
    except (OSError, ValueError):
        return math.inf
    return math.inf if most == "max" else max(0, int(most) - held + _files(group / "memory.stat"))


def _files(stat: Path) -> int:
    try:
        facts = dict(line.split() for line in stat.read_text().splitlines())
        return sum(int(facts.get(f"total_{name}", facts.get(name, 0))) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return 0
