"""Where the controller's states lie, how they are saved, the masks that a step creates from them, and the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.controller.prox import relaxed
from uniprune.models.matrices import Matrices
from uniprune.sparsity import bits
from uniprune.sparsity.patterns import Cutter, Pattern
from uniprune.storage.runs import Pace
from uniprune.storage.stash import Stash, give_back_memory
from uniprune.storage.tensor_store import Store

SAMPLE, SAMPLED = 37, 1 << 22  # every 37th dual, or that many in all, tell what a common budget would be while descending


class State(Protocol):
    """What an update rule keeps of one matrix. Of all that is in it, only these are known to anybody else."""

    @property
    def dual(self) -> Tensor:
        """The scores ``[out, in]``, float32, that masks are created from."""
        ...

    @property
    def unit(self) -> float:
        """The size of the scores at the start."""
        ...

    def to(self, device: torch.device) -> State: ...

    def rest(self) -> dict[str, Tensor]:
        """All but the dual, for the disk."""
        ...


class Rule(Protocol):
    """The update rule, which alone knows what is in its states (as in optax: ``init`` and ``update``)."""

    def init(self, local: Tensor, output_gradient: Tensor) -> State: ...

    def step(self, state: Any, gradient: Tensor, size: float, start: Tensor | None = None) -> State: ...

    def restart(self, state: Any, dual: Tensor) -> State: ...

    def restore(self, dual: Tensor, rest: Mapping[str, Tensor]) -> State: ...


@dataclass(eq=False)
class Masks(Mapping[str, Tensor]):
    """The masks of every matrix under one target, created when they are asked for, and kept until the target changes.

    hard: creates those of a matrix. temperature: of relaxed masks, in units of the duals; 0 has hard ones. device: where they
    are wanted.
    """

    target: Pattern
    hard: Cutter
    dual: Callable[[str], Tensor]
    matrices: Matrices
    temperature: float
    device: torch.device
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.temperature and not self.target.local:
            self._kept = dict(relaxed(self.target, {name: self.dual(name) for name in self.matrices}, self.temperature))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept[name] = self._make(name)
        return self._kept[name]

    def _make(self, name: str) -> Tensor:
        dual = self.dual(name).to(self.device)
        if self.temperature:
            return dict(relaxed(self.target, {name: dual}, self.temperature))[name]
        return self.hard(name, dual)

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)


@dataclass(eq=False)
class PackedMasks(Masks):
    """Masks of which those of one block are whole, the others bits in a stash: of the pass backwards, an eighth of a byte each.

    Relaxed ones are no bits: they are created again, unless a budget for the model had all of them created at once.
    label: what masks are called in the stash, where those of two steps may lie side by side.
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
        if not self.temperature:
            self._put(name, bits.pack(mask))
        return mask

    def create(self, name: str, dual: Tensor) -> None:
        """Creates a mask ahead of the passes, from a dual that is at hand."""
        self._put(name, bits.pack(self.hard(name, dual)))

    def share(self, owners: Mapping[str, int]) -> None:
        """Has all processes know all masks: each creates those of its own duals, and is given the others' bits, by block."""
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
    """The states of all matrices in memory, as those of the model in memory are; saved as often as it costs little time.

    store: where they are saved, and where those of an earlier run may lie. pace: how often; None saves nothing. home: the
    device that they lie on between steps. packed: whether masks are kept as bits. names: of the matrices.
    """

    def __init__(
        self, store: Store, rule: Rule, pace: Pace | None, home: torch.device, packed: bool, names: Iterable[str]
    ) -> None:
        super().__init__()
        self._store, self._saved, self._pace, self._home = store, OnDisk(store, rule), pace, home
        self.masks: Callable[..., Masks] = partial(PackedMasks, stash=Stash()) if packed else Masks
        if store.facts:
            self.update((name, self._saved[name].to(home)) for name in names)

    def __setitem__(self, name: str, state: State) -> None:
        super().__setitem__(name, state.to(self._home))

    def dual(self, name: str) -> Tensor:
        return self[name].dual

    def keep_dual(self, name: str, key: str) -> None:
        """Puts a dual as it is now into the store."""
        self._store[key] = {"dual": self.dual(name)}

    def save(self, facts: Mapping[str, Any], last: bool) -> None:
        """Keeps the progress, if it is time to, as the first process has it; with the ``last`` facts, the best duals alone."""
        if last and (self._pace is not None or distributed.count() > 1):  # of several processes, each needs those of all
            self._saved.save(facts, last)
        elif self._pace is not None and distributed.all_gather(self._pace.due())[0]:
            with self._pace.saving():
                for name, state in self.items():
                    self._saved[name] = state
                self._saved.save(facts, last)


class OnDisk:
    """The states of all matrices on disk; duals in files of their own, which the best state shares.

    folder: where masks lie as bits meanwhile.
    """

    def __init__(self, store: Store, rule: Rule, folder: Path | None = None) -> None:
        self._store, self._rule = store, rule
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
        """Keeps the progress: what was set is on the disk already."""
        self._store.commit(facts)

    def clear(self) -> None:
        """Gives memory back, of which these take none."""


States = InMemory | OnDisk


class Cuts:
    """The masks of all matrices under one target after another.

    Budgets that matrices share are settled by samples of the duals. Where masks are kept as bits, those of the next step are
    created as the duals move, so that no dual is read for them again.

    owners: of each matrix, which process has its state. targets: those that there will be. device: where masks are wanted.
    """

    def __init__(
        self, states: States, matrices: Matrices, owners: Mapping[str, int], targets: Sequence[Pattern], device: torch.device
    ) -> None:
        self._states, self._matrices, self._owners, self._device = states, matrices, owners, device
        self._every = max(SAMPLE, sum(matrix.size for matrix in matrices.values()) // SAMPLED)
        grains = {target.grain for target in targets if not target.local}
        self._samples: dict[int, dict[str, Tensor]] = {grain: {} for grain in grains if grain}
        self._coming: PackedMasks | None = None
        self._turn = 0

    def follow(self, name: str, dual: Tensor) -> None:
        """Takes note of a dual that has moved."""
        for grain, samples in self._samples.items():
            samples[name] = self._runs(dual, grain).clone()
        if self._coming is not None:
            self._coming.create(name, dual)

    def ahead(self, target: Pattern | None) -> None:
        """From now on duals move towards a step under this target; None: what comes is not known."""
        self._coming = None
        if target is not None and target.local:
            masks = self._create(target)
            if isinstance(masks, PackedMasks):
                self._turn = 1 - self._turn
                self._coming, masks.label = masks, f"mask-{self._turn}"

    def masks(self, target: Pattern, temperature: float = 0.0) -> Masks:
        """Those of the duals as they are; temperature: of relaxed ones, in units of the duals."""
        masks: Masks
        if self._coming is not None and self._coming.target == target and not temperature:
            masks = self._coming
        else:
            masks = self._create(target, temperature)
        if isinstance(masks, PackedMasks) and distributed.count() > 1:
            masks.share(self._owners)
        return masks

    def _create(self, target: Pattern, temperature: float = 0.0) -> Masks:
        hard = target.settle_by_sample({} if target.local else self._everyones(target.grain))
        if temperature:
            units = [self._states[name].unit for name in self._matrices]
            temperature *= sum(units) / len(units)
        return self._states.masks(target, hard, self._states.dual, self._matrices, temperature, self._device)

    def _everyones(self, grain: int) -> Mapping[str, Tensor]:
        """Samples of all duals, or where none will do the duals, of every process."""
        if distributed.count() == 1:
            return self._samples[grain] if grain else {name: self._states.dual(name) for name in self._matrices}
        found = {}
        for name, owner in self._owners.items():
            if owner == distributed.rank():
                mine = self._samples[grain][name] if grain else self._states.dual(name).to(self._device)
            else:
                mine = self._runs(torch.empty(self._matrices[name].shape, device="meta"), grain)
                mine = torch.empty(mine.shape, device=self._device)
            found[name] = distributed.broadcast(owner, mine)
        return {name: found[name] for name in self._matrices}

    def _runs(self, dual: Tensor, grain: int) -> Tensor:
        """A sample of a dual, of runs of ``grain`` inputs; 0 is all of it."""
        if not grain:
            return dual
        runs = dual.reshape(-1, grain) if dual.shape[1] % grain == 0 else dual
        return runs[:: self._every]


class Best(Mapping[str, Tensor]):
    """The duals of the best state so far, on disk beside the states: in memory they would cost as much again.

    own: the names of those that this process keeps; the others are there after the last commit. They are committed with the
    states, so that a descent that goes on from an earlier commit finds the best of that time.
    """

    def __init__(self, store: Store, matrices: Matrices, device: torch.device, own: Iterable[str]) -> None:
        self._store, self._matrices, self._device, self._own = store, matrices, device, list(own)
        self.value = math.inf

    def keep(self, value: float, states: States) -> None:
        self.value = value
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
