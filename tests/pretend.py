"""A device that does not exist: tensors on it compute on the CPU, and say what a GPU would have had to do.

Inside :func:`device`, ``pretend:0`` is a device like another. An operation that mixes its tensors with the CPU's raises, as on
CUDA; so does looking at one as an array. What is counted: kernels launched (views and metadata are free), bytes copied up and
down, and the moments at which the host waits for the device, because it wants to see a value or a size that depends on one.

Tensors are PyTorch's wrapper subclasses around a CPU tensor, on the device type that PyTorch keeps free for others
(PrivateUse1); backward passes go through the autograd engine itself. Attention is one kernel, as it is on a GPU, and what is
written in Triton (``uniprune.common.fused``) as many as it says, though what runs is the plain function beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"


class _Module(_DummyBackendModule):
    """What ``torch.pretend`` is."""

    def is_available(self) -> bool:
        return False  # who is not told to use it does not

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]  # activation checkpointing asks which types mixed precision would have

    def get_device_name(self, device: torch.device) -> str:
        return "a device that does not exist"


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
WAITING = {  # the host sees a value, or a size that depends on one
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "_local_scalar_dense"}  # memory, not work
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


@dataclass
class Counts:
    """What was done on the device: kernels by name, waits by cause, bytes copied to it and from it."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    up: int = 0
    down: int = 0
    silent: bool = False  # inside something that counts for itself

    @property
    def launches(self) -> int:
        return self.kernels.total()

    @property
    def syncs(self) -> int:
        return self.waits.total()

    def launch(self, name: str, times: int = 1) -> None:
        if not self.silent:
            self.kernels[name] += times

    def wait(self, cause: str) -> None:
        if not self.silent:
            self.waits[cause] += 1

    def snapshot(self) -> dict[str, int]:
        return {"launches": self.launches, "syncs": self.syncs, "up": self.up, "down": self.down}

    def since(self, before: dict[str, int]) -> dict[str, int]:
        """What was added to an earlier snapshot."""
        return {name: value - before[name] for name, value in self.snapshot().items()}


counts = Counts()


class Pretend(torch.Tensor):
    """A tensor on the device; ``inner`` is where it really is."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretend:
        outer = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        outer.inner = inner
        return outer

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretend({tuple(self.shape)}, {self.dtype})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        counts.wait("tolist")
        return self.inner.tolist()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    ours, asked = [tensor for tensor in tensors if isinstance(tensor, Pretend)], kwargs.get("device")
    up = asked is not None and torch.device(asked).type == NAME
    if not ours and not up:
        return func(*args, **kwargs)
    if func not in COPIES:
        _check_mixed(func, tensors, ours)
    _count(func, args, kwargs, tensors, ours)
    inner = tree_map(_unwrapped, dict(kwargs))
    if asked is not None:
        inner["device"] = torch.device("cpu") if up else asked
    if up:
        inner.pop("pin_memory", None)
    found = func(*tree_map(_unwrapped, args), **inner)
    if (written := _written(func, args, kwargs)) is not None:
        return written
    return tree_map(_wrapped, found) if up or asked is None else found


def _check_mixed(func: Any, tensors: list[torch.Tensor], ours: list[Pretend]) -> None:
    """Scalars may come from anywhere, and so may indices."""
    others = [one for one in tensors if not isinstance(one, Pretend) and one.dim() and not one.is_meta]
    if ours and others and func not in INDEXING:
        shapes = ", ".join(f"{tuple(one.shape)} on {one.device}" for one in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} has {shapes}")


def _count(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], ours: list[Pretend]) -> None:
    name = func._schema.name.removeprefix("aten::")
    if _is_view(func):
        return
    if name not in FREE:
        counts.launch(name)
    if func in COPIES:
        source = tensors[-1]
        target = args[0].device if func is aten.copy_.default else torch.device(kwargs.get("device") or source.device)
        if source.device.type != target.type:
            _count_copy(source, target)
    if func in WAITING and ours:
        counts.wait(name)
    if func in INDEXING:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                counts.wait("index by booleans")
            if index is not None and not isinstance(index, Pretend) and index.dim():
                _count_copy(index, DEVICE)


def _count_copy(source: torch.Tensor, target: torch.device) -> None:
    if counts.silent:
        return
    if target.type == NAME:
        counts.up += source.numel() * source.element_size()
    else:
        counts.down += source.numel() * source.element_size()
        counts.wait("copy to the host")


def _is_view(func: Any) -> bool:
    """Whether an operation only looks at memory in another way, or tells what it is."""
    returns = func._schema.returns
    return all(one.alias_info is not None and not one.alias_info.is_write for one in returns) and bool(returns)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation in place, or with ``out``, was given to write to."""
    returns = func._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    return kwargs.get("out", args[0] if args else None)


def _unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, Pretend) else value


def _wrapped(value: Any) -> Any:
    return Pretend(value) if isinstance(value, torch.Tensor) and not isinstance(value, Pretend) else value


class _Dispatch(TorchDispatchMode):
    """Tensors that are made on the device, of nothing that is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """``torch.tensor`` of Python numbers, which does not pass through the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            del kwargs["device"]
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """One kernel forwards, and one backwards, which runs it again."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, rest: dict[str, Any]) -> Any:  # type: ignore[override]
        ctx.save_for_backward(query, key, value)
        ctx.rest = rest
        with _one("attention", query):
            return _math(query, key, value, **rest)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        with _one("attention backwards", gradient), torch.enable_grad():
            leaves = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
            return *torch.autograd.grad(_math(*leaves, **ctx.rest), leaves, gradient), None


@contextmanager
def _one(name: str, tensor: Any, kernels: int = 1) -> Iterator[None]:
    """What happens inside counts as one kernel, or a few."""
    if isinstance(tensor, Pretend):
        counts.launch(name, kernels)
    before, counts.silent = counts.silent, True
    try:
        yield
    finally:
        counts.silent = before


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
    rest = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return _Attention.apply(query, key, value, rest)


def _math(query, key, value, *, attn_mask, is_causal, scale, enable_gqa):  # type: ignore[no-untyped-def]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query @ key.transpose(-2, -1)) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def _in_triton() -> Any:
    """A patch of fused functions; versions that have none need none."""
    try:
        from uniprune.common.fused import Fused
    except ImportError:
        return nullcontext()

    def call(self: Any, *tensors: Any, **settings: Any) -> Any:
        with _one(self.plain.__name__, tensors[0], self.kernels):
            return self.plain(*tensors, **settings)

    return mock.patch.object(Fused, "__call__", call)


@contextmanager
def attention() -> Iterator[None]:
    """Attention as the device computes it, also on the CPU, so that both give the same bits."""
    with mock.patch.object(functional, "scaled_dot_product_attention", _attention):
        yield


@contextmanager
def device() -> Iterator[Counts]:
    """The device, for the length of a ``with`` block, and what is done on it."""
    global counts
    with ExitStack() as stack:
        counts = Counts()
        # What is moved to another device stays the parameter that it was, and so stays tied to what it is tied to.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        for mode in (attention(), _in_triton(), _Functions(), _Dispatch()):
            stack.enter_context(mode)
        yield counts
