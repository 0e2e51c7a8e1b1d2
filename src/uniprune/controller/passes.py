"""Forward and backward passes of the pruned model (the student) and of the dense one (the teacher), which share their weights.

:class:`Resident` runs a model that is in memory as a whole. It keeps the activations of all blocks for the backward pass, or
only the blocks' inputs and runs each block again (activation checkpointing): one more forward pass, and the same bits.

:class:`Streamed` has one block in memory at a time. A forward pass loads each block once, for all windows and both models, and
keeps its inputs; a backward pass loads each block once more, the last one first, and runs it again with gradients. So a step
reads the model twice, however many windows it has.

Both give the same numbers, up to the rounding of sums that are made in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uniprune.controller.straight_through import StraightThrough
from uniprune.errors import InputError
from uniprune.models.blocks import (
    OVERFLOW,
    batches,
    device_of,
    forked,
    hidden_in,
    hidden_of,
    last_hidden,
    rerouted,
    warn_unless_causal,
)
from uniprune.models.matrices import find_blocks
from uniprune.models.output_head import Head
from uniprune.models.replay import Flow, Replay
from uniprune.storage.stash import Stash, give_back_memory

if TYPE_CHECKING:
    from uniprune.saliency.calibration import Calibration
    from uniprune.storage.runs import Run

PART_TOKENS = 1024  # tokens that go through a streamed block at once, with gradients

HiddenGradient = Callable[[Tensor, Tensor, int], Tensor]
"""(student's, teacher's hidden states after one of the blocks, number of blocks) -> a gradient with respect to the former."""


class Passes(Protocol):
    """Runs the student, which is the model with ``network.masks`` applied, and the teacher, the same model without them.

    ``batch`` is token ids ``[windows, length]``, final hidden states are ``[windows, length, width]``.
    """

    network: StraightThrough

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        ...

    def forward(self, batch: Tensor, hidden_gradient: HiddenGradient | None = None) -> tuple[Tensor, Tensor]:
        """Final hidden states of student and teacher; what :meth:`backward` needs is kept.

        hidden_gradient: adds a gradient at the student's hidden states after each block but the last.
        """
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


def open_passes(calibration: Calibration, run: Run) -> Passes:
    """The passes of a calibration's model, with a network that has no masks yet. run: where hidden states of blocks may lie."""
    network, (_, blocks) = StraightThrough(calibration.matrices), find_blocks(calibration.model)
    if not calibration.streamed:
        return Resident(calibration.model, blocks, network, calibration.recompute)
    replay = Replay(calibration.model, blocks, calibration.residency)
    return Streamed(calibration.model, replay, network, Stash(run.aside()))


class Resident:
    """Passes of a model that is in memory as a whole.

    recompute: whether each block's activations are computed again in the backward pass instead of being kept.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, network: StraightThrough, recompute: bool = False) -> None:
        self._model, self._blocks, self.network, self._recompute = model, blocks, network, recompute
        self._last: Tensor | None = None
        self._flushed: set[int] = set()

    @property
    def device(self) -> torch.device:
        return device_of(self._model)

    def forward(self, batch: Tensor, hidden_gradient: HiddenGradient | None = None) -> tuple[Tensor, Tensor]:
        if hidden_gradient is None:
            target = self._dense(batch)
            return self.forward_student(batch), target
        target, states = self._dense_states(batch)
        add = self._add_gradient(states, hidden_gradient)
        handles = [block.register_forward_hook(add) for block in self._blocks[:-1]]
        try:
            return self.forward_student(batch), target
        finally:
            for handle in handles:
                handle.remove()

    def forward_student(self, batch: Tensor) -> Tensor:
        with ExitStack() as stack, torch.enable_grad():
            for index, block in enumerate(self._blocks):
                stack.callback(block.register_forward_pre_hook(self._flush(index), with_kwargs=True).remove)
            if self._recompute:
                stack.enter_context(rerouted(self._blocks, self._checkpointed))
            self._last = last_hidden(self._model, batch)
        return self._last.detach()

    def backward(self, gradient: Tensor) -> None:
        assert self._last is not None, "backward without forward"
        if not self._last.requires_grad:  # reversible layers (Reformer) differentiate in their own way
            raise InputError(f"no gradient comes through the blocks of {type(self._model).__name__}; use --controller none")
        self._flushed.clear()
        torch.autograd.backward([self._last], [gradient])
        self._last = None
        # Inputs without a gradient set off no flush: the first block's, and others' if no block before them has matrices.
        for index in range(len(self._blocks)):
            if index not in self._flushed:
                self.network.flush(index)

    @torch.no_grad()
    def infer(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.infer_student(batch), self._dense(batch)

    @torch.no_grad()
    def infer_student(self, batch: Tensor) -> Tensor:
        return last_hidden(self._model, batch)

    def in_batches(self, windows: Tensor, tokens: int) -> list[Tensor]:
        return batches(windows, tokens)

    def head(self, text: Tensor, vocabulary: int | None = None) -> Head:
        probe = text[:1, :8]
        hidden, states = self._dense_states(probe)
        warn_unless_causal(self._model, self._dense(forked(probe[0])))
        for index, state in enumerate((*states, hidden)):
            if not bool(torch.isfinite(state).all()):
                raise InputError(f"block {index} {OVERFLOW}")
        with self.network.dense():
            return Head(self._model, text, vocabulary).fit(
                self._model, lambda model: model(input_ids=probe.to(hidden.device), use_cache=False), hidden
            )

    def _dense(self, batch: Tensor) -> Tensor:
        """The dense model's final hidden states."""
        with self.network.dense():
            return last_hidden(self._model, batch)

    def _dense_states(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The dense model's final hidden states, and those after each block but the last."""
        states: list[Tensor] = []

        def after(module: nn.Module, args: object, output: Any) -> None:
            states.append(hidden_of(output))

        handles = [block.register_forward_hook(after) for block in self._blocks[:-1]]
        try:
            return self._dense(batch), states
        finally:
            for handle in handles:
                handle.remove()

    def _checkpointed(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that keeps only its inputs for the backward pass. No RNG state is kept: nothing is random in
        evaluation mode."""

        def block(*args: Any, **kwargs: Any) -> Any:
            output = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            self._tidy()
            return output

        return block

    def _tidy(self) -> None:
        """Gives the memory of freed activations back to the system, before what is kept is allocated in its midst."""
        if self._recompute and self.device.type == "cpu":
            give_back_memory()

    def _flush(self, index: int) -> Any:
        """A hook that flushes a block's gradients as soon as the gradient of its input is there: then they are complete.

        Some models pass through a block several times (Dory, Inkling 2 with loops): its first input has its gradient last.
        """
        entered = False

        def flush(gradient: Tensor) -> None:
            self._flushed.add(index)
            self.network.flush(index)
            self._tidy()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal entered
            hidden = hidden_in(args, kwargs)
            if hidden.requires_grad and not entered:
                hidden.register_hook(flush)  # type: ignore[no-untyped-call]
            entered = True

        return before

    def _add_gradient(self, states: list[Tensor], hidden_gradient: HiddenGradient) -> Any:
        """A hook that adds a block's own gradient to the one that comes back from the blocks after it."""

        def after(module: nn.Module, args: object, output: Any) -> None:
            hidden = hidden_of(output)
            own = hidden_gradient(hidden, states.pop(0), len(self._blocks))
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradient + own)  # type: ignore[no-untyped-call]

        return after


class Streamed:
    """Passes of a model whose blocks are in memory one at a time.

    stash: where hidden states lie between the blocks.
    """

    def __init__(self, model: nn.Module, replay: Replay, network: StraightThrough, stash: Stash | None = None) -> None:
        self._model, self._replay, self.network = model, replay, network
        self._stash = stash or Stash()
        self._ids: list[Tensor] = []  # token ids, by part: windows go through a block in parts of PART_TOKENS
        self._inputs: list[list[Flow]] = []  # of each block, by part
        self._own_gradients: list[list[Tensor]] = []  # with respect to each block's outputs (hidden_gradient), by part
        self._last: list[Flow] = []  # outputs of the last block, by part

    @property
    def device(self) -> torch.device:
        return self._replay.device

    @torch.no_grad()
    def forward(self, batch: Tensor, hidden_gradient: HiddenGradient | None = None) -> tuple[Tensor, Tensor]:
        ours, theirs = self._enter_both(batch)
        self._inputs, self._own_gradients, blocks = [], [], len(self._replay)
        for index in range(blocks):
            self._keep(index, ours)
            with self._replay.residency(index):
                self._own_gradients.append(self._run_both(index, ours, theirs, hidden_gradient if index + 1 < blocks else None))
        self._last = ours
        return self._final(ours), self._final(theirs)

    @torch.no_grad()
    def forward_student(self, batch: Tensor) -> Tensor:
        ours = self._enter(batch)
        self._inputs, self._own_gradients = [], [[] for _ in range(len(self._replay))]
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
                    if self._own_gradients[index]:
                        hidden = gradients[part].hidden + self._own_gradients[index][part]
                        gradients[part] = gradients[part]._replace(hidden=hidden)
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
            with self._replay.residency(index):
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
            return Head(self._model, text, vocabulary).fit(self._model, lambda model: self._replay.around(model, probe), hidden)

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

    def _run_both(
        self, index: int, ours: list[Flow], theirs: list[Flow], hidden_gradient: HiddenGradient | None = None
    ) -> list[Tensor]:
        """Puts a block's outputs of both models in place of its inputs; returns ``hidden_gradient``, if given, of each part."""
        gradients = []
        for part in range(len(ours)):
            student = self._replay.run(index, ours[part].each(self._here), self._ids[part])
            with self.network.dense():
                target = self._replay.run(index, theirs[part].each(self._here), self._ids[part])
            if hidden_gradient:
                own = hidden_gradient(student.hidden, target.hidden, len(self._replay))
                gradients.append(self._stash.put(f"pull-{index}-{part}", own))
            theirs[part], ours[part] = self._put("teacher", part, target), self._put("student", part, student)
        return gradients

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
