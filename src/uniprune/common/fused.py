"""Functions of tensors that are few kernels on a GPU: in Triton there, and in plain PyTorch everywhere else."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Specialisation = Callable[..., Hashable]
CLOSE = 1e-3  # of the largest value: how far a kernel may be from plain PyTorch, which sums in another order

logger = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Inside ``with``, a CUDA device is the current one, which Triton and cuSPARSELt launch on, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Fused(Generic[Function]):
    """A function whose first argument is a tensor, and that gives one or several.

    plain: in PyTorch, what it is. kernels: how many it is on a GPU, at most. triton: the function that launches them, in a
    module that is imported then, as ``module:name``. The first time that it is used it is held against ``plain``: where it
    fails, or gives something else, plain is used from then on. representative: whether a call goes through all that the
    kernels compute; until one does, plain is used. specialised_on: what, besides the tensor's type, a kernel is compiled for:
    each is held against plain by itself.
    """

    def __init__(
        self,
        plain: Function,
        kernels: int,
        triton: str,
        representative: Callable[..., bool] | None = None,
        specialised_on: Specialisation | None = None,
    ) -> None:
        wraps(plain)(self)
        self.plain, self.kernels, self._triton = plain, kernels, triton
        self._representative, self._specialised_on = representative, specialised_on
        self._chosen: dict[Hashable, Callable[..., Any]] = {}

    @property
    def launcher(self) -> Callable[..., Any]:
        """The function in Triton."""
        module, _, name = self._triton.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found

    def __call__(self, tensor: Tensor, *others: Any, **settings: Any) -> Any:
        if not (on_gpu(tensor) and available()):
            return self.plain(tensor, *others, **settings)
        key = tensor.dtype, self._specialised_on(tensor, *others, **settings) if self._specialised_on else None
        if key not in self._chosen:
            if self._representative is not None and not self._representative(tensor, *others, **settings):
                return self.plain(tensor, *others, **settings)
            return self._choose(key, tensor, *others, **settings)
        with current(tensor.device):
            return self._chosen[key](tensor, *others, **settings)

    def _choose(self, key: Hashable, *tensors: Any, **settings: Any) -> Any:
        expected = self.plain(*tensors, **settings)
        try:
            launcher = self.launcher
            with current(tensors[0].device):
                problem = "" if agree(launcher(*tensors, **settings), expected) else "it gives something else"
            self._chosen[key] = launcher
        except torch.OutOfMemoryError:  # there are two results now: what the kernel gives, a later call will tell
            return expected
        except Exception as error:  # whatever goes wrong in a compiler, there is another way
            problem = f"{type(error).__name__}: {error}"
        if problem:
            logger.warning("the kernel of %s is not used on this GPU: %s", self.plain.__name__, problem)
            self._chosen[key] = self.plain
        return expected


def agree(found: Any, expected: Any) -> bool:
    """Whether two results are the same, numbers but for rounding."""
    if not isinstance(expected, Tensor):
        return len(found) == len(expected) and all(map(agree, found, expected))
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if expected.dtype == torch.bool:
        return torch.equal(found, expected)
    if not expected.is_floating_point():  # rounded to integers
        return not expected.numel() or int((found.int() - expected.int()).abs().max()) <= 1
    most = float(expected.abs().nan_to_num(0, 0).max()) if expected.numel() else 0.0
    rounding = 2 * torch.finfo(expected.dtype).eps
    return torch.allclose(found.float(), expected.float(), rtol=rounding, atol=CLOSE * most, equal_nan=True)


def fused(
    kernels: int,
    triton: str,
    representative: Callable[..., bool] | None = None,
    specialised_on: Specialisation | None = None,
) -> Callable[[Function], Fused[Function]]:
    """Decorates a plain function, see :class:`Fused`."""
    return lambda plain: Fused(plain, kernels, triton, representative, specialised_on)
