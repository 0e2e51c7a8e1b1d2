"""The commands that prune: ``plan``, ``calibrate``, ``mask``, ``apply``, ``prune`` and ``permute``."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from uniprune.cli.groups import (
    CONTROLLER,
    LAYERS,
    SAMPLES,
    SPARSITY,
    ModelArgument,
    Overwrite,
    Printed,
    Push,
    RecipeOptions,
    Target,
)
from uniprune.cli.options import Only
from uniprune.cli.package import push_of
from uniprune.cli.terminal import Bars, first, quiet, show
from uniprune.common.options import Flag, Options, Positional
from uniprune.job.options import RunOptions

if TYPE_CHECKING:
    from uniprune.artefacts.reports import ExpertRemoval, Pruning

CALIBRATE = Only(SPARSITY, "metric", CONTROLLER, SAMPLES, LAYERS, "config")
PRUNE = Only(SPARSITY, "size experts metric", CONTROLLER, "sequential refine", SAMPLES, LAYERS, "config")
PERMUTE = Only("metric", SAMPLES, LAYERS)


class Scores(Options):
    scores: Annotated[Path, Positional()] = Field(description="Scores file, as calibrate writes it.")


class Masks(Options):
    masks: Annotated[Path, Positional()] = Field(description="Masks file, as mask writes it.")
    dtype: str | None = Field(default=None, description="Type of the output, for a model from a GGUF file.")
    force: bool = Field(default=False, description="Apply masks that were made for other weights.")


class Order(Options):
    sparsity: Annotated[str, Flag(("-s",))] = Field(
        default="2:4", description="N:M pattern that the order of the channels is to suit."
    )


def plan(
    source: ModelArgument,
    recipe: Annotated[RecipeOptions, PRUNE],
    run: Annotated[RunOptions, Only("device max_memory execution")],
    printed: Printed,
) -> None:
    asked = recipe.recipe()
    from uniprune.cli.tables import executions_table, plan_lines, plan_table
    from uniprune.entrypoints.plan import plan

    found = plan(source.name, asked, **run.given())
    show(found, printed.as_json, plan_table(found), executions_table(found), *plan_lines(found))


def calibrate(
    source: ModelArgument, recipe: Annotated[RecipeOptions, CALIBRATE], target: Target, run: RunOptions, printed: Printed
) -> None:
    asked = recipe.recipe()
    from uniprune.entrypoints.calibrate import calibrate

    with Bars() as progress:
        facts = calibrate(source.name, asked, target.output, **run.given(), progress=progress)
    if first():
        result = {"output": str(target.output), **facts.record()}
        show(result, printed.as_json, f"{target.output}: scores of {facts.base_name} by {facts.recipe['metric']}")


def mask(
    source: Scores, recipe: Annotated[RecipeOptions, Only(SPARSITY)], target: Target, over: Overwrite, printed: Printed
) -> None:
    from uniprune.entrypoints.mask import mask

    asked = recipe.given()
    result = mask(source.scores, asked.pop("sparsity", None), target.output, **over.given(), **asked)
    line = f"{target.output}: {result.pattern}, sparsity {result.sparsity:.4f}"
    show({"output": str(target.output), **result.record()}, printed.as_json, line)


def apply(source: ModelArgument, masks: Masks, target: Target, push: Push, over: Overwrite, printed: Printed) -> None:
    from uniprune.entrypoints.apply import apply

    upload = push_of(push, over)
    options = {key: value for key, value in masks.given().items() if key != "masks"}
    result = apply(source.name, masks.masks, target.output, **over.given(), **options)
    _show_pruned(target.output, result, upload(target.output), printed)


def prune(
    source: ModelArgument,
    recipe: Annotated[RecipeOptions, PRUNE],
    target: Target,
    run: RunOptions,
    push: Push,
    printed: Printed,
) -> None:
    asked = recipe.recipe()
    from uniprune.entrypoints.prune import prune

    upload = push_of(push, run)
    with Bars() as progress:
        result = prune(source.name, asked, target.output, **run.given(), progress=progress)
    if first():
        _show_pruned(target.output, result, upload(target.output), printed)


def permute(
    source: ModelArgument,
    order: Order,
    recipe: Annotated[RecipeOptions, PERMUTE],
    target: Target,
    run: Annotated[RunOptions, Only("device max_memory overwrite")],
    printed: Printed,
) -> None:
    quiet()
    from uniprune.entrypoints.permute import permute
    from uniprune.job.recipe import Recipe

    asked = Recipe(sparsity=order.sparsity, **recipe.given())
    with Bars() as progress:
        result = permute(source.name, asked, target.output, **run.given(), progress=progress)
    gains = result.permuted.values()
    before, after = fmean(gain.kept_before for gain in gains), fmean(gain.kept_after for gain in gains)
    line = (
        f"{target.output}: the inputs of {len(gains)} matrices are in another order; {result.pattern} keeps {after:.4f} of "
        f"their scores, not {before:.4f}"
    )
    show({"output": str(target.output), **result.record()}, printed.as_json, line)


def _show_pruned(output: Path, report: Pruning | ExpertRemoval, uploaded: dict[str, str], printed: Printed) -> None:
    """uploaded: where to, if the folder was."""
    from uniprune.cli.tables import pruned_lines

    lines = [*pruned_lines(report), *(f"uploaded to {url}" for url in uploaded.values())]
    show({"output": str(output), **report.record(), **uploaded}, printed.as_json, f"{output}: {lines[0]}", *lines[1:])
