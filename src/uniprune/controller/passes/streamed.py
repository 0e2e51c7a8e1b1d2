"""Passes of a model that has one block in memory at a time.

A forward pass loads each block once, for all windows and both models, and keeps its inputs; a backward pass loads each block
once more, the last one first, and runs it again with gradients. So a step reads the model twice, however many windows it has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uniprune.controller.straight_through import StraightThrough
from uniprune.models.blocks import batches
from uniprune.models.output_head import Head
from uniprune.models.replay.calls import Flow
from uniprune.models.replay.replay import Replay
from uniprune.storage.stash import Stash

PART_TOKENS = 1024  # tokens that go through a streamed block at once, with gradients


class Streamed:
    """Passes of a model whose blocks are in memory one at a time.

    stash: where hidden states lie between the blocks.
    """

    def __init__(self, model: nn.Module, replay: Replay, network: StraightThrough, stash: Stash | None = None) -> None:
        self._model, self._replay, self.network = model, replay, network
        self._stash = stash or Stash()
        self._ids: list[Tensor] = []  # token ids, by part: windows go through a block in parts of PART_TOKENS
        self._inputs: list[list[Flow]] = []  # of each block, by part
        self._last: list[Flow] = []  # outputs of the last block, by part

    @property
    def device(self) -> torch.device:
        return self._replay.device

    @torch.no_grad()
    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        ours, theirs = self._enter_both(batch)
        self._inputs = []
        for index in range(len(self._replay)):
            self._keep(index, ours)
            self._run_both(index, ours, theirs)
        self._last = ours
        return self._final(ours), self._final(theirs)

    @torch.no_grad()
    def forward_student(self, batch: Tensor) -> Tensor:
        ours = self._enter(batch)
        self._inputs = []
        for index in range(len(self._replay)):
            self._keep(index, ours)
            self._run(index, ours)
        self._last = ours
        return self._final(ours)

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> None:
        finals = torch.split(gradient, [len(ids) for ids in self._ids])
        gradients = [Flow(self._backward_final(*part)) for part in zip(self._last, finals, self._ids, strict=True)]
        self._last = []
        for index in reversed(range(len(self._replay))):
            with self._replay.residency(index):
                for part, inputs in enumerate(self._inputs[index]):
                    with torch.enable_grad():
                        leaves = inputs.each(self._here).each(_leaf)
                        outputs = self._replay.run(index, leaves, self._ids[part])
                    _backward(outputs, gradients[part].each(self._here))
                    gradients[part] = self._put("gradient", part, _gradients(leaves))
                self.network.flush(index)

    @torch.no_grad()
    def infer(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        ours, theirs = self._enter_both(batch)
        for index in range(len(self._replay)):
            self._run_both(index, ours, theirs)
        self._last = []
        return self._final(ours), self._final(theirs)

    @torch.no_grad()
    def infer_student(self, batch: Tensor) -> Tensor:
        ours = self._enter(batch)
        for index in range(len(self._replay)):
            self._run(index, ours)
        self._last = []
        return self._final(ours)

    def in_batches(self, windows: Tensor, tokens: int) -> list[Tensor]:
        return [windows]

    def head(self, text: Tensor, vocabulary: int | None = None) -> Head:
        probe = text[:1, :8]
        with self.network.dense():
            hidden = self._replay.leave(self._replay.enter(probe).hidden, probe)
            return Head(self._model, text, vocabulary).fit(self._model, lambda: self._replay.around(probe), hidden)

    def _enter(self, batch: Tensor) -> list[Flow]:
        """The first block's inputs, in parts."""
        self._ids = batches(batch, PART_TOKENS)
        return [self._put("student", part, self._replay.enter(windows)) for part, windows in enumerate(self._ids)]

    def _enter_both(self, batch: Tensor) -> tuple[list[Flow], list[Flow]]:
        """The first block's inputs for both models."""
        ours = self._enter(batch)
        return ours, [self._put("teacher", part, flow) for part, flow in enumerate(ours)]

    def _keep(self, index: int, ours: list[Flow]) -> None:
        """Keeps a block's inputs for the backward pass."""
        self._inputs.append([self._put(f"input-{index}", part, flow) for part, flow in enumerate(ours)])

    def _run(self, index: int, ours: list[Flow]) -> None:
        """Puts the student's outputs of a block in place of its inputs."""
        with self._replay.residency(index):
            for part, flow in enumerate(ours):
                ours[part] = self._put("student", part, self._replay.run(index, flow.each(self._here), self._ids[part]))

    def _run_both(self, index: int, ours: list[Flow], theirs: list[Flow]) -> None:
        """Puts a block's outputs of both models in place of its inputs."""
        with self._replay.residency(index):
            for part in range(len(ours)):
                student = self._replay.run(index, ours[part].each(self._here), self._ids[part])
                with self.network.dense():
                    target = self._replay.run(index, theirs[part].each(self._here), self._ids[part])
                theirs[part], ours[part] = self._put("teacher", part, target), self._put("student", part, student)

    def _final(self, flows: list[Flow]) -> Tensor:
        final = [self._replay.leave(self._here(flow.hidden), ids) for flow, ids in zip(flows, self._ids, strict=True)]
        return torch.cat(final) if final else torch.empty(0, 0, 0)  # no window in this process: it still takes part

    def _backward_final(self, last: Flow, gradient: Tensor, ids: Tensor) -> Tensor:
        """The gradient at the last block's output, from that at the final hidden states (behind the final norm)."""
        with torch.enable_grad():
            leaf = _leaf(self._here(last.hidden))
            final = self._replay.leave(leaf, ids)
        return torch.autograd.grad(final, leaf, gradient)[0]

    def _put(self, name: str, part: int, flow: Flow) -> Flow:
        return flow.put(self._stash, f"{name}-{part}")

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._replay.device)


def _leaf(tensor: Tensor) -> Tensor:
    """Where a gradient is wanted; indices have none."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _backward(outputs: Flow, gradients: Flow) -> None:
    """Backpropagates through a block from the gradients at what it put out; what no later block used has none."""
    pairs = [(outputs.hidden, gradients.hidden)]
    for place, gradient in gradients.handed.items():
        output = outputs.handed[place]
        if gradient is not None and output is not None and output.requires_grad:
            pairs.append((output, gradient))
    tensors, grads = zip(*pairs, strict=True)
    torch.autograd.backward(tensors, grads)


def _gradients(leaves: Flow) -> Flow:
    """Those that a backward pass left at a block's inputs."""
    assert leaves.hidden.grad is not None
    return Flow(leaves.hidden.grad, {place: None if leaf is None else leaf.grad for place, leaf in leaves.handed.items()})
