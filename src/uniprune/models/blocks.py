"""Runs a model over token windows: whole, or block after block.

Block after block, a block is called with the very arguments that the model itself passes to it: they are captured while the
model's own forward pass runs over hollow blocks, and replayed, never rebuilt by hand, so that nothing here knows what an
attention mask looks like. Hollow blocks hand their input on: no weight of a block is needed to learn its arguments, or to
have what the model does before the first block and after the last one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.common import pictures
from uniprune.errors import InputError, UniPruneError, first_line
from uniprune.storage.stash import Stash

logger = logging.getLogger(__name__)

BATCH_TOKENS = 2048
OVERFLOW = "puts out NaN or infinity; calibrate in another dtype (--dtype bfloat16 or float32), or check its weights"
PROBE_TOKENS = 16

Residency = Callable[[int], AbstractContextManager[Any]]
"""Given a block's index, a context inside which that block's weights are in memory."""


def resident(index: int) -> AbstractContextManager[None]:
    """The residency of a model that is in memory as a whole."""
    return nullcontext()


def batches(windows: Tensor, tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """Windows ``[n, length]`` in batches of about ``tokens`` tokens, at least one window each."""
    per_batch = max(1, tokens // windows.shape[1])
    return [windows[start : start + per_batch] for start in range(0, len(windows), per_batch)]


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: blocks that wait for their turn are on the meta device, the rest is not."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)


def last_hidden(model: nn.Module, batch: Tensor) -> Tensor:
    """Final hidden states ``[windows, length, width]``: what the output head, which is left out, would be given."""
    found = called(_backbone(model), model, batch)
    return torch.cat([output.last_hidden_state for output in found])


def called(module: nn.Module, model: nn.Module, batch: Tensor) -> list[Any]:
    """What a model, or its backbone, puts out for token ids ``[windows, length]``: at once, or each with its images."""
    batch = batch.to(device_of(model))
    with text_alone(model):
        if pictures.shown(model) is None:
            return [module(input_ids=batch, use_cache=False)]
        return [module(input_ids=ids[None], use_cache=False, **pictures.beside(model, ids)) for ids in batch]


def after_backbone(model: nn.Module, hidden: Tensor) -> Tensor:
    """The logits ``[..., vocabulary]`` that the model itself makes of final hidden states ``[..., width]``."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    states = hidden.reshape(-1, *hidden.shape[-2:])
    blank = torch.zeros(states.shape[:2], dtype=torch.int64, device=hidden.device)
    given = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)
    with rerouted([_backbone(model)], lambda index, forward: lambda *args, **kwargs: given):
        logits: Tensor = model(input_ids=blank, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], -1)


@contextmanager
def text_alone(model: nn.Module) -> Iterator[None]:
    """Where a model is given text alone. Raises InputError for one that does not go without an image."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if "pixel_values" not in str(error):
            raise
        raise InputError(
            f"{type(model).__name__} needs an image with every text ({first_line(error)}); only models that read text alone as "
            "well can be calibrated and evaluated; --metric magnitude --controller none reads none"
        ) from error


def _backbone(model: nn.Module) -> nn.Module:
    """The model without its output head. Some have no part by the name that they give for it (Llama 4), and some have a whole
    language model in its place (Kosmos-2.5, Nemotron's omni)."""
    inner: nn.Module = getattr(model, "base_model", model)
    if inner is not model:
        return inner
    within = [child for child in model.children() if hasattr(child, "base_model")]
    if len(within) == 1:
        return within[0]
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    return model if decoder is model else _backbone(decoder)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block puts out."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(hidden, Tensor)
    return hidden


@dataclass(frozen=True)
class Call:
    """The arguments of one block's forward, without the hidden states that flow from block to block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        if self.keyword:
            output = block(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            output = block(hidden, *self.args, **self.kwargs)
        return hidden_of(output)


class Replay:
    """The decoder blocks of a model, called one by one with the arguments that the model itself passes to them.

    residency: what has a block's weights in memory; whoever runs a block does so inside it.
    Raises UniPruneError, at the first windows, if the blocks do not give what the model itself gives: if their arguments
    depend on what other blocks did.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, residency: Residency = resident) -> None:
        self.blocks, self.residency = blocks, residency
        self._model = model
        self._calls: dict[torch.Size, list[Call]] = {}  # by the shape of the windows
        self._latest: tuple[Tensor, list[Call]] | None = None  # where they depend on the tokens: the last windows, and theirs
        self._wrap: Callable[[Tensor], Any] | None = None  # a block's hidden states -> what its forward returns

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return device_of(self._model)

    def enter(self, batch: Tensor) -> Tensor:
        """The first block's input for token ids ``[windows, length]``.

        It is ``[windows, length, width]``, as a rule: XLNet has the axis of tokens first, Gemma 3n one of several streams.
        """
        if self._wrap is None:
            self._wrap = self._wrapping(batch)
            self._verify(forked(batch[0, :PROBE_TOKENS]))
        if batch.shape not in self._calls and self._latest is None:
            self._learn(batch)
        with torch.no_grad():
            inputs, calls, _ = self._through(batch)
        if self._latest is not None:
            self._latest = batch, calls
        return inputs[0]

    def run(self, index: int, hidden: Tensor, ids: Tensor) -> Tensor:
        """A block's output for an input as :meth:`enter` gives it. ids: the windows, which entered before."""
        return self.call(index, ids)(self.blocks[index], hidden)

    def call(self, index: int, ids: Tensor) -> Call:
        """How the model calls a block for windows, which entered before."""
        return self._calls_of(ids)[index]

    @torch.no_grad()
    def _calls_of(self, ids: Tensor) -> list[Call]:
        """How the blocks are called for windows: as for others of their shape, unless it depends on the tokens.

        Some models give their blocks the tokens (DeepSeek-V4, whose first routers go by them) or embeddings of their own
        (Gemma 4). Such calls are as large as hidden states, so only the last are kept; a pass over hollow blocks brings others.
        """
        if self._latest is None:
            return self._calls[ids.shape]
        if not torch.equal(self._latest[0], ids):
            self._latest = ids, self._through(ids)[1]
        return self._latest[1]

    def leave(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What the model makes of the last block's output: the final hidden states ``[windows, length, width]``."""
        return self._through(ids, hidden)[2]

    def around(self, module: nn.Module, batch: Tensor, last: Tensor | None = None) -> Any:
        """What ``module``, the model or its backbone, returns when its blocks are hollow. last: what the last one puts out."""
        assert self._wrap is not None, "no window has entered"
        with rerouted(self.blocks, self._hollow_route([], [], last)):
            return module(input_ids=batch.to(device_of(self._model)), use_cache=False)

    def _through(self, batch: Tensor, last: Tensor | None = None) -> tuple[list[Tensor], list[Call], Tensor]:
        """The model's own pass over hollow blocks: their inputs and calls, and the final hidden states.

        last: what the last block is to put out.
        """
        inputs: list[Tensor] = []
        calls: list[Call] = []
        with rerouted(self.blocks, self._hollow_route(inputs, calls, last)):
            return inputs, calls, last_hidden(self._model, batch)

    def _hollow_route(self, inputs: list[Tensor], calls: list[Call], last: Tensor | None) -> Callable[..., Any]:
        """For :func:`rerouted`: hollow blocks, of which the last puts out ``last``."""
        return lambda index, _: self._hollow(inputs, calls, last if index + 1 == len(self.blocks) else None)

    def _hollow(self, inputs: list[Tensor], calls: list[Call], output: Tensor | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            inputs.append(hidden)
            calls.append(call)
            assert self._wrap is not None
            return self._wrap(hidden if output is None else output)

        return forward

    @torch.no_grad()
    def _wrapping(self, batch: Tensor) -> Callable[[Tensor], Any]:
        """How the first block packs what it returns, learnt from a run of it."""
        found: list[Any] = []

        def route(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def stop(*args: Any, **kwargs: Any) -> Any:
                with self.residency(0):
                    found.append(forward(*args, **kwargs))
                raise _Reached

            return stop

        try:
            with rerouted(self.blocks, route):
                last_hidden(self._model, batch[:1, :PROBE_TOKENS])
        except _Reached:
            pass
        (output,) = found
        if not isinstance(output, (tuple, list)):
            return lambda hidden: hidden
        if any(isinstance(other, Tensor) and other.shape == output[0].shape for other in output[1:]):  # Reformer
            kind = type(self.blocks[0]).__name__
            raise UniPruneError(f"blocks of {kind} hand on two streams of hidden states; they cannot be run one by one")
        return lambda hidden: type(output)((hidden, *output[1:]))

    @torch.no_grad()
    def _learn(self, batch: Tensor) -> None:
        """How the blocks are called for windows of a shape, and whether that depends on the tokens."""
        _, calls, _ = self._through(batch)
        _, others, _ = self._through(batch.flip(-1))
        pairs = zip(calls, others, strict=True)
        if all(_same(call.args, other.args) and _same(call.kwargs, other.kwargs) for call, other in pairs):
            self._calls[batch.shape] = calls
        else:
            self._latest = batch, calls

    @torch.no_grad()
    def _verify(self, probe: Tensor) -> None:
        """A few tokens through the model itself, each block loaded once, and beside it through the blocks alone.

        Alone, each is called with arguments that no other block was run with: some hand on keys and values in an object that
        all are given (Gemma 3n and 4). With several batches those would be of the last one.
        """
        self._learn(probe)
        alone = [self._through(probe)[0][0]]

        def route(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def both(*args: Any, **kwargs: Any) -> Any:
                with self.residency(index):
                    output = forward(*args, **kwargs)
                    if not bool(torch.isfinite(hidden_of(output)).all()):
                        raise InputError(f"block {index} {OVERFLOW}")
                    call = self._through(probe)[1][index]
                    try:
                        alone.append(call(forward, alone.pop()))
                    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                        raise _entangled(self.blocks, f" ({first_line(error)})") from error
                return output

            return both

        with rerouted(self.blocks, route):
            expected = last_hidden(self._model, probe)
        warn_unless_causal(self._model, expected)
        found = self.leave(alone.pop(), probe)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise _entangled(self.blocks)


def _entangled(blocks: nn.ModuleList, why: str = "") -> UniPruneError:
    return UniPruneError(
        f"blocks of {type(blocks[0]).__name__} depend on each other beyond their inputs{why}; they cannot be run one by one: "
        "give memory for the whole model (--max-memory), and leave out --sequential and --refine"
    )


def forked(tokens: Tensor) -> Tensor:
    """Token ids ``[length]``, and below them the same with another last one: before it a causal model sees no difference."""
    other = tokens.clone()
    other[-1] = next((token for token in tokens[:-1] if token != tokens[-1]), tokens[-1])
    return torch.stack([tokens, other])


def warn_unless_causal(model: nn.Module, hidden: Tensor) -> None:
    """Says so if tokens see those after them: final hidden states ``[2, length, width]`` are those of :func:`forked` tokens."""
    if not bool(torch.isfinite(hidden).all()):  # somebody else says so
        return
    one, other = hidden[:, :-1].float()
    rounding, largest = 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 0.03, float(one.abs().max())
    if not math.isfinite(largest):
        return  # an overflow, which is named where it happens
    if not torch.allclose(one, other, rtol=rounding, atol=rounding * largest):
        logger.warning(
            "tokens of %s see those that follow, as in an encoder: it does not predict the next token, so perplexities and the "
            "controller's scores say little; --controller none needs neither",
            type(model).__name__,
        )


class Blocks:
    """The decoder blocks of a model over a set of windows, to be run one after the other.

    hidden: the inputs of the next block, one tensor per batch (:meth:`Replay.enter`), kept in ``stash``. done: blocks
    that have been run over the same windows before; their outputs are still in the stash.
    """

    def __init__(self, replay: Replay, windows: Tensor, stash: Stash | None = None, done: int = 0) -> None:
        self._replay, self._stash, self._done = replay, stash or Stash(), done
        self._batches = batches(windows)
        into = self._stash.take if done else self._stash.put
        self.hidden = [into(_slot(number, done), replay.enter(batch)) for number, batch in enumerate(self._batches)]

    def beside(self, windows: Tensor, stash: Stash) -> Blocks:
        """The same blocks over other windows, as far as these are; run them in turn."""
        return Blocks(self._replay, windows, stash, self._done)

    def __len__(self) -> int:
        return len(self._replay)

    def __iter__(self) -> Iterator[int]:
        """The indices of the blocks to be run; each block's weights are in memory until the next one is asked for."""
        for index in range(self._done, len(self._replay)):
            with self._replay.residency(index):
                yield index

    @torch.no_grad()
    def run(self, index: int, advance: bool = False) -> None:
        """Runs one block on the current hidden states; with ``advance`` its outputs take their place."""
        for number, hidden in enumerate(self.hidden):
            output = self._replay.run(index, hidden.to(self._replay.device), self._batches[number])
            if advance:
                self.hidden[number] = self._stash.put(_slot(number, index + 1), output)


def _slot(batch: int, block: int) -> str:
    """Inputs of one block never overwrite those of the block before: until it is known to be done, they may be needed again."""
    return f"hidden-{batch}-{block % 2}"


@contextmanager
def rerouted(modules: Iterable[nn.Module], route: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside ``with``, each module's forward is what ``route`` makes of its place and its own forward.

    Afterwards each has its own again: its class's, or what somebody else had put on the instance (accelerate's hooks, kernels).
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for index, module in enumerate(modules):
            replaced.append((module, vars(module).get("forward")))
            module.forward = route(index, module.forward)  # type: ignore[method-assign]
        yield
    finally:
        for module, own in reversed(replaced):
            if own is None:
                del module.forward  # the class's own forward shows again
            else:
                module.forward = own


class _Reached(Exception):
    """The first block was run; the rest of the forward pass is not needed."""


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs, keyword=False)
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], Call((), rest, keyword=True)


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, tensors and what holds them included; objects of other kinds count as equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b)
