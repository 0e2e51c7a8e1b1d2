"""Where the controller's states lie, how they are saved, the masks that a step creates from them, and the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from uniprune.controller.prox import relaxed
from uniprune.models.matrices import Matrices
from uniprune.sparsity.patterns import Cutter, Pattern
from uniprune.storage.runs import Pace
from uniprune.storage.stash import give_back_memory
from uniprune.storage.tensor_store import Store


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


class Masks(Mapping[str, Tensor]):
    """The masks of every matrix under one target, created when they are asked for.

    hard: creates those of a matrix, or of some of its rows. temperature: of relaxed masks, in units of the duals; 0 has hard
    ones.
    """

    def __init__(
        self, target: Pattern, hard: Cutter, dual: Callable[[str], Tensor], matrices: Matrices, temperature: float
    ) -> None:
        self._target, self.hard, self._dual, self._matrices = target, hard, dual, matrices
        self._temperature = temperature
        self._kept: dict[str, Tensor] = {}
        if temperature and not target.local:
            self._kept = dict(relaxed(target, {name: dual(name) for name in matrices}, temperature))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            self._make_room(name)
            dual = self._dual(name).to(self._matrices[name].device)
            self._kept[name] = (
                dict(relaxed(self._target, {name: dual}, self._temperature))[name]
                if self._temperature
                else self.hard(name, dual)
            )
        return self._kept[name]

    def _make_room(self, name: str) -> None:
        """Masks are kept until the target changes."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


class MasksOfABlock(Masks):
    """Masks of which those of one block are kept."""

    def _make_room(self, name: str) -> None:
        block = self._matrices[name].block
        if any(self._matrices[other].block != block for other in self._kept):
            self._kept.clear()


class InMemory(dict[str, State]):
    """The states of all matrices in memory, as those of the model in memory are; saved as often as it costs little time.

    store: where they are saved, and where those of an earlier run may lie. pace: how often; None saves nothing.
    """

    masks = Masks

    def __init__(self, store: Store, rule: Rule, pace: Pace | None, device: torch.device) -> None:
        super().__init__()
        self._store, self._saved, self._pace = store, OnDisk(store, rule), pace
        if store.facts:
            self.update((name, self._saved[name].to(device)) for name in self._saved.names())

    def dual(self, name: str) -> Tensor:
        return self[name].dual

    def keep_dual(self, name: str, key: str) -> None:
        """Puts a dual as it is now into the store."""
        self._store[key] = {"dual": self.dual(name)}

    def save(self, facts: Mapping[str, Any], last: bool) -> None:
        """Keeps the progress, if it is time to or these are the ``last`` facts."""
        if self._pace is not None and (last or self._pace.due()):
            with self._pace.saving():
                for name, state in self.items():
                    self._saved[name] = state
                self._saved.save(facts, last)


class OnDisk:
    """The states of all matrices on disk; duals in files of their own, which the best state shares."""

    masks = MasksOfABlock

    def __init__(self, store: Store, rule: Rule) -> None:
        self._store, self._rule = store, rule

    def names(self) -> list[str]:
        return [name.removeprefix("dual/") for name in self._store if name.startswith("dual/")]

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


States = InMemory | OnDisk


class Best(Mapping[str, Tensor]):
    """The duals of the best state so far, on disk beside the states: in memory they would cost as much again.

    They are committed with the states, so that a descent that goes on from an earlier commit finds the best of that time.
    """

    def __init__(self, store: Store, matrices: Matrices, device: torch.device) -> None:
        self._store, self._matrices, self._device = store, matrices, device
        self.value = math.inf

    def keep(self, value: float, states: States) -> None:
        self.value = value
        for name in self:
            states.keep_dual(name, f"best/{name}")

    def __getitem__(self, name: str) -> Tensor:
        return self._store.tensor(f"best/{name}", "dual").to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)
