"""The command ``mask``: scores -> masks of one sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uniprune.artefacts.masks import write_masks
from uniprune.artefacts.reports import Masked, realised
from uniprune.artefacts.scores import ScoresFile
from uniprune.errors import InputError
from uniprune.job.recipe import Recipe
from uniprune.models.loading import dtype_name
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.hardware import check_prunes, fitted
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.structure import structure
from uniprune.sparsity.views import comparable_for
from uniprune.storage import files
from uniprune.storage.dtypes import PLAIN

BUDGET = ("sparsity_type", "allow", "rules", "hardware", "unsupported")


def mask(
    scores: str | Path,
    sparsity: str | float | Pattern | None,
    output: str | Path,
    *,
    scope: Scope | None = None,
    overwrite: bool = False,
    **budget: Any,
) -> Masked:
    """Cuts masks of one sparsity from a scores file and writes them; returns the realised sparsity.

    budget: ``sparsity_type``, ``allow``, ``rules``, ``hardware`` and ``unsupported``, as in :class:`Recipe`. Raises InputError
    for other settings: scores say already how they were made, and of which matrices.
    """
    if other := sorted(Recipe.named(budget).keys() - set(BUDGET)):
        raise InputError(f"mask: {other[0]} is no setting of masks; it has: {', '.join(('scope', *BUDGET))}")
    scores, output = files.path_of(scores), files.path_of(output)
    files.check_output_file(output, overwrite, scores)
    if sparsity is None:
        raise InputError("no sparsity given; use --sparsity 0.5 or --sparsity 2:4")
    saliency = ScoresFile(scores)
    recipe = Recipe(sparsity=sparsity, scope=scope, **budget)
    asked = recipe.pattern(saliency.comparable)

    def dtype(name: str) -> str:
        stored = saliency.facts.digests[name].split()[0]
        return dtype_name(PLAIN.get(stored, stored))

    pattern, unsupported = fitted(asked, saliency.shapes, dtype, recipe.hardware, recipe.unsupported)
    check_prunes(pattern, unsupported, saliency.shapes)
    saliency.warn_unless_for([asked])
    masks = pattern(comparable_for(saliency, pattern))
    removed = write_masks(output, masks, saliency.shapes, saliency.facts, str(pattern))
    return Masked(
        pattern=str(pattern), structure=structure(pattern), unsupported=unsupported, **realised(removed, saliency.shapes)
    )
