"""Where the controller's states lie, the masks that a step cuts from them, and the best of them so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from uniprune.controller.mirror_descent import State
from uniprune.controller.prox import relaxed
from uniprune.models.matrices import Matrices
from uniprune.sparsity.patterns import Cutter, Pattern
from uniprune.storage.stash import give_back_memory
from uniprune.storage.tensor_store import Store


class States(dict[str, State]):
    """The states of all matrices, in memory."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def dual(self, name: str) -> Tensor:
        return self[name].dual

    def keep_dual(self, name: str, key: str) -> None:
        """Puts a dual as it is now into the store."""
        self._store[key] = {"dual": self.dual(name)}


class StoredStates:
    """The states of all matrices, on disk; duals in files of their own, which the best state shares."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getitem__(self, name: str) -> State:
        moments = self._store[f"moments/{name}"]
        unit, steps = moments["facts"].tolist()
        return State(self.dual(name), moments["mean"], moments["rms"], unit, int(steps))

    def __setitem__(self, name: str, state: State) -> None:
        facts = torch.tensor([state.unit, state.steps], dtype=torch.float64)
        self._store[f"dual/{name}"] = {"dual": state.dual}
        self._store[f"moments/{name}"] = {"mean": state.mean, "rms": state.rms, "facts": facts}
        give_back_memory()

    def dual(self, name: str) -> Tensor:
        return self._store.tensor(f"dual/{name}", "dual")

    def keep_dual(self, name: str, key: str) -> None:
        self._store.share(key, f"dual/{name}")


class Cut(Mapping[str, Tensor]):
    """The masks of every matrix under one target, cut when they are asked for.

    hard: cuts a matrix, or some of its rows. temperature: of relaxed masks, in units of the duals; 0 has hard ones. frugal:
    keeps the masks of one block only, instead of all.
    """

    def __init__(
        self,
        target: Pattern,
        hard: Cutter,
        dual: Callable[[str], Tensor],
        matrices: Matrices,
        temperature: float,
        frugal: bool,
    ) -> None:
        self._target, self.hard, self._dual, self._matrices = target, hard, dual, matrices
        self._temperature, self._frugal = temperature, frugal
        self._kept: dict[str, Tensor] = {}
        if temperature and not target.local:
            self._kept = dict(relaxed(target, {name: dual(name) for name in matrices}, temperature))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            block = self._matrices[name].block
            if self._frugal and any(self._matrices[other].block != block for other in self._kept):
                self._kept.clear()
            dual = self._dual(name).to(self._matrices[name].device)
            self._kept[name] = (
                dict(relaxed(self._target, {name: dual}, self._temperature))[name]
                if self._temperature
                else self.hard(name, dual)
            )
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


class Best(Mapping[str, Tensor]):
    """The duals of the best state so far, on disk beside the states: in memory they would cost as much again.

    They are committed with the states, so that a descent that goes on from an earlier commit finds the best of that time.
    """

    def __init__(self, store: Store, matrices: Matrices, device: torch.device) -> None:
        self._store, self._matrices, self._device = store, matrices, device
        self.value = math.inf

    def keep(self, value: float, states: States | StoredStates) -> None:
        self.value = value
        for name in self:
            states.keep_dual(name, f"best/{name}")

    def __getitem__(self, name: str) -> Tensor:
        return self._store.tensor(f"best/{name}", "dual").to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)
