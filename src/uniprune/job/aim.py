"""What a recipe is to take away from a model: its pattern, fitted to the matrices, or the size that the archive may have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from uniprune.artefacts import archive_size
from uniprune.checkpoints.origin import Origin
from uniprune.common import formatting
from uniprune.job.recipe import Recipe
from uniprune.models.loading import Loaded, dtype_name, parse_dtype
from uniprune.models.matrices import Matrices
from uniprune.sparsity.hardware import fitted
from uniprune.sparsity.patterns.protocol import Pattern, Saliency
from uniprune.storage.dtypes import PLAIN


@dataclass(frozen=True)
class Aim:
    """What a recipe asks for, resolved for a model's matrices.

    unsupported: matrices that cannot have the pattern, and why. budget: if a size was asked for; sparsity: that meets it.
    """

    pattern: Pattern | None
    unsupported: dict[str, str]
    budget: archive_size.Budget | None
    sparsity: float | None

    def with_scores(self, saliency: Saliency) -> Aim:
        """For a size budget: the same at the sparsity that meets it with these scores; without scores it is an estimate."""
        if self.budget is None:
            return self
        sparsity = self.budget.sparsity(saliency)
        return replace(self, sparsity=sparsity, pattern=self.budget.at(sparsity))


def aim_of(recipe: Recipe, matrices: Matrices, source: Loaded | Origin) -> Aim:
    """The pattern that a recipe asks for; and its size budget, if it has one and ``source`` has weights that can be read."""

    def at(sparsity: float | None) -> Pattern:
        pattern, _ = _pattern_of(recipe, matrices, source.origin, sparsity)
        assert pattern is not None
        return pattern

    budget = None
    if recipe.size is not None and source.checkpoint is not None:
        budget = archive_size.budget(formatting.parse_size(recipe.size), source, matrices, at, at(None))
    sparsity = budget.sparsity() if budget else None
    return Aim(*_pattern_of(recipe, matrices, source.origin, sparsity), budget, sparsity)


def _pattern_of(
    recipe: Recipe, matrices: Matrices, origin: Origin | None, sparsity: float | None
) -> tuple[Pattern | None, dict[str, str]]:
    """The pattern of a recipe, if it has one, with rules for the matrices that cannot have it; and those, with the reasons.

    sparsity: what a size became; the lowest while that is not known.
    """
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    if recipe.size is not None:
        recipe = recipe.at(archive_size.lowest(recipe.at(recipe.lowest).pattern(), shapes) if sparsity is None else sparsity)
    if recipe.sparsity is None:
        return None, {}
    dtype = partial(_written_dtype, recipe, matrices, origin)
    return fitted(recipe.pattern(), shapes, dtype, recipe.hardware, recipe.unsupported)


def _written_dtype(recipe: Recipe, matrices: Matrices, origin: Origin | None, name: str) -> str:
    """The type that a matrix is written in, such as ``bfloat16``; of quantised tensors the name that safetensors has."""
    if origin is not None and origin.files:
        stored = origin.files.stored(name).dtype
        return dtype_name(PLAIN.get(stored, stored))
    whole = matrices[name].whole
    return dtype_name((parse_dtype(recipe.dtype) or torch.float32) if whole.is_meta else whole.dtype)  # meta: of a GGUF file
