"""The command ``prune``: model + text -> statistics -> saliency -> masks -> pruned checkpoint -> report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from uniprune.artefacts import masks as masks_file
from uniprune.artefacts import writer
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import Stopwatch, realised, sha256, versions
from uniprune.entrypoints.calibrate import _saliency, _same_run
from uniprune.errors import InputError
from uniprune.job.prepare import Job, Machine, place_of, prepare, progress_of
from uniprune.job.recipe import Recipe
from uniprune.models import masking
from uniprune.models.loading import (
    Source,
)
from uniprune.reporting import model_card
from uniprune.saliency import sequential
from uniprune.sparsity import bits, patterns, views
from uniprune.storage import files, runs, strict_json


def prune(
    source: Source,
    recipe: Recipe,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    device: str | None = None,
    save_tokens: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prunes a model and writes the checkpoint, its masks and pruning.json to ``output``; returns that report.

    source: a folder, hub name or GGUF file, or a model in memory. A model in memory needs no ``output``: it is pruned in
    place. Kept weights are bitwise the source's. A model that does not fit into ``max_memory`` bytes (by default what is free)
    is run block by block from its files. resume: go on with an interrupted run of the same settings, to the same masks.
    Raises InputError before the heavy work starts if anything asked for cannot be done.
    """
    if recipe.size is None:
        recipe.pattern()  # there must be one
    watch = Stopwatch()
    machine = Machine(device, max_memory, resume, overwrite)
    with distributed.joined(place_of(machine)):
        if output is not None and resume and (report := _finished(output, recipe, source)):
            return report
        with watch("prepare"):
            job = prepare(source, recipe, output, machine, save_tokens)
        pattern = job.pattern
        assert pattern is not None
        if output is None:
            cut, record = _cut(job, recipe, pattern, progress, watch)
            with watch("mask"):
                kept = dict(cut)
                masking.apply(job.matrices, kept.items())
            removed = {name: bits.removed(mask) for name, mask in kept.items()}
            return _report(recipe, job, removed, watch) | record
        with progress_of(output, machine, job.identity(recipe, verb="prune")) as run:
            cut, record = _cut(job, recipe, pattern, progress, watch, run)
            if distributed.rank():
                return {}
            with files.new_folder(output, run.folder) as folder:
                file = folder / writer.MASKS
                with watch("mask"):
                    removed = masks_file.write_masks(file, cut, job.shapes, job.facts() | {"pattern": str(job.pattern)})
                with watch("write"):
                    writer.write_checkpoint(job.loaded, masks_file.MasksFile(file), folder)
                report = _report(recipe, job, removed, watch) | record | {"masks_sha256": sha256(file)}
                model_card.write(folder, report, job.loaded.origin)
                writer.write_report(folder, report)
                run.commit("done", {})
            return report


# ------------------------------------------------------------------------------------------------------------- parts


def _cut(
    job: Job,
    recipe: Recipe,
    pattern: patterns.Pattern,
    progress: Progress,
    watch: Stopwatch,
    run: runs.Run | None = None,
) -> tuple[Iterable[tuple[str, Tensor]], dict[str, Any]]:
    """Masks, matrix by matrix, perhaps not cut before they are asked for, and the record of the controller if it ran."""
    with watch("calibrate"):
        if not recipe.sequential:
            saliency, record = _saliency(job, recipe, [pattern], progress, run)
            saliency = views.on_one_scale(saliency, pattern.local or recipe.comparable)
            return (job.choose_level(saliency) or pattern)(saliency), record
        loaded, metric = job.loaded, recipe.parsed_metric()
        arguments = loaded.model, job.matrices, job.windows.tokens, metric, pattern, progress
        cut = sequential.sequential(*arguments, refine=recipe.refine, residency=loaded.residency, run=run)
        return cut.items(), {}


def _finished(output: Path, recipe: Recipe, source: Source) -> dict[str, Any] | None:
    """The report of this very run, if its output is there already: a job that is started again has nothing to do."""
    path = output / files.REPORT
    if runs.pending(output) or not path.is_file():
        return None
    try:
        report = strict_json.parse(path.read_bytes())
        strict_json.check(report, {"model": dict})
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; --overwrite without --resume makes it anew") from None
    return report if _same_run(report.get("recipe"), report["model"].get("name"), output, recipe, source) else None


def _report(recipe: Recipe, job: Job, removed: Mapping[str, float], watch: Stopwatch) -> dict[str, Any]:
    return {
        "model": {"name": str(job.loaded), "fingerprint": job.base},
        "recipe": recipe.record(),
        "pattern": str(job.pattern),
        **({"size": {"bytes": job.budget.size, "sparsity": job.level}} if job.budget else {}),
        "misfits": job.misfits,
        **realised(removed, job.shapes),
        "calibration": job.windows.describe(),
        "versions": versions(),
        "seconds": watch.seconds,
    }
