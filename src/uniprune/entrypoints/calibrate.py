"""The command ``calibrate``: a model and text -> scores of every prunable weight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniprune.artefacts import scores as scores_file
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import versions
from uniprune.controller.descent import any_sparsity
from uniprune.errors import InputError
from uniprune.job.prepare import Machine, MachineOptions, place_of, prepare, progress_of
from uniprune.job.recipe import Recipe
from uniprune.models.loading import Source
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.sparsity.patterns import Pattern
from uniprune.sparsity.views import OnOneScale, Scores, View
from uniprune.storage import files, runs

if TYPE_CHECKING:
    from typing_extensions import Unpack


def calibrate(
    source: Source,
    recipe: Recipe,
    output: Path,
    *,
    save_tokens: Path | None = None,
    progress: Progress = silent,
    **options: Unpack[MachineOptions],
) -> dict[str, Any]:
    """Scores every prunable weight and writes the scores: from them, masks of any sparsity are cut in seconds.

    save_tokens, options: as in :func:`prune`. Returns the facts that stand in the file's metadata.
    """
    if recipe.sequential:
        flag = "--refine" if recipe.refine else "--sequential"
        raise InputError(f"{flag} needs the masks while it calibrates; use it with prune")
    if recipe.size is not None:
        raise InputError("a size is for prune; calibrate with --sparsity, at the level that plan --size shows, or with neither")
    machine = Machine(**options)
    with distributed.joined(place_of(machine)):
        if machine.resume and (facts := _calibrated(output, recipe, source)):
            return facts
        files.check_output_file(output, machine.overwrite)
        job = prepare(source, recipe, None, machine, save_tokens, scores=output)
        targets = [job.pattern] if job.pattern else _fitting(any_sparsity(), job.shapes)
        with progress_of(output, machine, job.identity(recipe, verb="calibrate")) as run:
            saliency, record = scored(job.calibration(progress, run), recipe, targets)
            facts = job.facts() | {
                "recipe": recipe.record(),
                "calibration": job.windows.describe(),
                "comparable": saliency.comparable,
                "versions": versions(),
                **record,
            }
            if not distributed.rank():
                scores = run.folder / "scores.safetensors"
                scores_file.write_scores(scores, saliency.items(), job.shapes, facts)
                run.commit("done", {})
                files.move(scores, output)
            return {} if distributed.rank() else facts


def scored(calibration: Calibration, recipe: Recipe, targets: Sequence[Pattern]) -> tuple[Scores, dict[str, Any]]:
    """The saliency that masks are cut from, and what the report says of its making."""
    metric, controller = recipe.parsed_metric(), recipe.parsed_controller()
    if controller is None:
        local = one_shot(calibration, metric)
        return local, local.starved
    steps = recipe.steps
    if recipe.budget_tokens is not None:
        within = max(1, recipe.budget_tokens // controller.step_tokens(calibration.windows.shape[1]))
        steps = min(steps or within, within)
    found, record = controller.calibrate(calibration, metric, targets, steps, recipe.seed)
    saliency = OnOneScale(found) if controller.comparable else View(found)
    return saliency, {"controller": record.model_dump() | {"targets": [str(target) for target in targets]}}


def _calibrated(output: Path, recipe: Recipe, source: Source) -> dict[str, Any] | None:
    """The facts of a scores file, if it is of this very run."""
    if runs.pending(output) or not output.is_file():
        return None
    facts = scores_file.ScoresFile(output).facts
    return facts if same_run(facts.get("recipe"), facts.get("base_name"), output, recipe, source) else None


def same_run(settings: Any, name: Any, output: Path, recipe: Recipe, source: Source) -> bool:
    if settings != json.loads(json.dumps(recipe.record())) or name != str(source):
        return False
    runs.discard(output)
    return True


def _fitting(targets: Sequence[Pattern], shapes: Mapping[str, tuple[int, int]]) -> list[Pattern]:
    """The targets that every matrix can have."""
    return [target for target in targets if not any(target.misfit(*shape) for shape in shapes.values())]
