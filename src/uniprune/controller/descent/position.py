"""Where a descent stands: what moves, what is saved, and what a resumed descent takes up again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uniprune.common import distributed
from uniprune.controller.descent.history import DescentHistory
from uniprune.controller.descent.masks import MaskFactory
from uniprune.controller.descent.states import Best, InMemory, OnDisk, States, UpdateRule, UpdateState
from uniprune.saliency.calibration import Calibration
from uniprune.sparsity.patterns.checks import check_extremes
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.storage.runs import Pace, Run
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store


class Position:
    """The states of all matrices, the masks that follow from their duals, the best duals so far, and the history.

    It is that of an earlier process if the store has one; else it is empty, until each matrix has a state (:meth:`set`).

    targets: all patterns that masks will be asked for. run: where states lie that are not in memory; the calibration's own, or
    a temporary one. store: of the run, where the position is saved.

    owners: the rank of the process that has the state of each matrix: gradients are reduced to it, masks are broadcast by it.
    own: the matrices of this process. resumed: whether the position is that of an earlier process.
    """

    def __init__(self, rule: UpdateRule, calibration: Calibration, targets: Sequence[Pattern], run: Run, store: Store) -> None:
        matrices = calibration.matrices
        device = calibration.device
        self._rule = rule
        self.owners = distributed.owners({name: matrix.size for name, matrix in matrices.items()})
        self.own = [name for name, owner in self.owners.items() if owner == distributed.rank()]
        self.history = DescentHistory.of(store.facts)
        self.resumed = bool(store.facts)
        self.states = _states(rule, calibration, run, store, self.own)
        self.best = Best(store, matrices, device, self.own)
        stash = _stash_of_masks(calibration, run)
        self.mask_factory = MaskFactory(self.states, matrices, self.owners, targets, device, stash)
        self._extremes: dict[str, tuple[Tensor, Tensor]] = {}  # least and greatest of each dual that is still to be checked
        if self.resumed:
            for name in self.own:
                self.mask_factory.update(name, self.states.dual(name).to(device))

    def set(self, name: str, state: UpdateState) -> None:
        """Gives a matrix another state."""
        self.states[name] = state
        self._extremes[name] = state.dual.aminmax()
        self.mask_factory.update(name, state.dual)

    def check_finite(self) -> None:
        """Raises InputError for duals that are no longer finite. All at once: each look at a value waits for the GPU."""
        check_extremes(self._extremes, self._extremes.values())
        self._extremes.clear()

    def keep_best(self) -> None:
        """Makes the present duals the best ones."""
        self.best.keep(self.states)

    def back_to_best(self) -> None:
        """Takes up the best duals again, without momentum."""
        for name in self.own:
            self.set(name, self._rule.restart(self.states[name], self.best[name]))
        self.check_finite()

    def save(self, last: bool) -> None:
        """Saves states and history, as often as the states allow; the ``last`` time the best duals alone may do."""
        self.states.save(self.history.facts(), last)


def _states(rule: UpdateRule, calibration: Calibration, run: Run, store: Store, names: Sequence[str]) -> States:
    """The states on disk if the model is read block by block, else in memory: on its device, or in host memory (offload)."""
    if calibration.streamed:
        return OnDisk(store, rule)
    home = torch.device("cpu") if calibration.offload else calibration.device
    return InMemory(store, rule, Pace() if calibration.run else None, home, names)


def _stash_of_masks(calibration: Calibration, run: Run) -> Stash | None:
    """Where masks lie packed, if memory is short or processes exchange them: on disk if the model is read block by block."""
    if calibration.streamed:
        return Stash(run.aside())
    return Stash() if calibration.recompute or distributed.count() > 1 else None
