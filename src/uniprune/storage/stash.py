"""Tensors put aside between blocks, in memory or in mapped files; freed memory given back to the system."""

from __future__ import annotations

import ctypes
import json
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniprune.errors import UniPruneError
from uniprune.storage.files import sync_if_there

M_MMAP_THRESHOLD, LARGE = -3, 32 << 20  # bytes; smaller ones are better kept: activations come and go all the time


Shape = tuple[Any, ...]
"""The name of a type, and sizes."""


class Stash:
    """Tensors put aside: in memory, or in files of a folder that are mapped, so that the system may page them out.

    Beside a file lies another with the tensor's type and shape, for a process that takes up where this one stopped.

    durable: whether it is to outlive a loss of power, once :meth:`sync` has returned; it is written while the process works on.
    """

    def __init__(self, folder: Path | None = None, durable: bool = False) -> None:
        self._folder = folder
        self._disk = ThreadPoolExecutor(1) if folder is not None and durable else None
        self._syncs: list[Future[None]] = []
        self._kept: dict[str, tuple[Shape, Tensor]] = {}

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` that lasts until something else is put under its name; in memory it is the tensor itself."""
        if self._folder is None:
            return tensor.detach()
        shape = (str(tensor.dtype).removeprefix("torch."), *tensor.shape)
        known, kept = self._kept.get(name, (None, tensor))
        if known != shape:
            (self._folder / f"{name}.json").write_text(json.dumps(shape))
            with (self._folder / name).open("wb") as file:
                if hasattr(os, "posix_fallocate") and tensor.nbytes:  # a full disk is an error here, but a crash in a mapping
                    os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            kept = self._map(name, shape)
        kept.copy_(tensor.detach())
        if self._disk is not None:
            new = () if known == shape else (self._folder / f"{name}.json", self._folder)
            self._syncs += [self._disk.submit(sync_if_there, path) for path in (self._folder / name, *new)]
        return kept

    def sync(self) -> None:
        """Returns when what was put aside is on the disk, as it has to be before a commit that goes on from it."""
        for done in self._syncs:
            done.result()
        self._syncs.clear()

    def take(self, name: str) -> Tensor:
        """What an earlier process put under a name."""
        assert self._folder is not None, "nothing outlives a process in its memory"
        path = self._folder / name
        try:
            dtype, *sizes = json.loads(path.with_name(f"{name}.json").read_text())
            complete = path.stat().st_size == math.prod(sizes) * getattr(torch, dtype).itemsize
        except (OSError, ValueError):
            complete = False
        if not complete:
            raise UniPruneError(
                f"{path} is missing or damaged, the run cannot continue; --overwrite without --resume restarts it"
            )
        return self._map(name, (dtype, *sizes))

    def __contains__(self, name: object) -> bool:
        """Whether a file has something under a name, of this process or an earlier one."""
        return self._folder is not None and (self._folder / f"{name}.json").is_file()

    def forget(self, name: str) -> None:
        """Drops what was put under a name, if something was."""
        self._kept.pop(name, None)
        if self._folder is not None:
            (self._folder / f"{name}.json").unlink(missing_ok=True)

    def _map(self, name: str, shape: Shape) -> Tensor:
        assert self._folder is not None
        dtype, *sizes = shape
        flat = torch.from_file(str(self._folder / name), shared=True, size=math.prod(sizes), dtype=getattr(torch, dtype))
        kept: Tensor = flat.view(sizes)
        self._kept[name] = shape, kept
        return kept


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. Between a GPU and the host it goes through pinned memory, which is several times as fast."""
    if tensor.is_cuda and device.type == "cpu":
        return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True) if device.type == "cuda" and tensor.is_pinned() else tensor.to(device)


def give_back_memory() -> None:
    """Returns freed memory to the system, that of large tensors from now on at once (glibc only).

    It would be kept for later, between what is still in use: the memory that is taken then grows from block to block.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is not None and hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.malloc_trim(0)
