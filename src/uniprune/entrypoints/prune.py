"""The command ``prune``: model + text -> statistics -> saliency -> masks -> pruned checkpoint -> report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from uniprune.artefacts import writer
from uniprune.artefacts.masks import MasksFile, write_masks
from uniprune.artefacts.reports import ExpertRemoval, Pruning, SizeBudget, read_report, realised
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import Stopwatch, sha256, versions
from uniprune.errors import InputError, UniPruneError
from uniprune.experts import removal
from uniprune.job.aim import Aim
from uniprune.job.destination import IN_PLACE, ToCheckpoint
from uniprune.job.finished import check_tokens_kept, leave, same_run
from uniprune.job.forecast.prospect import use_device
from uniprune.job.inference import inferring
from uniprune.job.options import RunOptions
from uniprune.job.prepare import Job, prepare, progress_of
from uniprune.job.recipe import Recipe, check_recipe
from uniprune.job.scoring import scored
from uniprune.models import masking
from uniprune.models.loading import Loaded, Source
from uniprune.reporting import model_card
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.record import ScoringRecord
from uniprune.saliency.sequential import refined, sequential
from uniprune.sparsity import bits
from uniprune.sparsity.structure import structure
from uniprune.sparsity.views import comparable_for
from uniprune.speed.outlook import with_speed
from uniprune.storage import files, runs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from uniprune.job.options import RunKeywords


@inferring
def prune(
    source: Source, recipe: Recipe, output: str | Path, *, progress: Progress = silent, **options: Unpack[RunKeywords]
) -> Pruning | ExpertRemoval:
    """Prunes a model and writes the checkpoint, its masks and pruning.json to ``output``; returns that report.

    source: a folder, hub name or GGUF file, or a model in memory. Kept weights are bitwise the source's. With ``experts`` in
    the recipe the checkpoint is a smaller one, without some of each layer's experts, and there are no masks.
    options: ``device``; ``max_memory``, in bytes (by default what is free): a model that does not fit is run block by block
    from its files; ``resume``: go on with an interrupted run of the same settings, to the same masks; ``overwrite`` existing
    output; ``save_tokens``: also write the calibration windows there. See :class:`uniprune.job.options.RunOptions`.
    Of several processes (``torchrun``) the first writes, and all return the report.
    Raises InputError before the heavy work starts if anything asked for cannot be done.
    """
    output = files.path_of(output)
    _check_budget(recipe)
    watch, asked = Stopwatch(), RunOptions.of(**options)
    with distributed.joined(use_device(asked, source)):
        if asked.resume and (report := distributed.of_first(partial(_finished, output, recipe, source))):
            check_tokens_kept(asked, output)
            return report
        if recipe.experts is not None:
            return _without_experts(source, recipe, output, asked, progress)
        with watch("prepare"):
            job = prepare(source, recipe, ToCheckpoint(output), asked, progress)
        with progress_of(output, asked, job.identity(recipe, command="prune")) as run:
            created = _create_masks(job, recipe, job.calibration(progress, run), watch)
            if not distributed.rank():
                with files.new_folder(output, run.folder) as folder:
                    file = folder / writer.MASKS
                    with watch("mask"):
                        removed = write_masks(file, created.masks, job.shapes, job.binding, str(created.aim.pattern))
                    with watch("write"):
                        writer.write_checkpoint(job.loaded, MasksFile(file), folder, _unchanged(job))
                    report = _report(recipe, job, created, removed, watch, masks_sha256=sha256(file))
                    with watch("time"):
                        report = with_speed(report, job.loaded, use_device(asked, source))
                    report = report.model_copy(update={"seconds": watch.seconds})
                    model_card.complete(folder, report, job.loaded.origin)
                    run.commit("done", {})
        return Pruning.read(output / files.REPORT)


@inferring
def prune_in_place(loaded: Loaded, recipe: Recipe, *, save_tokens: Path | None = None, progress: Progress = silent) -> Pruning:
    """Prunes a model in memory and writes nothing (but ``save_tokens``); returns the report.

    Kept weights keep their bits. Raises InputError before the heavy work starts if anything asked for cannot be done.
    """
    if not isinstance(loaded, Loaded):
        raise InputError(
            "prune_in_place takes a model in memory: Loaded(model, tokenizer), or uniprune.load(...); or use prune"
        )
    _check_budget(recipe)
    if recipe.experts is not None:
        raise InputError("--experts leaves a smaller model, which is written: use prune, not prune_in_place")
    watch, options = Stopwatch(), RunOptions.of(save_tokens=save_tokens)
    with distributed.joined(use_device(options, loaded)):
        with watch("prepare"):
            job = prepare(loaded, recipe, IN_PLACE, options, progress)
        created = _create_masks(job, recipe, job.calibration(progress), watch)
        with watch("mask"):
            kept = dict(created.masks)
            masking.apply(job.matrices, kept.items())
        return _report(recipe, job, created, {name: bits.sparsity_of(mask) for name, mask in kept.items()}, watch)


# ------------------------------------------------------------------------------------------------------------- parts


def _check_budget(recipe: Recipe) -> None:
    """Raises InputError unless a recipe says how much is to go."""
    check_recipe(recipe)
    if recipe.size is None and recipe.experts is None:
        recipe.pattern()


def _unchanged(job: Job) -> Callable[[str, str], None] | None:
    """Of a model that is in memory only: raises UniPruneError for a matrix that is no longer what it was when the run began."""
    origin, digests = job.loaded.origin, job.binding.digests
    if origin is not None and origin.files:
        return None

    def check(name: str, digest: str) -> None:
        if digest != digests[name]:
            raise UniPruneError(
                f"{name} has other weights than when the run began: the model changes them as it computes (RWKV does); "
                "give the folder that it is saved in instead"
            )

    return check


class _Masks(NamedTuple):
    """The masks of a run as (name, mask) pairs, which may be created only when they are iterated over.

    aim: the pattern that they have. record: for the report, how their saliency came to be.
    """

    masks: Iterable[tuple[str, Tensor]]
    aim: Aim
    record: ScoringRecord


def _create_masks(job: Job, recipe: Recipe, calibration: Calibration, watch: Stopwatch) -> _Masks:
    aim, pattern = job.aim, job.aim.pattern
    assert pattern is not None
    with watch("calibrate"):
        if recipe.sequential:
            by_block = refined if recipe.refine else sequential
            masks, starved = by_block(calibration, recipe.parsed_metric(), pattern)
            return _Masks(masks.items(), aim, ScoringRecord(starved=starved))
        saliency, record = scored(calibration, recipe, [pattern])
        scaled = comparable_for(saliency, pattern)
        aim = aim.with_scores(scaled)
        assert aim.pattern is not None
        return _Masks(aim.pattern(scaled), aim, record)


def _without_experts(source: Source, recipe: Recipe, output: Path, asked: RunOptions, progress: Progress) -> ExpertRemoval:
    """The run of a recipe that removes whole experts."""
    watch = Stopwatch()
    with watch("prepare"):
        run_of = removal.prepared(source, recipe, output, asked, progress)
    job = run_of.job
    with progress_of(output, asked, job.identity(recipe, command="prune")) as run:
        with watch("calibrate"):
            layers, record = run_of.choose(progress, run)
        if not distributed.rank():
            with files.new_folder(output, run.folder) as folder:
                with watch("write"):
                    run_of.write(layers, folder)
                report = ExpertRemoval(
                    model=job.model,
                    experts=run_of.counts,
                    layers=layers,
                    unreached={layer: one.unreached for layer, one in layers.items() if one.unreached},
                    recipe=recipe.record(),
                    calibration=job.windows.describe(),
                    versions=versions(),
                    seconds=watch.seconds,
                    **record.facts,
                )
                model_card.complete(folder, report, job.loaded.origin)
                run.commit("done", {})
    return ExpertRemoval.read(output / files.REPORT)


def _finished(output: Path, recipe: Recipe, source: Source) -> Pruning | ExpertRemoval | None:
    """The report of this very run, if its output is there already: a job that is started again has nothing to do."""
    path = output / files.REPORT
    if runs.pending(output) or not path.is_file():
        return None
    try:
        report = read_report(path)
    except InputError as error:
        raise InputError(f"{error} (--overwrite without --resume)") from None
    if not isinstance(report, Pruning | ExpertRemoval):
        return None
    if not same_run(report.recipe, (report.model.name, report.model.fingerprint), recipe, source):
        return None
    leave(output, recipe, source)
    return report


def _report(
    recipe: Recipe,
    job: Job,
    created: _Masks,
    removed: Mapping[str, float],
    watch: Stopwatch,
    masks_sha256: str | None = None,
) -> Pruning:
    aim = created.aim
    assert aim.pattern is not None
    facts: dict[str, Any] = {
        "model": job.model,
        "recipe": recipe.record(),
        "pattern": str(aim.pattern),
        "structure": structure(aim.pattern),
        "unsupported": aim.unsupported,
        **realised(removed, job.shapes),
        "prunable": job.binding.prunable,
        "calibration": job.windows.describe(),
        "versions": versions(),
        "seconds": watch.seconds,
        **created.record.facts,
    }
    if aim.budget and aim.sparsity is not None:
        facts["size"] = SizeBudget(bytes=aim.budget.size, sparsity=aim.sparsity)
    if masks_sha256:
        facts["masks_sha256"] = masks_sha256
    return Pruning(**facts)
