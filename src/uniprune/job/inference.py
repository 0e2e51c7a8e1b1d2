"""Public functions run a model that the caller has loaded as they run their own: in evaluation mode, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from uniprune.checkpoints.configuration import text_config
from uniprune.common.pictures import showing, shown
from uniprune.models.loading import Loaded

P = ParamSpec("P")
T = TypeVar("T")


def inferring(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: while the function runs, each ``Loaded`` model among its arguments is as in :func:`evaluating`; afterwards
    it is given the images that it was given before, none as a rule.

    ``Trainer`` leaves a model in training mode. With dropout on, losses would be those of another model, and different in each
    call; and a backward pass of the controller would leave gradients in ``.grad``, which the caller's next optimizer step would
    apply. The caller's ``torch.inference_mode`` is switched off meanwhile: the controller needs tensors that autograd can use.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), ExitStack() as stack:
            if torch.get_default_device().type != "cpu":  # tokens and generators are made there
                stack.enter_context(torch.device("cpu"))
            for given in (*args, *kwargs.values()):
                if isinstance(given, Loaded):
                    stack.enter_context(evaluating(given.model))
                    stack.enter_context(showing(given.model, shown(given.model)))
            return function(*args, **kwargs)

    return wrapper


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside ``with``, the model is in evaluation mode, gives outputs by name, runs what it was before ``compile()``, and no
    parameter requires a gradient; afterwards all is as before."""
    config: Any = getattr(model, "config", None)
    parts = (config, text_config(config)) if hasattr(config, "get_text_config") else (config,)
    tuples = [part for part in parts if getattr(part, "return_dict", True) is False]
    training = [module for module in model.modules() if module.training]
    trainable = [each for each in model.parameters() if each.requires_grad and not each.is_inference()]
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl is not None}
    model.eval()
    for module in compiled:  # a graph knows nothing of the masks and the hooks that are put into the model
        module._compiled_call_impl = None
    for part in tuples:
        part.return_dict = True
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for part in tuples:
            part.return_dict = False
        for parameter in trainable:
            parameter.requires_grad_()
        for module in training:
            module.training = True
        for module, call in compiled.items():
            module._compiled_call_impl = call
