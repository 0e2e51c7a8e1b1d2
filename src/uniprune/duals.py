"""Where the controller's states lie, the masks that a step cuts from them, and the best of them so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from uniprune.artefacts import ScoresFile, write_scores
from uniprune.executor import give_back_memory
from uniprune.matrices import Matrices
from uniprune.mirror_descent import State
from uniprune.patterns import Cutter, Pattern
from uniprune.prox import relaxed
from uniprune.runs import Run, Store


class States(dict[str, State]):
    """The states of all matrices, in memory."""

    def dual(self, name: str) -> Tensor:
        return self[name].dual


class StoredStates:
    """The states of all matrices, on disk."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getitem__(self, name: str) -> State:
        found = self._store[name]
        unit, steps = found["facts"].tolist()
        return State(found["dual"], found["mean"], found["rms"], unit, int(steps))

    def __setitem__(self, name: str, state: State) -> None:
        facts = torch.tensor([state.unit, state.steps], dtype=torch.float64)
        self._store[name] = {"dual": state.dual, "mean": state.mean, "rms": state.rms, "facts": facts}
        give_back_memory()

    def dual(self, name: str) -> Tensor:
        return self._store.tensor(name, "dual")


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
            dual = self._dual(name).to(self._matrices[name].parameter.device)
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


class Best:
    """The best state so far, in a file: in memory it would cost as much again. The one before it stays until the next."""

    def __init__(self, run: Run, matrices: Matrices, device: torch.device) -> None:
        self._folder, self._matrices, self._device = run.folder, matrices, device
        self.value, self.number = math.inf, 0

    def keep(self, value: float, duals: Iterable[tuple[str, Tensor]]) -> None:
        shapes = {name: matrix.shape for name, matrix in self._matrices.items()}
        self.value, self.number = value, self.number + 1
        write_scores(self._path(self.number), duals, shapes, {})
        self._path(self.number - 2).unlink(missing_ok=True)

    def file(self) -> ScoresFile:
        return ScoresFile(self._path(self.number))

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name, dual in self.file().items():
            yield name, dual.to(self._device)

    def _path(self, number: int) -> Path:
        return self._folder / f"best-{number}.safetensors"
