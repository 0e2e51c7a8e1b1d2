"""The output head of a model, applied to final hidden states a piece at a time: logits are never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.checkpoints.configuration import text_config
from uniprune.common import pictures
from uniprune.errors import InputError
from uniprune.models.blocks import OVERFLOW, after_backbone, text_alone

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # c in c * tanh(logits / c), by family
PIECE, LOGITS = 512, 1 << 25  # tokens whose logits are in memory at once: at most so many, and so many logits


def log_probabilities(logits: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Of all tokens ``[..., vocabulary]`` or of one at each position ``[...]``, in nats, float32.

    ``log_softmax`` and ``cross_entropy`` would do, but on a CPU PyTorch's sum a large vocabulary in a row and lose its small
    terms: always to the same side, by up to 5e-5 nats a token (findings/log-softmax-vocabulary.sh).
    """
    logits = logits.float()
    if tokens is None:
        return logits - logits.logsumexp(-1, keepdim=True)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def output_embeddings(model: nn.Module) -> Any:
    """The layer whose product is a model's logits. Raises InputError for a model that says of none that it is this."""
    found = model.get_output_embeddings()  # type: ignore[operator]
    if found is None and hasattr(model, "get_decoder"):  # that of the language model inside
        found = getattr(model.get_decoder(), "get_output_embeddings", lambda: None)()  # type: ignore[operator]
    if getattr(found, "weight", None) is None:
        raise InputError(
            f"{type(model).__name__} names no output head (get_output_embeddings): prune it with --controller none, and "
            "compare it --against another by --tasks alone"
        )
    return found


class Head:
    """Logits from final hidden states, in float32: what a model's output head makes of them.

    text: token ids; only its ``vocabulary`` commonest get logits, in the order of their ids (None: all do).
    """

    def __init__(self, model: nn.Module, text: Tensor | None = None, vocabulary: int | None = None) -> None:
        head = output_embeddings(model)
        config = text_config(model.config)
        self._cap: float | None = next((cap for name in CAPS if (cap := getattr(config, name, None))), None)
        self._weight: Tensor = head.weight.detach()
        self._bias: Tensor | None = head.bias.detach() if getattr(head, "bias", None) is not None else None
        self._common: Tensor | None = None
        self._scale = 1.0
        self._pictures = pictures.shown(model)
        self._model: nn.Module | None = None  # that is asked, if its head is more than a product
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

    def fit(self, model: nn.Module, run: Callable[[], Any], hidden: Tensor) -> Head:
        """Finds the factor that some families put on their logits before they cap them, and what others do to hidden states.

        run: gives the model's output for some windows; hidden: the final hidden states it came from.
        Raises InputError for a model whose logits are not its output head's for its final hidden states.
        """
        with text_alone(model):
            logits: Tensor = run().logits.float()
        logits = logits if self._common is None else logits[..., self._common]
        if bool(logits.isnan().any()):  # infinity is how some models rule tokens out
            raise InputError(f"the output head of {type(model).__name__} {OVERFLOW}")

        def close(ours: Tensor) -> bool:
            return torch.allclose(logits, ours, rtol=0.05, atol=0.02 * float(logits.abs().max()))

        if hidden.shape[-1] == self._weight.shape[1]:
            uncapped, product = logits, self._product(hidden)
            if self._cap:  # nearer to it, they hardly tell what they were
                inside = logits.abs() < 0.9 * self._cap
                uncapped, product = self._cap * torch.atanh(logits[inside] / self._cap), product[inside]
            self._scale = float((uncapped * product).sum() / product.square().sum())
            if close(self(hidden)):
                return self
        self._model = model  # there are layers before the head: what a masked language model has become
        if not close(self(hidden)):
            raise InputError(
                f"the logits of {type(model).__name__} are not its output head's for its last hidden states: "
                "prune it with --controller none, and compare it --against another by --tasks alone"
            )
        return self

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._model is not None:
            logits = after_backbone(self._model, hidden).float()
            return logits if self._common is None else logits[..., self._common]
        logits = self._product(hidden) * self._scale
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits

    def _product(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden.to(self._weight.dtype), self._weight, self._bias).float()

    def counted(self, ids: Tensor) -> Tensor:
        """Of which tokens of ``ids`` ``[windows, length]`` the predictions count: those that follow are of text."""
        return pictures.counted(self._pictures, ids)

    def pieces(self, length: int) -> Iterator[slice]:
        """A window of this length in slices whose logits are in memory at once."""
        step = at_once(self.vocabulary)
        return (slice(start, start + step) for start in range(0, length, step))

    def next_token(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The gradient ``[windows, length, width]`` of the summed next-token cross-entropy of ``ids`` ``[windows, length]``.

        The head needs its whole vocabulary.
        """
        gradient = torch.zeros_like(hidden)
        ids = ids.to(hidden.device)
        parts = zip(hidden[:, :-1], ids[:, 1:], self.counted(ids)[:, :-1], gradient[:, :-1], strict=True)
        for ours, target, counts, into in parts:
            for piece in self.pieces(len(ours)):
                with torch.enable_grad():
                    leaf = ours[piece].detach().requires_grad_()
                    losses = functional.cross_entropy(self(leaf), target[piece], reduction="none")
                    loss = (losses * counts[piece]).sum()
                into[piece] = torch.autograd.grad(loss, leaf)[0]
        return gradient


def at_once(vocabulary: int) -> int:
    """How many tokens' logits are in memory at once."""
    return max(1, min(PIECE, LOGITS // vocabulary))
