"""Saliencies, matrix name -> scores ``[out, in]``, seen in another way without a copy of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class View(Mapping[str, Tensor]):
    """A saliency through a function of (name, scores), one matrix at a time, when it is asked for.

    see: None leaves the scores as they are. names: the matrices to be seen, all by default.
    """

    def __init__(
        self,
        saliency: Mapping[str, Tensor],
        see: Callable[[str, Tensor], Tensor] | None = None,
        names: Iterable[str] | None = None,
    ) -> None:
        self._saliency, self._see = saliency, see
        self._names = dict.fromkeys(saliency if names is None else names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        scores = self._saliency[name]
        return self._see(name, scores) if self._see else scores

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
