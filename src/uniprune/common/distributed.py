"""Several processes, one pruning run: each takes its share of the windows, and sums are taken over all of them.

The processes are ``torchrun``'s and talk through ``torch.distributed``; without it there is one, and all of this is free.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from uniprune.errors import InputError, UniPruneError

Object = TypeVar("Object")

SUMMING = timedelta(minutes=30)  # timeout of a sum: by how much processes may be apart when they have computed their shares
WAITING = timedelta(hours=12)  # timeout of a barrier: the first process may be writing a large checkpoint
_waiting: distributed.ProcessGroup | None = None  # the group for barriers and objects; None: the default one


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the other processes if ``torchrun`` started this one: NCCL on CUDA, gloo elsewhere; or those that the caller has.

    After an error the group is not destroyed: with NCCL that would wait for the other processes, which wait for this one. The
    error ends this process instead, and ``torchrun`` then ends the others.
    """
    global _waiting
    if distributed.is_available() and distributed.is_initialized():  # by the caller, whose timeouts may be short
        _waiting = distributed.new_group(backend="gloo", timeout=WAITING)
        try:
            yield
        finally:  # the caller may go on after an error; gloo waits for nobody
            distributed.destroy_process_group(_waiting)
            _waiting = None
        return
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", timeout=SUMMING, device_id=device)
        _waiting = distributed.new_group(backend="gloo", timeout=WAITING)
    else:
        distributed.init_process_group("gloo", timeout=WAITING)  # it sees at once when another process has ended
    yield
    _waiting = None
    distributed.destroy_process_group()


def count() -> int:
    """How many processes share the run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def started() -> int:
    """How many processes will share the run, before they have :func:`joined`."""
    return max(count(), int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1)


def rank() -> int:
    """This process's number among them; 0 writes the output."""
    return distributed.get_rank() if count() > 1 else 0


def local_rank() -> int:
    """This process's number among those of this machine, which is also that of its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", 0))


def share(windows: Tensor) -> Tensor:
    """This process's share of the windows ``[n, length]``. Raises InputError if there are fewer windows than processes."""
    check_windows(len(windows))
    return windows[rank() :: count()]


def check_windows(found: int, held_out: int = 0) -> None:
    """Raises InputError if the windows found, without those held out, leave a process without one."""
    if found - held_out < count():
        others = f", with {held_out} held out," if held_out else ""
        if count() == 1:
            raise InputError(f"{found} calibration samples{others} leave none; give more samples (--num-samples)")
        raise InputError(
            f"{found} calibration samples{others} cannot be split over {count()} processes; start fewer, or give more samples "
            "(--num-samples)"
        )


def total(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place (all-reduce); returns it."""
    if count() > 1:
        with _others():
            distributed.all_reduce(tensor)
    return tensor


def owners(sizes: Mapping[str, int]) -> dict[str, int]:
    """The rank that owns each name, such that all ranks own about as much: the largest first, each to the rank with least."""
    taken, found = [0] * count(), dict[str, int]()
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        found[name] = taken.index(min(taken))
        taken[found[name]] += sizes[name]
    return found


def reduce_to(owner: int, tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place, on the rank ``owner`` only; on the other ranks it is undefined afterwards."""
    if count() > 1:
        with _others():
            distributed.reduce(tensor, owner)
    return tensor


def broadcast(owner: int, tensor: Tensor) -> Tensor:
    """Copies the tensor of the rank ``owner`` into those of all other ranks, in place; returns it."""
    if count() > 1:
        with _others():
            distributed.broadcast(tensor, owner)
    return tensor


def all_gather(value: Object) -> list[Object]:
    """The picklable objects of all processes, in the order of their ranks."""
    found: list[Any] = [value] * count()
    if count() > 1:
        with _others():
            distributed.all_gather_object(found, value, group=_waiting)
    return found


def of_first(decide: Callable[[], Object]) -> Object:
    """What the first process decides, in all processes."""
    return all_gather(None if rank() else decide())[0]  # type: ignore[return-value]


def check_alike(facts: Mapping[str, Any]) -> None:
    """Raises InputError, in every process, unless all have the same facts: else they wait for each other, or mix their work."""
    first, *others = all_gather(facts)
    for number, other in enumerate(others, 1):
        for name in {**first, **other}:
            there, here = first.get(name), other.get(name)
            if there != here:
                raise InputError(
                    f"process {number} has another {name} than process 0 ({here!r:.60} and {there!r:.60}); start all with the "
                    "same command, and the same files on each machine"
                )


def total_of(value: float) -> float:
    """The sum of a number over all processes."""
    if count() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else None
    return float(total(torch.tensor(value, dtype=torch.float64, device=device)))


def barrier() -> None:
    """Waits until all processes have come to this call."""
    if count() > 1:
        with _others():
            distributed.barrier(group=_waiting)


@contextmanager
def _others() -> Iterator[None]:
    """Turns the error of a collective operation into a UniPruneError that says so: another process has ended."""
    try:
        yield
    except (torch.OutOfMemoryError, NotImplementedError):  # of this process
        raise
    except RuntimeError as error:
        reason = str(error).split(". ")[0]
        raise UniPruneError(
            f"another process has ended; its own message says why ({reason}); what was complete is kept, and --resume "
            "continues it"
        ) from error
