"""The states of mirror descent, in memory or on disk, and the best duals so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.models.matrices import Matrices
from uniprune.storage.runs import Pace
from uniprune.storage.stash import give_back_memory
from uniprune.storage.tensor_store import Store


class UpdateState(Protocol):
    """What an update rule keeps of one matrix: an opaque value, but for these members."""

    @property
    def dual(self) -> Tensor:
        """The scores ``[out, in]``, float32, that masks are created from."""
        ...

    def to(self, device: torch.device) -> UpdateState: ...

    def rest(self) -> dict[str, Tensor]:
        """All tensors but the dual, to be saved."""
        ...


class UpdateRule(Protocol):
    """An update rule, in pure functions on the state of one matrix (as in optax: ``init`` and ``update``)."""

    @property
    def step_size(self) -> float:
        """The size of the first step."""
        ...

    def init(self, local: Tensor, output_gradient: Tensor) -> UpdateState:
        """The first state. local: scores ``[out, in]``; output_gradient: RMS ``[out]`` of dL/dy."""
        ...

    def step(self, state: Any, gradient: Tensor, size: float) -> UpdateState:
        """The state after a step of this size; gradient: of the loss with respect to the mask ``[out, in]``."""
        ...

    def restart(self, state: Any, dual: Tensor) -> UpdateState:
        """A state with this dual and no memory of earlier gradients."""
        ...

    def restore(self, dual: Tensor, rest: Mapping[str, Tensor]) -> UpdateState:
        """The state that was saved as its dual and :meth:`UpdateState.rest`."""
        ...


class States(Protocol):
    """The states of this process's matrices, by name, between two steps."""

    def __getitem__(self, name: str) -> UpdateState: ...

    def __setitem__(self, name: str, state: UpdateState) -> None: ...

    def dual(self, name: str) -> Tensor:
        """The dual of a matrix alone."""
        ...

    def keep_dual(self, name: str, key: str) -> None:
        """Keeps the present dual in the store under another key."""
        ...

    def save(self, facts: Mapping[str, Any], last: bool) -> None:
        """Saves states and facts, or what is needed of them the ``last`` time."""
        ...

    def clear(self) -> None:
        """Frees the memory of the states, which are not asked for any more."""
        ...


class InMemory:
    """The states in memory; saved from time to time, such that saving takes little of the whole time.

    store: where they are saved, and where those of an interrupted run are read. pace: when it is time to save; None: never.
    home: the device that states lie on between steps. names: of the matrices.
    """

    def __init__(self, store: Store, rule: UpdateRule, pace: Pace | None, home: torch.device, names: Iterable[str]) -> None:
        self._store = store
        self._saved = OnDisk(store, rule)
        self._pace = pace
        self._home = home
        self._states = {name: self._saved[name].to(home) for name in names} if store.facts else {}

    def __getitem__(self, name: str) -> UpdateState:
        return self._states[name]

    def __setitem__(self, name: str, state: UpdateState) -> None:
        self._states[name] = state.to(self._home)

    def dual(self, name: str) -> Tensor:
        return self._states[name].dual

    def keep_dual(self, name: str, key: str) -> None:
        self._store[key] = {"dual": self.dual(name)}

    def save(self, facts: Mapping[str, Any], last: bool) -> None:
        """Saves states and facts if it is time to (the first process decides); the ``last`` time facts and best duals alone."""
        if last and (self._pace is not None or distributed.count() > 1):  # each process reads the best duals of all of them
            self._saved.save(facts, last)
        elif self._pace is not None and distributed.all_gather(self._pace.due())[0]:
            with self._pace.saving():
                for name, state in self._states.items():
                    self._saved[name] = state
                self._saved.save(facts, last)

    def clear(self) -> None:
        self._states.clear()


class OnDisk:
    """The states on disk, the duals in files of their own: the best duals share them instead of a copy."""

    def __init__(self, store: Store, rule: UpdateRule) -> None:
        self._store = store
        self._rule = rule

    def __getitem__(self, name: str) -> UpdateState:
        return self._rule.restore(self.dual(name), self._store[f"rest/{name}"])

    def __setitem__(self, name: str, state: UpdateState) -> None:
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
        """They take no memory."""


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
