"""Runs a model over token windows as a whole, and reroutes its blocks while it runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.common import pictures
from uniprune.errors import InputError, first_line

logger = logging.getLogger(__name__)

BATCH_TOKENS = 2048
OVERFLOW = "puts out NaN or infinity; calibrate in another dtype (--dtype bfloat16 or float32), or check its weights"

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
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("meta"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type that a model computes in, as its first parameter has it."""
    return next(model.parameters()).dtype


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
        return [module(input_ids=ids[None], use_cache=False, **pictures.inputs_of(model, ids)) for ids in batch]


def after_backbone(model: nn.Module, hidden: Tensor) -> Tensor:
    """The logits ``[..., vocabulary]`` that the model itself makes of final hidden states ``[..., width]``."""
    states = hidden.reshape(-1, *hidden.shape[-2:])
    blank = torch.zeros(states.shape[:2], dtype=torch.int64, device=hidden.device)
    given = _backbone_output()(last_hidden_state=states)
    with rerouted([_backbone(model)], lambda index, forward: lambda *args, **kwargs: given):
        logits: Tensor = model(input_ids=blank, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], -1)


@cache
def _backbone_output() -> Any:
    """The class of what a backbone puts out that has final hidden states alone: PyTorch registers each such class for good."""
    from transformers.modeling_outputs import BaseModelOutput

    class States(BaseModelOutput):  # type: ignore[misc]
        def __getattr__(self, name: str) -> None:
            """What else a backbone puts out, such as its images' hidden states: nothing."""
            if name.startswith("__"):
                raise AttributeError(name)

    return States


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


def hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a block puts out, with other hidden states."""
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block puts out."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(hidden, Tensor)
    return hidden


def others_of(output: Any) -> tuple[Any, ...]:
    """What a block puts out beside hidden states."""
    return tuple(output[1:]) if isinstance(output, (tuple, list)) else ()


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
