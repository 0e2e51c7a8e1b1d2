"""Models that a caller has loaded compute as those that verbs load themselves: in evaluation mode, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from uniprune.models.loading import Loaded

P = ParamSpec("P")
T = TypeVar("T")


def inferring(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb while which models that are passed to it loaded have no dropout and no gradients; afterwards they are as before.

    ``Trainer`` leaves a model in training mode: its losses would be those of a thinned model, and others with every call. And
    what a controller's pass backwards left in ``.grad``, the caller's next step would move the weights by.
    """

    @wraps(verb)
    def quietly(*args: P.args, **kwargs: P.kwargs) -> T:
        # Tensors that are made in inference mode take no part in a pass backwards, and controllers make some.
        with torch.inference_mode(False), ExitStack() as stack:
            for given in (*args, *kwargs.values()):
                if isinstance(given, Loaded):
                    stack.enter_context(evaluating(given.model))
            return verb(*args, **kwargs)

    return quietly


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside ``with``, the model is in evaluation mode, and no parameter requires a gradient."""
    training = [module for module in model.modules() if module.training]
    learning = [each for each in model.parameters() if each.requires_grad and not each.is_inference()]
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()
        for module in training:
            module.training = True
