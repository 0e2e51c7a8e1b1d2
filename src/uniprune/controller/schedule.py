"""What the steps of a controller are made on: how many windows each, and which target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.errors import InputError
from uniprune.sparsity.patterns.protocol import Pattern


def step_windows(tokens: int, length: int) -> int:
    """How many windows of ``length`` a step of so many tokens has: as many as fit, at least one for each process."""
    return max(distributed.count(), tokens // length)


def in_steps(windows: Tensor, tokens: int) -> list[Tensor]:
    """The windows ``[n, length]`` split into steps of :func:`step_windows` each. The last step has the remainder; where that is
    fewer windows than processes, it is added to the step before."""
    processes = distributed.count()
    todo = list(torch.split(windows, step_windows(tokens, windows.shape[1])))
    if len(todo[-1]) < processes:
        todo[-2:] = [torch.cat(todo[-2:])]
    return todo


def shuffled_rounds(targets: Sequence[Pattern], seed: int) -> Iterator[Pattern]:
    """The targets without end: all of them in random order, then all in another order, and so on.

    Raises InputError if there are none.
    """
    if not targets:
        raise InputError("a controller needs a target: give a sparsity")
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (targets[index] for index in torch.randperm(len(targets), generator=generator).tolist())
