"""The command ``plan``: what pruning a model would touch, cost and yield, without reading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uniprune.checkpoints.origin import resolve, stored_dtype
from uniprune.errors import InputError
from uniprune.experts import removal
from uniprune.job import estimate
from uniprune.job.execution import check_execution, choose, warn_of_traffic
from uniprune.job.memory import Work, needs
from uniprune.job.options import Execution, RunOptions
from uniprune.job.prepare import aim_of, check_predicts, device_of
from uniprune.job.recipe import WINDOWS, Recipe
from uniprune.job.samples import window_length
from uniprune.models.loading import fast_dtype, load, native_dtype, parse_dtype, skeleton
from uniprune.models.matrices import choose_matrices


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
    origin = resolve(source)
    model = skeleton(origin)
    check_predicts(recipe, model)
    matrices, more = choose_matrices(model, recipe.include, recipe.exclude), dict[str, Any]()
    if recipe.experts is not None:
        matrices, more["experts"], more["disk"] = removal.planned(recipe.experts, model, matrices)
    stored = stored_dtype(origin, matrices)
    length = window_length(recipe, model.config)
    options = RunOptions.of(device=device, max_memory=max_memory, execution=execution)
    target = device_of(options)
    dtype = parse_dtype(recipe.dtype) or fast_dtype(stored or native_dtype(origin), target)
    work = Work(model, matrices, recipe, dtype, stored, length, target)
    needed = needs(work)
    chosen: str
    to_load = recipe.size is not None and not origin.files
    try:
        chosen = choose(origin, needed, options, target)
        check_execution(recipe, chosen)
        warn_of_traffic(work, chosen, needed[chosen])
    except InputError:
        if to_load or execution:
            raise
        chosen = "none"
    weights = load(origin, recipe.dtype, "cpu") if to_load else origin
    refused = recipe.unsupported == "refuse"
    if refused:  # here they are shown
        recipe = recipe.model_copy(update={"unsupported": "dense"})
    aim = aim_of(recipe, matrices, weights)
    tokens = (recipe.windows or WINDOWS) * length
    found = estimate.make_plan(origin, work, aim.pattern, aim.unsupported, tokens, needed, chosen, refused)
    if aim.budget:
        more |= {"size": aim.budget.size, "sparsity_for_size": aim.sparsity}
    return found.model_copy(update=more)
