"""Passes of the pruned model and of the dense one, forwards and backwards: in one go, or block by block from disk.

Both kinds give the same numbers. A model in memory may keep the activations of all blocks for the pass backwards, or the inputs
of the blocks alone and run each again (activation checkpointing): one more forward pass, and the same bits.

Block by block, a pass forwards loads each block once, for all windows and for both models, and keeps each block's inputs; a
pass backwards loads each block once more, last one first, and runs it again with gradients. So a step reads the model twice
however many windows it has, and only one block is ever in memory.
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
    Replay,
    batches,
    device_of,
    forked,
    hidden_of,
    last_hidden,
    rerouted,
    warn_unless_causal,
)
from uniprune.models.matrices import find_blocks
from uniprune.models.output_head import Head
from uniprune.storage.stash import Stash, give_back_memory

if TYPE_CHECKING:
    from uniprune.saliency.calibration import Calibration
    from uniprune.storage.runs import Run

PART_TOKENS = 1024  # that go through a block at once, with gradients

Between = Callable[[Tensor, Tensor, int], Tensor]
"""Given hidden states of the pruned and the dense model after one of the blocks, a gradient with respect to the former."""


class Passes(Protocol):
    """Runs a model routed through a network of masks."""

    network: StraightThrough

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        ...

    def forward(self, batch: Tensor, between: Between | None = None) -> tuple[Tensor, Tensor]:
        """Final hidden states ``[windows, length, width]`` of the pruned and of the dense model, for :meth:`backward`."""
        ...

    def forward_alone(self, batch: Tensor) -> Tensor:
        """As :meth:`forward`, of the pruned model only."""
        ...

    def backward(self, gradient: Tensor) -> None:
        """From the gradient at the pruned model's final hidden states to the network's sink."""
        ...

    def look(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, without gradients."""
        ...

    def look_alone(self, batch: Tensor) -> Tensor:
        """As :meth:`look`, of the pruned model only."""
        ...

    def portions(self, windows: Tensor, tokens: int) -> list[Tensor]:
        """Windows in batches that are best run at once; ``tokens`` is how many the memory is meant for."""
        ...

    def head(self, text: Tensor, vocabulary: int | None = None) -> Head:
        """The model's output head; ``text`` ``[windows, length]`` is as in Head."""
        ...


def opened(calibration: Calibration, run: Run) -> Passes:
    """The passes of a calibration's model, routed through a network that has no masks yet."""
    network, (_, blocks) = StraightThrough(calibration.matrices), find_blocks(calibration.model)
    if not calibration.streamed:
        return Resident(calibration.model, blocks, network, calibration.recompute)
    replay = Replay(calibration.model, blocks, calibration.residency)
    return Streamed(calibration.model, replay, network, Stash(run.aside()))


class Resident:
    """Passes of a model that is in memory as a whole.

    recompute: whether the activations of a block are computed again in the pass backwards instead of being kept.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, network: StraightThrough, recompute: bool = False) -> None:
        self._model, self._blocks, self.network, self._recompute = model, blocks, network, recompute
        self._last: Tensor | None = None
        self._flushed: set[int] = set()

    @property
    def device(self) -> torch.device:
        return device_of(self._model)

    def forward(self, batch: Tensor, between: Between | None = None) -> tuple[Tensor, Tensor]:
        if between is None:
            target = self._dense(batch)
            return self.forward_alone(batch), target
        target, states = self._dense_states(batch)
        pull = self._pull(states, between)
        handles = [block.register_forward_hook(pull) for block in self._blocks[:-1]]
        try:
            return self.forward_alone(batch), target
        finally:
            for handle in handles:
                handle.remove()

    def forward_alone(self, batch: Tensor) -> Tensor:
        with ExitStack() as stack, torch.enable_grad():
            for index, block in enumerate(self._blocks):
                stack.callback(block.register_forward_pre_hook(self._flush(index), with_kwargs=True).remove)
            if self._recompute:
                stack.enter_context(rerouted(self._blocks, self._checkpointed))
            self._last = last_hidden(self._model, batch)
        return self._last.detach()

    def backward(self, gradient: Tensor) -> None:
        assert self._last is not None, "nothing went forwards"
        if not self._last.requires_grad:  # reversible layers (Reformer) differentiate in their own way
            raise InputError(f"no gradient comes through the blocks of {type(self._model).__name__}; use --controller none")
        self._flushed.clear()
        torch.autograd.backward([self._last], [gradient])
        self._last = None
        for index in range(
            len(self._blocks)
        ):  # the first, whose input has no gradient, and what follows blocks without matrices
            if index not in self._flushed:
                self.network.flush(index)

    @torch.no_grad()
    def look(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.look_alone(batch), self._dense(batch)

    @torch.no_grad()
    def look_alone(self, batch: Tensor) -> Tensor:
        return last_hidden(self._model, batch)

    def portions(self, windows: Tensor, tokens: int) -> list[Tensor]:
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
        """A block's forward that keeps its inputs alone for the pass backwards. In evaluation mode, nothing in it is drawn."""

        def block(*args: Any, **kwargs: Any) -> Any:
            output = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            self._tidy()
            return output

        return block

    def _tidy(self) -> None:
        """Gives the memory of activations back to the system, before what is kept comes to lie in between."""
        if self._recompute and self.device.type == "cpu":
            give_back_memory()

    def _flush(self, index: int) -> Any:
        """A block has its gradients when that of its input is complete. The first block's input has none."""

        def flush(gradient: Tensor) -> None:
            self._flushed.add(index)
            self.network.flush(index)
            self._tidy()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(flush)

        return before

    def _pull(self, states: list[Tensor], between: Between) -> Any:
        def after(module: nn.Module, args: object, output: Any) -> None:
            hidden = hidden_of(output)
            pull = between(hidden, states.pop(0), len(self._blocks))
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradient + pull)  # type: ignore[no-untyped-call]

        return after


class Streamed:
    """Passes of a model whose blocks are in memory one at a time.

    stash: where hidden states lie between the blocks.
    """

    def __init__(self, model: nn.Module, replay: Replay, network: StraightThrough, stash: Stash | None = None) -> None:
        self._model, self._replay, self.network = model, replay, network
        self._stash = stash or Stash()
        self._ids: list[Tensor] = []  # of the windows of each part
        self._inputs: list[list[Tensor]] = []  # by block, by part
        self._pulls: list[list[Tensor]] = []
        self._last: list[Tensor] = []  # of the last block, by part

    @property
    def device(self) -> torch.device:
        return self._replay.device

    @torch.no_grad()
    def forward(self, batch: Tensor, between: Between | None = None) -> tuple[Tensor, Tensor]:
        ours, theirs = self._enter_both(batch)
        self._inputs, self._pulls, blocks = [], [], len(self._replay)
        for index in range(blocks):
            self._keep(index, ours)
            with self._replay.residency(index):
                self._pulls.append(self._run_both(index, ours, theirs, between if index + 1 < blocks else None))
        self._last = ours
        return self._final(ours), self._final(theirs)

    @torch.no_grad()
    def forward_alone(self, batch: Tensor) -> Tensor:
        ours = self._enter(batch)
        self._inputs, self._pulls = [], [[] for _ in range(len(self._replay))]
        for index in range(len(self._replay)):
            self._keep(index, ours)
            self._run(index, ours)
        self._last = ours
        return self._final(ours)

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> None:
        gradients = torch.split(gradient, [len(ids) for ids in self._ids])
        pieces = [self._pull_back(*part) for part in zip(self._last, gradients, self._ids, strict=True)]
        self._last = []
        for index in reversed(range(len(self._replay))):
            with self._replay.residency(index):
                for part, hidden in enumerate(self._inputs[index]):
                    if self._pulls[index]:
                        pieces[part] = pieces[part] + self._pulls[index][part]
                    with torch.enable_grad():
                        leaf = self._here(hidden).detach().requires_grad_()
                        output = self._replay.run(index, leaf, self._ids[part])
                    torch.autograd.backward([output], [self._here(pieces[part])])
                    assert leaf.grad is not None
                    pieces[part] = self._stash.put(f"gradient-{part}", leaf.grad)
                self.network.flush(index)

    @torch.no_grad()
    def look(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        ours, theirs = self._enter_both(batch)
        for index in range(len(self._replay)):
            with self._replay.residency(index):
                self._run_both(index, ours, theirs)
        self._last = []
        return self._final(ours), self._final(theirs)

    @torch.no_grad()
    def look_alone(self, batch: Tensor) -> Tensor:
        ours = self._enter(batch)
        for index in range(len(self._replay)):
            self._run(index, ours)
        self._last = []
        return self._final(ours)

    def portions(self, windows: Tensor, tokens: int) -> list[Tensor]:
        return [windows]

    def head(self, text: Tensor, vocabulary: int | None = None) -> Head:
        probe = text[:1, :8]
        with self.network.dense():
            hidden = self._replay.leave(self._replay.enter(probe), probe)
            return Head(self._model, text, vocabulary).fit(self._model, lambda model: self._replay.around(model, probe), hidden)

    def _enter(self, batch: Tensor) -> list[Tensor]:
        """The first block's inputs, in parts."""
        self._ids = batches(batch, PART_TOKENS)
        return [self._put("student", part, self._replay.enter(windows)) for part, windows in enumerate(self._ids)]

    def _enter_both(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The first block's inputs for both models."""
        ours = self._enter(batch)
        return ours, [self._put("teacher", part, hidden) for part, hidden in enumerate(ours)]

    def _keep(self, index: int, ours: list[Tensor]) -> None:
        """Keeps a block's inputs for the pass backwards."""
        self._inputs.append([self._put(f"input-{index}", part, hidden) for part, hidden in enumerate(ours)])

    def _run(self, index: int, ours: list[Tensor]) -> None:
        """Puts a block's outputs in place of its inputs."""
        with self._replay.residency(index):
            for part, hidden in enumerate(ours):
                ours[part] = self._put("student", part, self._replay.run(index, self._here(hidden), self._ids[part]))

    def _run_both(self, index: int, ours: list[Tensor], theirs: list[Tensor], between: Between | None = None) -> list[Tensor]:
        """Puts a block's outputs in place of its inputs; gives the gradients of their distance, if there is one."""
        pulls = []
        for part in range(len(ours)):
            student = self._replay.run(index, self._here(ours[part]), self._ids[part])
            with self.network.dense():
                target = self._replay.run(index, self._here(theirs[part]), self._ids[part])
            if between:
                pulls.append(self._put(f"pull-{index}", part, between(student, target, len(self._replay))))
            theirs[part], ours[part] = self._put("teacher", part, target), self._put("student", part, student)
        return pulls

    def _final(self, hidden: list[Tensor]) -> Tensor:
        final = [self._replay.leave(self._here(part), ids) for part, ids in zip(hidden, self._ids, strict=True)]
        return torch.cat(final) if final else torch.empty(0, 0, 0)  # a process may have no window, and yet goes along

    def _pull_back(self, last: Tensor, gradient: Tensor, ids: Tensor) -> Tensor:
        """From the gradient at the final hidden states to that at the last block's output."""
        with torch.enable_grad():
            leaf = self._here(last).detach().requires_grad_()
            final = self._replay.leave(leaf, ids)
        return torch.autograd.grad(final, leaf, gradient)[0]

    def _put(self, name: str, part: int, hidden: Tensor) -> Tensor:
        return self._stash.put(f"{name}-{part}", hidden)

    def _here(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._replay.device)
