"""The command ``prune``: model + text -> statistics -> saliency -> masks -> pruned checkpoint -> report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from uniprune.artefacts import masks as masks_file
from uniprune.artefacts import writer
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import Stopwatch, realised, sha256, versions
from uniprune.entrypoints.calibrate import same_run, scored
from uniprune.errors import InputError
from uniprune.job.prepare import Job, Machine, MachineOptions, place_of, prepare, progress_of
from uniprune.job.recipe import Recipe
from uniprune.models import masking
from uniprune.models.loading import Source
from uniprune.reporting import model_card
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.sequential import refined, sequential
from uniprune.sparsity import bits
from uniprune.sparsity.views import on_one_scale
from uniprune.storage import files, runs, strict_json

if TYPE_CHECKING:
    from typing_extensions import Unpack


def prune(
    source: Source,
    recipe: Recipe,
    output: Path | None = None,
    *,
    save_tokens: Path | None = None,
    progress: Progress = silent,
    **options: Unpack[MachineOptions],
) -> dict[str, Any]:
    """Prunes a model and writes the checkpoint, its masks and pruning.json to ``output``; returns that report.

    source: a folder, hub name or GGUF file, or a model in memory. A model in memory needs no ``output``: it is pruned in
    place. Kept weights are bitwise the source's. save_tokens: where to keep the calibration tokens, for runs to come.
    options: ``device``; ``max_memory``, in bytes (by default what is free): a model that does not fit into it is run block by
    block from its files; ``resume``: go on with an interrupted run of the same settings, to the same masks; ``overwrite``.
    Raises InputError before the heavy work starts if anything asked for cannot be done.
    """
    if recipe.size is None:
        recipe.pattern()  # there must be one
    watch, machine = Stopwatch(), Machine(**options)
    with distributed.joined(place_of(machine)):
        if output is not None and machine.resume and (report := _finished(output, recipe, source)):
            return report
        with watch("prepare"):
            job = prepare(source, recipe, output, machine, save_tokens)
        if output is None:
            return _prune_in_place(job, recipe, progress, watch)
        with progress_of(output, machine, job.identity(recipe, verb="prune")) as run:
            job, masks, record = _masks(job, recipe, job.calibration(progress, run), watch)
            if distributed.rank():
                return {}
            with files.new_folder(output, run.folder) as folder:
                file = folder / writer.MASKS
                with watch("mask"):
                    removed = masks_file.write_masks(file, masks, job.shapes, job.facts() | {"pattern": str(job.pattern)})
                with watch("write"):
                    writer.write_checkpoint(job.loaded, masks_file.MasksFile(file), folder)
                report = _report(recipe, job, removed, watch) | record | {"masks_sha256": sha256(file)}
                model_card.write(folder, report, job.loaded.origin)
                writer.write_report(folder, report)
                run.commit("done", {})
            return report


# ------------------------------------------------------------------------------------------------------------- parts


def _prune_in_place(job: Job, recipe: Recipe, progress: Progress, watch: Stopwatch) -> dict[str, Any]:
    """Sets the weights of a model in memory to zero; nothing is written."""
    job, masks, record = _masks(job, recipe, job.calibration(progress), watch)
    with watch("mask"):
        kept = dict(masks)
        masking.apply(job.matrices, kept.items())
    removed = {name: bits.removed(mask) for name, mask in kept.items()}
    return _report(recipe, job, removed, watch) | record


def _masks(
    job: Job, recipe: Recipe, calibration: Calibration, watch: Stopwatch
) -> tuple[Job, Iterable[tuple[str, Tensor]], dict[str, Any]]:
    """Masks, matrix by matrix, perhaps not cut before they are asked for, what the report says of them, and the job by then."""
    pattern = job.pattern
    assert pattern is not None
    with watch("calibrate"):
        if recipe.sequential:
            by_block = refined if recipe.refine else sequential
            return job, by_block(calibration, recipe.parsed_metric(), pattern).items(), {}
        saliency, record = scored(calibration, recipe, [pattern])
        saliency = on_one_scale(saliency, pattern)
        job = job.at_level(saliency)
        assert job.pattern is not None
        return job, job.pattern(saliency), record


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
    return report if same_run(report.get("recipe"), report["model"].get("name"), output, recipe, source) else None


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
