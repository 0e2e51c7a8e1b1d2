"""What the controller minimises: how far the pruned model's predictions are from the dense model's, over token windows.

The loss is the Kullback-Leibler divergence KL(dense || pruned) of the next-token distributions, the cross-entropy of the text
itself, or a mix. It is seen from the final hidden states: who computes those, and how, is the business of ``passes``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from uniprune.models.output_head import Head

MIN_KL = 0.02  # nats: tokens with a smaller divergence are not made louder than this


class Loss:
    """The loss of a pruned model, seen from final hidden states ``[windows, length, width]``, and its gradient there.

    head: with the whole vocabulary if there are labels. labels: share of the cross-entropy, in [0, 1]. evenness: each token's
    divergence d is weighted by d ** -evenness, so that few tokens do not drown the others; 0 is the plain mean.
    """

    def __init__(self, head: Head, labels: float = 0.0, evenness: float = 0.0) -> None:
        self._head = head
        self._labels = labels
        self._evenness = evenness

    def gradient(self, student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[float, Tensor]:
        """KL summed over the tokens, in nats, and the gradient of the loss's sum with respect to ``student``."""
        # Sums over the tokens, not means: the step does not see the scale, and float16 would lose small gradients.
        total = 0.0
        gradient = torch.zeros_like(student)
        counted = self._head.counted(ids.to(student.device))
        for ours, theirs, counts, into in zip(student, teacher, counted, gradient, strict=True):
            for piece in self._head.pieces(len(ours)):
                with torch.enable_grad():
                    leaf = ours[piece].detach().requires_grad_()
                    kl = self._kl(leaf, theirs[piece]) * counts[piece]
                    loss = (1 - self._labels) * (kl * kl.detach().clamp_min(MIN_KL) ** -self._evenness).sum()
                into[piece] = torch.autograd.grad(loss, leaf)[0]
                total += float(kl.detach().sum())
        if self._labels:
            gradient += self._labels * self._head.next_token(student, ids)
        return total, gradient

    @torch.no_grad()
    def kl(self, student: Tensor, teacher: Tensor, ids: Tensor) -> float:
        """KL(dense || pruned) summed over the tokens of ``ids`` ``[windows, length]``, in nats."""
        total = 0.0
        for ours, theirs, counts in zip(student, teacher, self._head.counted(ids.to(student.device)), strict=True):
            for piece in self._head.pieces(len(ours)):
                total += float((self._kl(ours[piece], theirs[piece]) * counts[piece]).sum())
        return total

    def count(self, ids: Tensor) -> int:
        """Of how many tokens of ``ids`` the divergence is summed."""
        return int(self._head.counted(ids).sum())

    def _kl(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(dense || pruned) of each token ``[length]``, from final hidden states ``[length, width]``."""
        with torch.no_grad():
            target = functional.log_softmax(self._head(teacher), -1)
        predicted = functional.log_softmax(self._head(student), -1)
        return functional.kl_div(predicted, target, log_target=True, reduction="none").sum(-1)
