"""The states of mirror descent, in memory or on disk; the masks that a step creates from their duals; the best duals so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.models.matrices import Matrices
from uniprune.sparsity import bits
from uniprune.sparsity.patterns import MaskFn, Pattern
from uniprune.storage.runs import Pace
from uniprune.storage.stash import Stash, give_back_memory
from uniprune.storage.tensor_store import Store

# While descending, the threshold of a budget that matrices share is found from a sample of the duals.
SAMPLE_EVERY = 37  # every so many; more in large models, so that there are no more than
SAMPLE_SIZE = 1 << 22  # of all matrices together, about


class State(Protocol):
    """What an update rule keeps of one matrix: an opaque value, but for these members."""

    @property
    def dual(self) -> Tensor:
        """The scores ``[out, in]``, float32, that masks are created from."""
        ...

    def to(self, device: torch.device) -> State: ...

    def rest(self) -> dict[str, Tensor]:
        """All tensors but the dual, to be saved."""
        ...


class UpdateRule(Protocol):
    """An update rule, in pure functions on the state of one matrix (as in optax: ``init`` and ``update``)."""

    def init(self, local: Tensor, output_gradient: Tensor) -> State:
        """The first state. local: scores ``[out, in]``; output_gradient: RMS ``[out]`` of dL/dy."""
        ...

    def step(self, state: Any, gradient: Tensor, size: float) -> State:
        """The state after a step of this size; gradient: of the loss with respect to the mask ``[out, in]``."""
        ...

    def restart(self, state: Any, dual: Tensor) -> State:
        """A state with this dual and no memory of earlier gradients."""
        ...

    def restore(self, dual: Tensor, rest: Mapping[str, Tensor]) -> State:
        """The state that was saved as its dual and :meth:`State.rest`."""
        ...


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
        return self.cut(name, self.dual(name).to(self.device))

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
        self._put(name, bits.pack(self.cut(name, dual)))

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


class InMemory(dict[str, State]):
    """The states of all matrices in memory; saved from time to time, such that saving takes little of the whole time.

    store: where they are saved, and where those of an interrupted run are read. pace: when it is time to save; None: never.
    home: the device that states lie on between steps. packed: whether masks are kept packed. names: of the matrices.
    """

    def __init__(
        self, store: Store, rule: UpdateRule, pace: Pace | None, home: torch.device, packed: bool, names: Iterable[str]
    ) -> None:
        super().__init__()
        self._store = store
        self._saved = OnDisk(store, rule)
        self._pace = pace
        self._home = home
        self.masks: Callable[..., Masks] = partial(PackedMasks, stash=Stash()) if packed else Masks
        if store.facts:
            self.update((name, self._saved[name].to(home)) for name in names)

    def __setitem__(self, name: str, state: State) -> None:
        super().__setitem__(name, state.to(self._home))

    def dual(self, name: str) -> Tensor:
        return self[name].dual

    def keep_dual(self, name: str, key: str) -> None:
        """Saves a copy of the present dual in the store under another key."""
        self._store[key] = {"dual": self.dual(name)}

    def save(self, facts: Mapping[str, Any], last: bool) -> None:
        """Saves states and facts if it is time to (the first process decides); the ``last`` time facts and best duals alone."""
        if last and (self._pace is not None or distributed.count() > 1):  # each process reads the best duals of all of them
            self._saved.save(facts, last)
        elif self._pace is not None and distributed.all_gather(self._pace.due())[0]:
            with self._pace.saving():
                for name, state in self.items():
                    self._saved[name] = state
                self._saved.save(facts, last)


class OnDisk:
    """The states of all matrices on disk, the duals in files of their own: the best duals share them instead of a copy.

    folder: where packed masks lie.
    """

    def __init__(self, store: Store, rule: UpdateRule, folder: Path | None = None) -> None:
        self._store = store
        self._rule = rule
        self.masks: Callable[..., Masks] = partial(PackedMasks, stash=Stash(folder))

    def __getitem__(self, name: str) -> State:
        return self._rule.restore(self.dual(name), self._store[f"rest/{name}"])

    def __setitem__(self, name: str, state: State) -> None:
        self._store[f"dual/{name}"] = {"dual": state.dual}
        self._store[f"rest/{name}"] = state.rest()
        give_back_memory()

    def dual(self, name: str) -> Tensor:
        return self._store.tensor(f"dual/{name}", "dual")

    def keep_dual(self, name: str, key: str) -> None:
        self._store.share(key, f"dual/{name}")

    def save(self, facts: Mapping[str, Any], last: bool) -> None:
        """Commits the states that were set, which are on the disk already, and the facts."""
        self._store.commit(facts)

    def clear(self) -> None:
        """Frees memory, as ``InMemory.clear`` does: there is none to free."""


States = InMemory | OnDisk


class MaskFactory:
    """Creates the masks of all matrices for one step after another.

    The threshold of a budget that matrices share is found from a sample of the duals. Packed masks of a target that needs no
    such threshold are created during the step before, as soon as a dual has moved: then no dual is read for its mask alone.

    owners: the rank that has the state of each matrix. targets: all that :meth:`masks` will be asked for. device: where masks
    are created.
    """

    def __init__(
        self, states: States, matrices: Matrices, owners: Mapping[str, int], targets: Sequence[Pattern], device: torch.device
    ) -> None:
        self._states = states
        self._matrices = matrices
        self._owners = owners
        self._device = device
        self._every = max(SAMPLE_EVERY, sum(matrix.size for matrix in matrices.values()) // SAMPLE_SIZE)
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
            masks = self._create(target)
            if isinstance(masks, PackedMasks):
                self._turn = 1 - self._turn
                masks.label = f"mask-{self._turn}"
                self._next = masks

    def masks(self, target: Pattern) -> Masks:
        """The masks of the present duals."""
        prepared = self._next
        masks = prepared if prepared is not None and prepared.target == target else self._create(target)
        if isinstance(masks, PackedMasks) and distributed.count() > 1:
            masks.share(self._owners)
        return masks

    def _create(self, target: Pattern) -> Masks:
        cut = target.prepare_from_sample({} if target.local else self._gather_samples(target.sample_group))
        return self._states.masks(target, cut, self._states.dual, self._matrices, self._device)

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


class Best(Mapping[str, Tensor]):
    """The duals of the best state so far, on disk: in memory they would take 4 more bytes per weight.

    own: the matrices that this process owns; the duals of the others can be read after the last commit. They are committed
    with the states, so that a resumed descent finds the best duals as of the commit that it resumes from.
    """

    def __init__(self, store: Store, matrices: Matrices, device: torch.device, own: Iterable[str]) -> None:
        self._store = store
        self._matrices = matrices
        self._device = device
        self._own = list(own)

    def keep(self, states: States) -> None:
        """Makes the present duals the best ones."""
        for name in self._own:
            states.keep_dual(name, f"best/{name}")

    def __getitem__(self, name: str) -> Tensor:
        return self._store.tensor(f"best/{name}", "dual").to(self._device)

    def size(self, name: str) -> int:
        return self._matrices[name].size

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)
