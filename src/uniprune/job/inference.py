"""Models that a caller has loaded compute as those that verbs load themselves: in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import nn

from uniprune.models.loading import Loaded

P = ParamSpec("P")
T = TypeVar("T")


def inferring(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb while which models that are passed to it loaded have no dropout; afterwards they are in the mode they were in.

    ``Trainer`` leaves a model in training mode: its losses would be those of a thinned model, and others with every call.
    """

    @wraps(verb)
    def quietly(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            for given in (*args, *kwargs.values()):
                if isinstance(given, Loaded):
                    stack.enter_context(evaluating(given.model))
            return verb(*args, **kwargs)

    return quietly


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside ``with``, the model is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
