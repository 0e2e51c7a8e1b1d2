"""What the controller minimises: how far the pruned model's predictions are from the dense model's, over token windows.

The loss is the Kullback-Leibler divergence KL(dense || pruned) of the next-token distributions, the cross-entropy of the text
itself, or a mix; and, if asked for, the distance of the hidden states after every block. All of it is seen from hidden states:
who computes those, and how, is the business of ``passes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.errors import UniPruneError

QUIET = 0.02  # nats: tokens with a smaller divergence are not made louder than this
PIECE = 512  # tokens whose logits are in memory at once


class Head:
    """Logits from final hidden states, in float32: what a model's output head makes of them.

    text: token ids; only its ``vocabulary`` commonest get logits, in the order of their ids (None: all do).
    """

    def __init__(self, model: nn.Module, text: Tensor | None = None, vocabulary: int | None = None) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._weight: Tensor = head.weight.detach()
        self._bias: Tensor | None = head.bias.detach() if getattr(head, "bias", None) is not None else None
        self._common: Tensor | None = None
        self._scale = 1.0
        if text is not None and vocabulary is not None and vocabulary < len(self._weight):
            counts = torch.bincount(text.flatten(), minlength=len(self._weight))
            self._common = counts.topk(vocabulary).indices.sort().values.to(self._weight.device)
            self._weight = self._weight[self._common]
            self._bias = self._bias[self._common] if self._bias is not None else None

    @property
    def vocabulary(self) -> int:
        return len(self._weight)

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def fit(self, model: nn.Module, run: Callable[[nn.Module], Any], hidden: Tensor) -> Head:
        """Finds the factor that some families put on their logits.

        run: the model's output for some windows; hidden: the final hidden states it came from.
        Raises UniPruneError for a model whose logits are not its output head times its final hidden states.
        """
        logits: Tensor = run(model).logits.float()
        logits = logits if self._common is None else logits[..., self._common]
        ours = self(hidden)
        self._scale = float((logits * ours).sum() / ours.square().sum())
        if not torch.allclose(logits, ours * self._scale, rtol=0.05, atol=0.02 * float(logits.abs().max())):
            kind = type(model).__name__
            raise UniPruneError(
                f"the logits of {kind} are not its output head times its last hidden states: "
                "prune it with --controller none, and compare it --against another by --tasks alone"
            )
        return self

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = functional.linear(hidden, self._weight, self._bias).float() * self._scale
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits

    def next_token(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The gradient ``[windows, length, width]`` of the summed next-token cross-entropy of ``ids`` ``[windows, length]``.

        The head needs its whole vocabulary.
        """
        gradient = torch.zeros_like(hidden)
        for ours, target, into in zip(hidden[:, :-1], ids[:, 1:].to(hidden.device), gradient[:, :-1], strict=True):
            for piece in _pieces(len(ours)):
                with torch.enable_grad():
                    leaf = ours[piece].detach().requires_grad_()
                    loss = functional.cross_entropy(self(leaf), target[piece], reduction="sum")
                into[piece] = torch.autograd.grad(loss, leaf)[0]
        return gradient


class Loss:
    """The loss of a pruned model, seen from hidden states ``[windows, length, width]``, and its gradient there.

    head: with the whole vocabulary if there are labels. labels: share of the cross-entropy, in [0, 1]. evenness: each token's
    divergence d is weighted by d ** -evenness, so that few tokens do not drown the others; 0 is the plain mean. hidden: weight
    of the hidden states' distance; the distance of a token is the mean over the blocks but the last.
    """

    def __init__(self, head: Head, labels: float = 0.0, evenness: float = 0.0, hidden: float = 0.0) -> None:
        self._head, self._labels, self._evenness, self._hidden = head, labels, evenness, hidden

    def gradient(self, student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[float, Tensor]:
        """KL summed over the tokens, in nats, and the gradient of the loss's sum with respect to ``student``."""
        # Sums over the tokens, not means: the step does not see the scale, and float16 would lose small gradients.
        total, gradient = 0.0, torch.zeros_like(student)
        for ours, theirs, into in zip(student, teacher, gradient, strict=True):
            for piece in _pieces(len(ours)):
                with torch.enable_grad():
                    leaf = ours[piece].detach().requires_grad_()
                    kl = self._kl(leaf, theirs[piece])
                    loss = (1 - self._labels) * (kl * kl.detach().clamp_min(QUIET) ** -self._evenness).sum()
                into[piece] = torch.autograd.grad(loss, leaf)[0]
                total += float(kl.detach().sum())
        if self._labels:
            gradient += self._labels * self._head.next_token(student, ids)
        return total, gradient

    @torch.no_grad()
    def kl(self, student: Tensor, teacher: Tensor) -> float:
        """KL(dense || pruned) summed over the tokens, in nats."""
        pairs = zip(student, teacher, strict=True)
        return sum(float(self._kl(a[piece], b[piece]).sum()) for a, b in pairs for piece in _pieces(len(a)))

    def between(self, student: Tensor, teacher: Tensor, blocks: int) -> Tensor:
        """The gradient of the hidden states' distance after one of ``blocks`` blocks, with respect to ``student``."""
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            distance = self._hidden / max(1, blocks - 1) * (_unit(leaf) - _unit(teacher)).square().mean(-1).sum()
        return torch.autograd.grad(distance, leaf)[0]

    def _kl(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(dense || pruned) of each token ``[length]``, from final hidden states ``[length, width]``."""
        with torch.no_grad():
            target = functional.log_softmax(self._head(teacher), -1)
        predicted = functional.log_softmax(self._head(student), -1)
        return functional.kl_div(predicted, target, log_target=True, reduction="none").sum(-1)


def _pieces(length: int) -> Iterator[slice]:
    return (slice(start, start + PIECE) for start in range(0, length, PIECE))


def _unit(hidden: Tensor) -> Tensor:
    """Hidden states with RMS 1, float32: what the next block's norm makes of them."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)
