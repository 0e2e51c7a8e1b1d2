"""The command ``calibrate``: a model and text -> scores of every prunable weight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniprune.artefacts import scores as scores_file
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import versions
from uniprune.controller import descent, published
from uniprune.errors import InputError
from uniprune.job.prepare import Job, Machine, place_of, prepare, progress_of
from uniprune.job.recipe import Recipe
from uniprune.models.loading import (
    Source,
)
from uniprune.saliency import calibration
from uniprune.sparsity import patterns
from uniprune.sparsity.patterns import Saliency
from uniprune.storage import files, runs


def calibrate(
    source: Source,
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    device: str | None = None,
    save_tokens: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Scores every prunable weight and writes the scores: from them, masks of any sparsity are cut in seconds.

    max_memory, resume: as in :func:`prune`. Returns the facts that stand in the file's metadata.
    """
    if recipe.sequential:
        flag = "--refine" if recipe.refine else "--sequential"
        raise InputError(f"{flag} needs the masks while it calibrates; use it with prune")
    if recipe.size is not None:
        raise InputError("a size is for prune; calibrate with --sparsity, at the level that plan --size shows, or with neither")
    machine = Machine(device, max_memory, resume, overwrite)
    with distributed.joined(place_of(machine)):
        if resume and (facts := _calibrated(output, recipe, source)):
            return facts
        files.check_output_file(output, overwrite)
        job = prepare(source, recipe, None, machine, save_tokens, scores=output)
        targets = [job.pattern] if job.pattern else _fitting(descent.any_sparsity(), job.shapes)
        with progress_of(output, machine, job.identity(recipe, verb="calibrate")) as run:
            saliency, record = _saliency(job, recipe, targets, progress, run)
            facts = job.facts() | {
                "recipe": recipe.record(),
                "calibration": job.windows.describe(),
                "comparable": recipe.comparable,
                "versions": versions(),
                **record,
            }
            if not distributed.rank():
                scores = run.folder / "scores.safetensors"
                scores_file.write_scores(scores, saliency.items(), job.shapes, facts)
                run.commit("done", {})
                files.move(scores, output)
            return {} if distributed.rank() else facts


def _saliency(
    job: Job, recipe: Recipe, targets: Sequence[patterns.Pattern], progress: Progress, run: runs.Run | None
) -> tuple[Saliency, dict[str, Any]]:
    """The saliency that masks are cut from, and the record of the controller's descent if it ran."""
    loaded, tokens, metric = job.loaded, job.windows.tokens, recipe.parsed_metric()
    settings = recipe.parsed_tuning()
    if not recipe.corrected:
        local = calibration.one_shot(loaded.model, job.matrices, tokens, metric, progress, loaded.residency, run)
        return local, local.starved
    steps = recipe.steps
    if recipe.budget_tokens is not None:
        within = max(1, recipe.budget_tokens // settings.step_tokens(tokens.shape[1]))
        steps = min(steps or within, within)
    arguments = loaded.model, job.matrices, tokens, metric, targets, steps
    duals: Saliency
    if isinstance(settings, published.Paper):
        if job.execution == "streamed" or distributed.count() > 1:
            raise InputError(
                "--controller paper learns a copy of the weights in memory, in one process; use --controller feedback"
            )
        duals, record = published.descend(*arguments, settings, recipe.seed, progress)
    else:
        duals, record = descent.descend(*arguments, settings, recipe.seed, progress, loaded.residency, run)
    return duals, {"controller": {"targets": [str(target) for target in targets], **record}}


def _calibrated(output: Path, recipe: Recipe, source: Source) -> dict[str, Any] | None:
    """As :func:`_finished`: the facts of a scores file."""
    if runs.pending(output) or not output.is_file():
        return None
    facts = scores_file.ScoresFile(output).facts
    return facts if _same_run(facts.get("recipe"), facts.get("base_name"), output, recipe, source) else None


def _same_run(settings: Any, name: Any, output: Path, recipe: Recipe, source: Source) -> bool:
    if settings != json.loads(json.dumps(recipe.record())) or name != str(source):
        return False
    runs.discard(output)
    return True


def _fitting(targets: Sequence[patterns.Pattern], shapes: Mapping[str, tuple[int, int]]) -> list[patterns.Pattern]:
    """The targets that every matrix can have."""
    return [target for target in targets if not any(target.misfit(*shape) for shape in shapes.values())]
