"""Several processes, one pruning run: each takes its share of the windows, and sums are taken over all of them.

The processes are ``torchrun``'s and talk through ``torch.distributed``; without it there is one, and all of this is free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from uniprune.errors import InputError

PATIENCE = timedelta(hours=12)  # others wait while the first process writes a large checkpoint


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the other processes if ``torchrun`` started this one: NCCL on CUDA, gloo elsewhere."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """How many processes share the run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 writes."""
    return distributed.get_rank() if count() > 1 else 0


def local_rank() -> int:
    """Which of this machine's processes this one is: the number of its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", 0))


def share(windows: Tensor) -> Tensor:
    """This process's windows of ``[n, length]``. Raises InputError if there are fewer windows than processes."""
    if len(windows) < count():
        raise InputError(f"{len(windows)} samples cannot be split over {count()} processes; use fewer, or more samples a step")
    return windows[rank() :: count()]


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if count() > 1:
        distributed.all_reduce(tensor)
    return tensor


def total_of(value: float) -> float:
    """The sum of a number over all processes."""
    if count() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else None
    return float(total(torch.tensor(value, dtype=torch.float64, device=device)))


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        distributed.barrier()
