"""Saliencies, matrix name -> scores ``[out, in]``, seen in another way without a copy of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from uniprune.sparsity.patterns.protocol import Pattern


class Scores(Mapping[str, Tensor]):
    """A saliency that says whether it is ``comparable``: whether one budget may compare the scores of different matrices.

    And how many scores a matrix has, if it knows that without computing them.
    """

    comparable = False

    def size(self, name: str) -> int:
        return self[name].numel()


class View(Scores):
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

    def size(self, name: str) -> int:
        tell = getattr(self._saliency, "size", None)
        return tell(name) if tell and self._see is None else self[name].numel()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Comparable(View):
    """A view of scores that are comparable: those of all matrices are on one scale."""

    comparable = True


class ScaledToMeanOne(Comparable):
    """A view of a saliency in which every matrix has mean score 1, one matrix at a time.

    One budget over several matrices compares their scores, but local metrics put each matrix on a scale of its own: masked by
    one threshold, raw Wanda scores remove whole matrices and the model collapses.
    """

    def __init__(self, saliency: Mapping[str, Tensor]) -> None:
        super().__init__(saliency, _with_mean_one)

    def size(self, name: str) -> int:
        return View(self._saliency).size(name)


def comparable_for(saliency: Scores, pattern: Pattern) -> Scores:
    """What a pattern creates masks from: the saliency, scaled if the pattern compares matrices and it is not comparable."""
    return saliency if pattern.local or saliency.comparable else ScaledToMeanOne(saliency)


def _with_mean_one(name: str, scores: Tensor) -> Tensor:
    mean = scores.mean(dtype=torch.float64)
    return scores / mean.float() if mean > 0 else scores
