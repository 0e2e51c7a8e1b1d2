"""The teacher's final hidden states, kept for windows that come again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from torch import Tensor

from uniprune.controller.passes.protocol import Passes
from uniprune.storage.stash import Stash


class TeacherCache:
    """Passes of student and teacher, of which the teacher's is made once for windows that come again.

    stash: where its final hidden states lie. repeats: whether the windows of :meth:`forward` come again; those of :meth:`infer`
    do.
    """

    def __init__(self, passes: Passes, stash: Stash, repeats: bool = False) -> None:
        self._passes = passes
        self._stash = stash
        self._repeats = repeats
        self._states: dict[str, Tensor] = {}

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Passes.forward``."""
        return self._run(batch, self._passes.forward, self._passes.forward_student, self._repeats)

    def infer(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Passes.infer``."""
        return self._run(batch, self._passes.infer, self._passes.infer_student, True)

    def _run(
        self, batch: Tensor, both: Callable[[Tensor], tuple[Tensor, Tensor]], alone: Callable[[Tensor], Tensor], keep: bool
    ) -> tuple[Tensor, Tensor]:
        """both: the pass of both models. alone: that of the student. keep: whether the teacher's states are kept."""
        key = f"final-{hashlib.sha256(batch.cpu().numpy().tobytes()).hexdigest()[:16]}"
        if key in self._states:
            return alone(batch), self._states[key].to(self._passes.device)
        student, teacher = both(batch)
        if keep:
            self._states[key] = self._stash.put(key, teacher)
        return student, teacher
