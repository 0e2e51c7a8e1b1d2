"""The command ``calibrate``: a model and text -> scores of every prunable weight."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniprune.artefacts.binding import fingerprint
from uniprune.artefacts.scores import ScoresFacts, ScoresFile, write_scores
from uniprune.checkpoints.origin import called, spelled
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import versions
from uniprune.controller.controllers import any_sparsity
from uniprune.data.sources import files_of
from uniprune.errors import InputError
from uniprune.job.inference import inferring
from uniprune.job.options import RunOptions
from uniprune.job.prepare import check_tokens_kept, device_of, prepare, progress_of
from uniprune.job.recipe import Recipe
from uniprune.job.scoring import fitting, scored
from uniprune.models.loading import Loaded, Source
from uniprune.models.matrices import choose_matrices
from uniprune.storage import files, runs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from uniprune.job.options import RunKeywords

logger = logging.getLogger(__name__)


@inferring
def calibrate(
    source: Source, recipe: Recipe, output: str | Path, *, progress: Progress = silent, **options: Unpack[RunKeywords]
) -> ScoresFacts:
    """Scores every prunable weight and writes the scores: from them, masks of any sparsity are cut in seconds.

    options: as in :func:`prune`. Returns the facts that stand in the file's metadata, in every process of a run.
    """
    output = files.path_of(output)
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
    with distributed.joined(device_of(asked)):
        if asked.resume and (facts := distributed.of_first(partial(_finished, output, recipe, source))):
            check_tokens_kept(asked, output)
            return facts
        files.check_output_file(output, asked.overwrite)
        job = prepare(source, recipe, None, asked, scores=output, progress=progress)
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
                **record,
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
    known = facts.base_name, facts.base
    return facts if same_run(facts.recipe, known, output, recipe, source) else None


def same_run(settings: Mapping[str, Any], model: tuple[str, str | None], output: Path, recipe: Recipe, source: Source) -> bool:
    """Whether an output is of these settings and this model; what is left of its run is then deleted.

    model: the name and the fingerprint of the output's. A model that is in memory alone is told by its weights.

    To read the model and the text again would take as long as many runs do, so of files that were written since, a warning
    tells: they may be copies of what was there.
    """
    name, base = model
    if settings != json.loads(json.dumps(recipe.record())) or name != called(spelled(source)):
        return False
    if isinstance(source, Loaded) and not (source.origin and source.origin.files):
        matrices = choose_matrices(source.model, recipe.include, recipe.exclude)
        if fingerprint(source.checkpoint.digests(matrices)) != base:
            return False
    runs.discard(output)
    inputs = [path for path in (files.path_of(spelled(source)), *files_of(recipe.text)) if path.exists()]
    if newer := [str(path) for path in inputs if files.changed(path) > files.changed(output)]:
        logger.warning(
            "%s is complete, so there is nothing to do; but this has been written since: %s; if it is no copy of what it was, "
            "make the output again (--overwrite without --resume)",
            output,
            ", ".join(newer),
        )
    return True
