"""Linear layers by what they compute: a subclass may multiply in groups, scale or round, and then it is no ``x @ W.T + b``."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

TOKENS = 3
LARGE = 100.0  # inputs that a clamp would show at


@cache
def conv1d() -> type[nn.Module]:
    """GPT-2's Linear. Importing transformers takes seconds, which who handles scores and masks alone need not wait for."""
    from transformers.pytorch_utils import Conv1D

    found: type[nn.Module] = Conv1D
    return found


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer has its weight as ``[in, out]``."""
    return isinstance(module, conv1d())


def input_axis(module: nn.Module) -> int:
    """The axis of a layer's weight, as stored, that its inputs lie along."""
    return 0 if is_transposed(module) else 1


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is a Linear or a Conv1D by its class."""
    return isinstance(module, nn.Linear) or is_transposed(module)


class Probe:
    """Tells layers that compute ``x @ W.T + b`` from others; those of one class, shape and settings are run once."""

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}

    def __call__(self, module: nn.Module) -> bool:
        """Whether a layer is a Linear or a Conv1D, and multiplies as one."""
        if not is_linear(module):
            return False
        if type(module).forward in (nn.Linear.forward, conv1d().forward):
            return True
        if next(module.children(), None) is not None:
            return _is_plain(module)
        assert isinstance(module.weight, Tensor)
        key = type(module), tuple(module.weight.shape), _settings(module)
        if key not in self._known:
            self._known[key] = _is_plain(module)
        return self._known[key]


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What a layer was told, but for the mode that it is in, and which tensors it has."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, type(None)))}
    plain |= dict.fromkeys(module.state_dict())
    return tuple(sorted((name, value) for name, value in plain.items() if name != "training"))


@torch.no_grad()
def _is_plain(module: nn.Module) -> bool:
    """Runs a twin of a layer, whose parameters and buffers are random, on a few random tokens.

    They are random also where the layer has weights: the answer is that of the skeleton, which has none.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [*module.parameters(), *module.buffers()]
    twin = deepcopy(module, {id(tensor): _random(tensor, generator) for tensor in tensors}).eval()
    vars(twin).pop("forward", None)  # what reroutes a layer for a while is not its own
    weight = twin.weight.T if is_transposed(twin) else twin.weight
    assert isinstance(weight, Tensor)
    x = LARGE * torch.randn(1, TOKENS, weight.shape[1], generator=generator)
    expected = functional.linear(x, weight, twin.bias)  # type: ignore[arg-type]
    try:
        found = twin.forward(x)
    except Exception:  # it is not called with tokens alone
        return False
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found.float(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    )


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    drawn = torch.empty(tensor.shape).uniform_(-1, 1, generator=generator)
    return nn.Parameter(drawn, requires_grad=False) if isinstance(tensor, nn.Parameter) else drawn
