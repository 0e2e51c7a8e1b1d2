"""The command ``calibrate``: a model and text -> scores of every prunable weight."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from uniprune.artefacts.scores import ScoresFacts, ScoresFile, write_scores
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import versions
from uniprune.controller.controllers import any_sparsity
from uniprune.errors import InputError
from uniprune.job.destination import ToScores
from uniprune.job.finished import check_tokens_kept, leave, same_run
from uniprune.job.forecast.prospect import use_device
from uniprune.job.inference import inferring
from uniprune.job.options import RunOptions
from uniprune.job.prepare import prepare, progress_of
from uniprune.job.recipe import Recipe, check_recipe
from uniprune.job.scoring import fitting, scored
from uniprune.models.loading import Source
from uniprune.storage import files, runs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from uniprune.job.options import RunKeywords


@inferring
def calibrate(
    source: Source, recipe: Recipe, output: str | Path, *, progress: Progress = silent, **options: Unpack[RunKeywords]
) -> ScoresFacts:
    """Scores every prunable weight and writes the scores: from them, masks of any sparsity are cut in seconds.

    options: as in :func:`prune`. Returns the facts that stand in the file's metadata, in every process of a run.
    """
    output = files.path_of(output)
    check_recipe(recipe)
    if recipe.sequential:
        flag = "--refine" if recipe.refine else "--sequential"
        raise InputError(f"{flag} needs the masks while it calibrates; use it with prune")
    if recipe.experts is not None:
        raise InputError("--experts is for prune, which takes whole experts out; leave it out")
    if recipe.size is not None:
        raise InputError(
            "a size is for prune; calibrate with --sparsity, at the sparsity that plan --size shows, or with neither"
        )
    asked = RunOptions.of(**options)
    with distributed.joined(use_device(asked, source)):
        if asked.resume and (facts := distributed.of_first(partial(_finished, output, recipe, source))):
            check_tokens_kept(asked, output)
            return facts
        files.check_output_file(output, asked.overwrite, instead=files.OTHER if asked.resume else files.INSTEAD)
        job = prepare(source, recipe, ToScores(output), asked, progress)
        pattern = job.aim.pattern
        targets = [pattern] if pattern else fitting(any_sparsity(), job.shapes)
        with progress_of(output, asked, job.identity(recipe, command="calibrate")) as run:
            saliency, record = scored(job.calibration(progress, run), recipe, targets)
            facts = ScoresFacts(
                **job.binding.model_dump(),
                matrices=list(job.shapes),
                recipe=recipe.record(),
                calibration=job.windows.describe(),
                comparable=saliency.comparable,
                versions=versions(),
                **record.facts,
            )
            if not distributed.rank():
                scores = run.folder / "scores.safetensors"
                write_scores(scores, saliency.items(), job.shapes, facts)
                run.commit("done", {})
                files.move(scores, output)
        return facts


def _finished(output: Path, recipe: Recipe, source: Source) -> ScoresFacts | None:
    """The facts of the file that this very run would write, if it is there already: there is nothing to do."""
    if runs.pending(output) or not output.is_file():
        return None
    facts = ScoresFile(output).facts
    if not same_run(facts.recipe, (facts.base_name, facts.base), recipe, source):
        return None
    leave(output, recipe, source)
    return facts
