"""Counts the bytes of tensors while a model computes, or pretends to: those that are there, not what an allocator has taken."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside ``with``, counts the bytes of tensors that operations make. most: there were at once, of those not yet gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._there: set[int] = set()  # storages

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_place(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        output = func(*args, **(kwargs or {}))
        for one in tree_leaves(output):
            if isinstance(one, Tensor) and (place := _place(one)) not in self._there | given:  # a view makes nothing
                storage = one.untyped_storage()
                self._there.add(place)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, place, storage.nbytes())
        self.most = max(self.most, self._now)
        return output

    def _gone(self, place: int, size: int) -> None:
        self._there.discard(place)
        self._now -= size


def _place(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place
