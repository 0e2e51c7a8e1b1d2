"""The masks that a step creates from the duals: when they are asked for, or during the step before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.controller.descent.dual_samples import DualSamples
from uniprune.controller.descent.states import States
from uniprune.models.matrices import Matrices
from uniprune.sparsity import bits
from uniprune.sparsity.patterns.protocol import MaskFn, Pattern
from uniprune.storage.stash import Stash


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

    def update(self, name: str, dual: Tensor) -> None:
        """Is told of a dual that has moved, while it is in memory."""
        self._kept.pop(name, None)

    def share(self, owners: Mapping[str, int]) -> None:
        """Gives all masks to all processes. owners: the rank that has the dual of each matrix; here one has all of them."""


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

    def update(self, name: str, dual: Tensor) -> None:
        """Creates and packs the mask of a dual that has moved, so that none is read for its mask alone."""
        self._put(name, bits.pack(self.cut(name, dual).bool()))

    def share(self, owners: Mapping[str, int]) -> None:
        """Each process creates the masks of its own matrices and broadcasts them, packed, by block."""
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


class MaskFactory:
    """Creates the masks of all matrices for one step after another.

    Those of a target without a budget that matrices share are begun during the step before: each follows its dual.

    owners: the rank that has the state of each matrix. targets: all that masks will be asked for. device: where masks are
    created. stash: where they lie packed; None: they are not packed.
    """

    def __init__(
        self,
        states: States,
        matrices: Matrices,
        owners: Mapping[str, int],
        targets: Sequence[Pattern],
        device: torch.device,
        stash: Stash | None,
    ) -> None:
        self._states, self._matrices, self._owners, self._device, self._stash = states, matrices, owners, device, stash
        self._samples = DualSamples(states, matrices, owners, targets, device)
        self._following: Masks | None = None  # of the next step, if they have been begun
        self._labels = cycle(("mask-0", "mask-1"))  # of following ones: meanwhile the step has those that followed before

    def update(self, name: str, dual: Tensor) -> None:
        """Is told of every dual that is new or has moved."""
        self._samples.update(name, dual)
        if self._following is not None:
            self._following.update(name, dual)

    def start(self, target: Pattern, following: Pattern | None) -> Masks:
        """The masks of a step, which starts now; those of the next one are begun. following: its target, if that is known."""
        masks = self.create(target)
        self._following = None
        if following is not None and following.local:
            self._following = self._begun(following, next(self._labels))
        return masks

    def create(self, target: Pattern) -> Masks:
        """The masks of the present duals."""
        following = self._following
        masks = following if following is not None and following.target == target else self._begun(target, "mask")
        if distributed.count() > 1:
            masks.share(self._owners)
        return masks

    def _begun(self, target: Pattern, label: str) -> Masks:
        """The masks under a target, none of them created yet. label: of packed ones."""
        given = target, self._samples.prepared(target), self._states.dual, self._matrices, self._device
        return Masks(*given) if self._stash is None else PackedMasks(*given, stash=self._stash, label=label)
