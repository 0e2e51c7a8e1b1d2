"""What the controller minimises: how far the pruned model's predictions are from the dense model's, over token windows.

The teacher is the same model with the masks off. The loss is the Kullback-Leibler divergence KL(dense || pruned) of the
next-token distributions, the cross-entropy of the text itself, or a mix; and, if asked for, the distance of the hidden states
after every block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.errors import UniPruneError
from uniprune.executor import batches, device_of
from uniprune.matrices import find_blocks
from uniprune.straight_through import StraightThrough

QUIET = 0.02  # nats: tokens with a smaller divergence are not made louder than this


class Loss:
    """The loss of a pruned model, over token windows ``[windows, length]``.

    text: the windows to come; the loss runs over its ``vocabulary`` commonest tokens, which saves time (with labels over all).
    labels: share of the cross-entropy, in [0, 1]. evenness: each token's divergence d is weighted by d ** -evenness, so that
    few tokens do not drown the others; 0 is the plain mean. hidden: weight of the hidden states' distance.
    Raises UniPruneError for a model whose logits are not its output head times its last hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        network: StraightThrough,
        text: Tensor,
        vocabulary: int = 8192,
        labels: float = 0.0,
        evenness: float = 0.0,
        hidden: float = 0.0,
    ) -> None:
        self._model, self._network = model, network
        self._labels, self._evenness, self._hidden = labels, evenness, hidden
        self._blocks = find_blocks(model)[1]
        head = model.get_output_embeddings()  # type: ignore[operator]
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        counts = torch.bincount(text.flatten(), minlength=head.weight.shape[0])
        size = len(counts) if labels else min(vocabulary, len(counts))
        common = counts.topk(size).indices.sort().values.to(head.weight.device)
        self._head = head.weight.detach()[common]
        self._bias = head.bias.detach()[common] if getattr(head, "bias", None) is not None else None
        self._scale = self._logit_scale(text[:1, :8], common)

    def backward(self, batch: Tensor) -> float:
        """Runs the pruned model forwards and backwards, into the network's sink. Returns the KL in nats per token."""
        with self._network.dense():
            teacher, teacher_states = self._run(batch)
        student, states = self._run(batch)
        kl, gradient = self._differentiate(student.detach(), teacher, batch)
        # Sums over the tokens, not means: the step does not see the scale, and float16 would lose small gradients.
        distance = self._distance(states, teacher_states) if self._hidden else torch.zeros(())
        if distance.requires_grad:
            weight = torch.full_like(distance, self._hidden * batch.numel())
            torch.autograd.backward([student, distance], [gradient, weight])
        else:
            torch.autograd.backward([student], [gradient])
        return kl

    @torch.no_grad()
    def held_out(self, windows: Tensor, batch_tokens: int = 1024) -> float:
        """Mean KL in nats per token over windows, without gradients."""
        total = 0.0
        for batch in batches(windows, batch_tokens):
            with self._network.dense():
                teacher, _ = self._run(batch)
            student, _ = self._run(batch)
            for ours, theirs in zip(student, teacher, strict=True):
                total += float(self._kl(ours, theirs).sum())
        return total / windows.numel()

    def _differentiate(self, student: Tensor, teacher: Tensor, batch: Tensor) -> tuple[float, Tensor]:
        """Mean KL per token, and the gradient of the loss's sum, a window at a time: logits are large."""
        total, gradients = 0.0, []
        with torch.enable_grad():
            for ours, theirs, ids in zip(student, teacher, batch, strict=True):
                ours = ours.detach().requires_grad_()
                kl = self._kl(ours, theirs)
                quiet = kl.detach().clamp_min(QUIET)
                loss = (1 - self._labels) * (kl * quiet**-self._evenness).sum()
                if self._labels:
                    next_ids = ids[1:].to(ours.device)
                    loss = loss + self._labels * functional.cross_entropy(self._logits(ours)[:-1], next_ids, reduction="sum")
                gradients.append(torch.autograd.grad(loss, ours)[0])
                total += float(kl.detach().sum())
        return total / batch.numel(), torch.stack(gradients)

    def _kl(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(dense || pruned) of each token ``[length]``, from final hidden states ``[length, width]``."""
        with torch.no_grad():
            target = functional.log_softmax(self._logits(teacher), -1)
        predicted = functional.log_softmax(self._logits(student), -1)
        return functional.kl_div(predicted, target, log_target=True, reduction="none").sum(-1)

    def _distance(self, states: list[Tensor], teacher_states: list[Tensor]) -> Tensor:
        distances = [(_unit(a) - _unit(b)).square().mean() for a, b in zip(states, teacher_states, strict=True)]
        return torch.stack(distances).mean() if distances else torch.zeros(())

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = functional.linear(hidden, self._head, self._bias).float() * self._scale
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits

    def _logit_scale(self, probe: Tensor, common: Tensor) -> float:
        """The factor that some families put on their logits; an error if ours cannot be made the model's own."""
        with self._network.dense():
            logits = self._model(input_ids=probe.to(device_of(self._model)), use_cache=False).logits[..., common].float()
            hidden, _ = self._run(probe)
            self._scale = 1.0
            ours = self._logits(hidden)
            scale = float((logits * ours).sum() / ours.square().sum())
        if not torch.allclose(logits, ours * scale, rtol=0.05, atol=0.02 * float(logits.abs().max())):
            kind = type(self._model).__name__
            raise UniPruneError(f"the controller cannot compute the logits of {kind} block by block; use --controller none")
        return scale

    def _run(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states ``[windows, length, width]`` and, where they count, those after each block but the last."""
        states: list[Tensor] = []

        def after(module: nn.Module, args: object, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(after) for block in self._blocks[:-1] if self._hidden]
        try:
            backbone = getattr(self._model, "base_model", self._model)
            output = backbone(input_ids=batch.to(device_of(self._model)), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return output.last_hidden_state, states


def _unit(hidden: Tensor) -> Tensor:
    """Hidden states with RMS 1, float32: what the next block's norm makes of them."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)
