"""The command ``plan``: what pruning a model would touch, cost and yield, without reading its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from uniprune.checkpoints.origin import resolve
from uniprune.errors import InputError
from uniprune.experts import removal
from uniprune.job.aim import aim_of
from uniprune.job.forecast import estimate
from uniprune.job.forecast.memory import needs
from uniprune.job.forecast.prospect import prospect_of
from uniprune.job.options import Execution, RunOptions
from uniprune.job.prepare import execution_of
from uniprune.job.recipe import Recipe, check_recipe
from uniprune.job.samples import shape_of_windows
from uniprune.models.loading import load


def plan(
    source: str | Path,
    recipe: Recipe,
    *,
    device: str | None = None,
    max_memory: int | str | None = None,
    execution: Execution | None = None,
) -> estimate.Plan:
    """What pruning this model would touch, cost and yield; writes nothing. Options are as in :func:`prune`.

    It reads no weights, but samples of them for a size: from safetensors files, while a model in another format is loaded.
    """
    check_recipe(recipe)
    origin = resolve(source)
    options = RunOptions.of(device=device, max_memory=max_memory, execution=execution)
    prospect = prospect_of(origin, recipe, options)
    more: dict[str, Any] = {}
    if recipe.experts is not None:
        matrices, more["experts"], more["disk"] = removal.planned(recipe.experts, prospect.model, prospect.matrices)
        prospect = replace(prospect, matrices=matrices)
    windows, length = shape_of_windows(recipe, prospect.model.config)
    work = prospect.work(windows, length)
    needed = needs(work)
    chosen: str
    to_load = recipe.size is not None and not origin.files
    try:
        chosen = execution_of(origin, work, needed, options)
    except InputError:
        if to_load or execution:
            raise
        chosen = "none"
    weights = load(origin, recipe.dtype, "cpu") if to_load else origin
    budget = recipe.sparsity is not None or recipe.size is not None
    refused = budget and recipe.unsupported == "refuse"
    if refused:  # here they are shown
        recipe = recipe.replace(unsupported="dense")
    aim = aim_of(recipe, prospect.matrices, weights)
    made = estimate.make_plan(origin, work, aim.pattern, aim.unsupported, windows * length, needed, chosen, refused)
    if aim.budget:
        more |= {"size": aim.budget.size, "sparsity_for_size": aim.sparsity}
    return made.model_copy(update=more)
