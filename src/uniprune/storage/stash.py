"""Tensors put aside between blocks, in memory or in mapped files; freed memory given back to the system."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

from uniprune.errors import UniPruneError

M_MMAP_THRESHOLD, LARGE = -3, 32 << 20  # bytes; smaller ones are better kept: activations come and go all the time


class Stash:
    """Tensors put aside: in memory, or in files of a folder that are mapped, so that the system may page them out."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._kept: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` that lasts until something else is put under its name."""
        if self._folder is None:
            return tensor.detach()
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            with (self._folder / name).open("wb") as file:
                if hasattr(os, "posix_fallocate") and tensor.nbytes:  # a full disk is an error here, but a crash in a mapping
                    os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            kept = self._map(name, tensor)
        return kept.copy_(tensor.detach())

    def take(self, name: str, like: Tensor) -> Tensor:
        """What an earlier process put under a name, a tensor of the shape and type of ``like``."""
        assert self._folder is not None, "nothing outlives a process in its memory"
        path = self._folder / name
        if not path.is_file() or path.stat().st_size != like.nbytes:
            raise UniPruneError(
                f"{path} is missing or damaged, the run cannot continue; --overwrite without --resume restarts it"
            )
        return self._map(name, like)

    def _map(self, name: str, like: Tensor) -> Tensor:
        assert self._folder is not None
        flat = torch.from_file(str(self._folder / name), shared=True, size=like.numel(), dtype=like.dtype)
        self._kept[name] = flat.view(like.shape)
        return self._kept[name]


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
