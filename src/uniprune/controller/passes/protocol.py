"""Forward and backward passes of the pruned model (the student) and of the dense one (the teacher), which share their weights.

Its implementations, one for a model in memory and one for a model that is read block by block, give the same numbers, up to the
rounding of sums that are made in another order.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from uniprune.controller.straight_through import StraightThrough
from uniprune.models.output_head import Head


class Passes(Protocol):
    """Runs the student, which is the model with the masks of ``network``, and the teacher, the same model without them.

    ``batch`` is token ids ``[windows, length]``, final hidden states are ``[windows, length, width]``.
    """

    network: StraightThrough

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        ...

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states of student and teacher; what :meth:`backward` needs is kept."""
        ...

    def forward_student(self, batch: Tensor) -> Tensor:
        """As :meth:`forward`, of the student alone."""
        ...

    def backward(self, gradient: Tensor) -> None:
        """Backpropagates the last forward pass, from the gradient at the student's final hidden states into the sink."""
        ...

    def infer(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states of student and teacher, without gradients."""
        ...

    def infer_student(self, batch: Tensor) -> Tensor:
        """As :meth:`infer`, of the student alone."""
        ...

    def in_batches(self, windows: Tensor, tokens: int) -> list[Tensor]:
        """The windows in batches of about ``tokens``; all in one batch where each would have to read the model from disk."""
        ...

    def head(self, text: Tensor, vocabulary: int | None = None) -> Head:
        """The model's output head; ``text`` (token ids ``[windows, length]``) and ``vocabulary`` are as in Head."""
        ...
