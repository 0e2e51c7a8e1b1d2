"""Samples of the duals, from which the threshold of a budget that matrices share is found while they move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.controller.descent.states import States
from uniprune.models.matrices import Matrices
from uniprune.sparsity.patterns.protocol import MaskFn, Pattern

SAMPLE_EVERY = 37  # one of so many duals is taken; of fewer in small models and of more in large ones, so that there are
LEAST, MOST = 1 << 20, 1 << 22  # at least, or all, and at most so many of all matrices together, about


def sample_stride(matrices: Matrices) -> int:
    """Every how many scores of a matrix, row after row, one is taken.

    It has no factor in common with the length of any row: of 4,096 channels, a stride of 1,536 would see eight.
    """
    total, lengths = sum(matrix.size for matrix in matrices.values()), {matrix.shape[1] for matrix in matrices.values()}
    least = max(1, min(SAMPLE_EVERY, total // LEAST), total // MOST)
    return next(stride for stride in count(least) if all(math.gcd(stride, length) == 1 for length in lengths))


class DualSamples:
    """Samples of the duals of this process's matrices; what is asked of them is asked of all processes' together.

    owners: the rank that has the state of each matrix. targets: all that :meth:`prepared` will be asked for. device: where
    samples of other processes come to.
    """

    def __init__(
        self, states: States, matrices: Matrices, owners: Mapping[str, int], targets: Sequence[Pattern], device: torch.device
    ) -> None:
        self._states, self._matrices, self._owners, self._device = states, matrices, owners, device
        self._every = sample_stride(matrices)
        grains = {target.sample_group for target in targets if not target.local}
        self._samples: dict[int, dict[str, Tensor]] = {grain: {} for grain in grains if grain}

    def update(self, name: str, dual: Tensor) -> None:
        """Is told of every dual that is new or has moved."""
        for grain, samples in self._samples.items():
            samples[name] = self._sample(dual, grain).clone()

    def prepared(self, target: Pattern) -> MaskFn:
        """What creates masks under a target, with the thresholds of the present duals if it has any that matrices share."""
        return target.prepare_from_sample({} if target.local else self._gathered(target.sample_group))

    def _gathered(self, grain: int) -> Mapping[str, Tensor]:
        """The samples of all duals, or the duals themselves if ``grain`` is 0, from all processes."""
        if distributed.count() == 1:
            return self._samples[grain] if grain else {name: self._states.dual(name) for name in self._matrices}
        gathered = {}
        for name, owner in self._owners.items():
            if owner == distributed.rank():
                mine = self._samples[grain][name] if grain else self._states.dual(name).to(self._device)
            else:
                mine = self._sample(torch.empty(self._matrices[name].shape, device="meta"), grain)
                mine = torch.empty(mine.shape, device=self._device)
            gathered[name] = distributed.broadcast(owner, mine)
        return {name: gathered[name] for name in self._matrices}

    def _sample(self, dual: Tensor, grain: int) -> Tensor:
        """A sample of a dual that consists of whole runs of ``grain`` inputs; all of it if ``grain`` is 0."""
        if not grain:
            return dual
        grains = dual.reshape(-1, grain) if dual.shape[1] % grain == 0 else dual
        return grains[:: self._every]
