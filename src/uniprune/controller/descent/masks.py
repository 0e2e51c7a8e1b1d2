"""The masks that a step creates from the duals: when they are asked for, or during the step before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.controller.descent.states import States
from uniprune.models.matrices import Matrices
from uniprune.sparsity import bits
from uniprune.sparsity.patterns.protocol import MaskFn, Pattern
from uniprune.storage.stash import Stash

# While descending, the threshold of a budget that matrices share is found from a sample of the duals.
SAMPLE_EVERY = 37  # every so many; more in large models, so that there are no more than
SAMPLE_SIZE = 1 << 22  # of all matrices together, about


@dataclass(eq=False)
class Masks(Mapping[str, Tensor]):
    """The masks of all matrices under one target, each created when it is first asked for.

    cut: creates the mask of a matrix from its dual. dual: gives the dual of a name. device: that masks are created on.
    """

    target: Pattern
    cut: MaskFn
    dual: Callable[[str], Tensor]
    matrices: Matrices
    device: torch.device
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept[name] = self._make(name)
        return self._kept[name]

    def __contains__(self, name: object) -> bool:
        return name in self.matrices  # what a Mapping does instead makes the mask, and takes a KeyError there for a no

    def _make(self, name: str) -> Tensor:
        return self.cut(name, self.dual(name).to(self.device)).bool()  # a user's pattern may make masks of numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)


@dataclass(eq=False)
class PackedMasks(Masks):
    """Masks that take one bit per weight: only those of one block are unpacked at a time, all lie packed in a stash.

    label: prefix of the names in the stash, where the masks of two steps may lie side by side.
    """

    stash: Stash = field(kw_only=True)
    label: str = field(default="mask", kw_only=True)
    _packed: dict[str, Tensor] = field(default_factory=dict, init=False)

    def _make(self, name: str) -> Tensor:
        matrix = self.matrices[name]
        if any(self.matrices[other].block != matrix.block for other in self._kept):
            self._kept.clear()
        if name in self._packed:
            return bits.unpack(self._packed[name].to(self.device), matrix.shape)
        mask = super()._make(name)
        self._put(name, bits.pack(mask))
        return mask

    def create(self, name: str, dual: Tensor) -> None:
        """Creates and packs a mask before it is asked for, while its dual is in memory."""
        self._put(name, bits.pack(self.cut(name, dual).bool()))

    def share(self, owners: Mapping[str, int]) -> None:
        """Gives all masks to all processes: each creates those of its own matrices and broadcasts them, packed, by block."""
        blocks: dict[int, dict[int, list[str]]] = {}
        for name, owner in owners.items():
            blocks.setdefault(self.matrices[name].block, {}).setdefault(owner, []).append(name)
        for by_owner in blocks.values():
            for owner, names in by_owner.items():
                sizes = [-(-self.matrices[name].size // 8) for name in names]
                if owner == distributed.rank():
                    together = torch.cat([self._bits(name) for name in names])
                else:
                    together = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
                for name, packed in zip(names, torch.split(distributed.broadcast(owner, together), sizes), strict=True):
                    self._put(name, packed)

    def _bits(self, name: str) -> Tensor:
        if name in self._packed:
            return self._packed[name].to(self.device)
        return bits.pack(super()._make(name))

    def _put(self, name: str, packed: Tensor) -> None:
        self._kept.pop(name, None)
        self._packed[name] = self.stash.put(f"{self.label}-{name}", packed)


def sample_stride(matrices: Matrices) -> int:
    """Every how many scores of a matrix, row after row, one is taken.

    It has no factor in common with the length of any row: of 4,096 channels, a stride of 1,536 would see eight.
    """
    least = max(SAMPLE_EVERY, sum(matrix.size for matrix in matrices.values()) // SAMPLE_SIZE)
    lengths = {matrix.shape[1] for matrix in matrices.values()}
    return next(stride for stride in count(least) if all(math.gcd(stride, length) == 1 for length in lengths))


class MaskFactory:
    """Creates the masks of all matrices for one step after another.

    The threshold of a budget that matrices share is found from a sample of the duals. Packed masks of a target that needs no
    such threshold are created during the step before, as soon as a dual has moved: then no dual is read for its mask alone.

    owners: the rank that has the state of each matrix. targets: all that :meth:`create` will be asked for. device: where masks
    are created. new: makes the masks of a step: :class:`Masks`, or :class:`PackedMasks` with a stash.
    """

    def __init__(
        self,
        states: States,
        matrices: Matrices,
        owners: Mapping[str, int],
        targets: Sequence[Pattern],
        device: torch.device,
        new: Callable[..., Masks],
    ) -> None:
        self._states = states
        self._matrices = matrices
        self._owners = owners
        self._device = device
        self._new = new
        self._every = sample_stride(matrices)
        grains = {target.sample_group for target in targets if not target.local}
        self._samples: dict[int, dict[str, Tensor]] = {grain: {} for grain in grains if grain}
        self._next: PackedMasks | None = None
        self._turn = 0

    def update(self, name: str, dual: Tensor) -> None:
        """Is told of every dual that is new or has moved."""
        for grain, samples in self._samples.items():
            samples[name] = self._sample(dual, grain).clone()
        if self._next is not None:
            self._next.create(name, dual)

    def prepare_next(self, target: Pattern | None) -> None:
        """Says the target of the next step, so that :meth:`update` can create its masks; None: it is not known."""
        self._next = None
        if target is not None and target.local:
            masks = self._made_for(target)
            if isinstance(masks, PackedMasks):
                self._turn = 1 - self._turn
                masks.label = f"mask-{self._turn}"
                self._next = masks

    def create(self, target: Pattern) -> Masks:
        """The masks of the present duals."""
        prepared = self._next
        masks = prepared if prepared is not None and prepared.target == target else self._made_for(target)
        if isinstance(masks, PackedMasks) and distributed.count() > 1:
            masks.share(self._owners)
        return masks

    def _made_for(self, target: Pattern) -> Masks:
        cut = target.prepare_from_sample({} if target.local else self._gather_samples(target.sample_group))
        return self._new(target, cut, self._states.dual, self._matrices, self._device)

    def _gather_samples(self, grain: int) -> Mapping[str, Tensor]:
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
