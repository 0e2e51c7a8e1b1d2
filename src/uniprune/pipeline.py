"""The verbs, end to end: model + text -> statistics -> saliency -> masks -> pruned checkpoint -> report.

Every verb checks all of its input before the heavy work starts, and writes its output at once or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniprune import (
    artefacts,
    calibration,
    card,
    checkpoint,
    descent,
    forecast,
    metrics,
    objects,
    paper,
    patterns,
    ranks,
    runs,
    shards,
)
from uniprune import masks as masking
from uniprune.errors import InputError, MismatchError
from uniprune.hardware import fitted
from uniprune.job import (
    Job,
    Machine,
    Source,
    aim_of,
    choose,
    place_of,
    prepare,
    progress_of,
    stored_dtype,
)
from uniprune.mask_files import CheckedMasks
from uniprune.matrices import Matrices, find_matrices
from uniprune.models import (
    Loaded,
    Origin,
    dtype_name,
    fast_dtype,
    load,
    load_tokenizer,
    load_weights,
    parse_dtype,
    resolve,
    skeleton,
)
from uniprune.patterns import Saliency, Scope
from uniprune.progress import Progress, silent
from uniprune.recipe import LENGTH, WINDOWS, Recipe
from uniprune.record import Stopwatch, realised, sha256, versions


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
    with ranks.joined(place_of(machine)):
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
            removed = {name: masking.removed(mask) for name, mask in kept.items()}
            return _report(recipe, job, removed, watch) | record
        with progress_of(output, machine, job.identity(recipe, verb="prune")) as run:
            cut, record = _cut(job, recipe, pattern, progress, watch, run)
            if ranks.rank():
                return {}
            with checkpoint.new_folder(output, run.folder) as folder:
                file = folder / checkpoint.MASKS
                with watch("mask"):
                    removed = artefacts.write_masks(file, cut, job.shapes, job.facts() | {"pattern": str(job.pattern)})
                with watch("write"):
                    checkpoint.write_checkpoint(job.loaded, artefacts.MasksFile(file), folder)
                report = _report(recipe, job, removed, watch) | record | {"masks_sha256": sha256(file)}
                card.write(folder, report, job.loaded.origin)
                checkpoint.write_report(folder, report)
                run.commit("done", {})
            return report


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
    with ranks.joined(place_of(machine)):
        if resume and (facts := _calibrated(output, recipe, source)):
            return facts
        artefacts.check_output_file(output, overwrite)
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
            if not ranks.rank():
                scores = run.folder / "scores.safetensors"
                artefacts.write_scores(scores, saliency.items(), job.shapes, facts)
                run.commit("done", {})
                os.replace(scores, output)
            return {} if ranks.rank() else facts


def mask(
    scores: Path, sparsity: str | float, output: Path, *, scope: Scope | None = None, overwrite: bool = False, **budget: Any
) -> dict[str, Any]:
    """Cuts masks of one sparsity from a scores file and writes them; returns the realised sparsity.

    budget: ``allow``, ``rules``, ``hardware`` and ``misfits``, as in :class:`Recipe`.
    """
    artefacts.check_output_file(output, overwrite, scores)
    saliency = artefacts.ScoresFile(scores)
    controller = "feedback" if saliency.facts["comparable"] else "none"
    recipe = Recipe(sparsity=str(sparsity), scope=scope, controller=controller, **budget)
    stored = next(iter(saliency.facts["digests"].values())).split()[0]
    dtype = dtype_name(shards.DTYPES.get(stored, stored))
    pattern, misfits = fitted(recipe.pattern(), saliency.shapes, dtype, recipe.hardware, recipe.misfits)
    cut = pattern(metrics.on_one_scale(saliency, pattern.local or saliency.facts["comparable"]))
    removed = artefacts.write_masks(output, cut, saliency.shapes, artefacts.binding(saliency.facts) | {"pattern": str(pattern)})
    return {"pattern": str(pattern), "misfits": misfits} | realised(removed, saliency.shapes)


def apply(
    source: str | Path,
    masks: Path,
    output: Path,
    *,
    overwrite: bool = False,
    force: bool = False,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Writes the pruned checkpoint of a model from a masks file; returns the report.

    dtype: only for sources that are not safetensors already (GGUF).
    Raises MismatchError if the masks were made for another model. force: apply them all the same, if its matrices have the
    shapes; the report then names those whose weights differ.
    """
    watch = Stopwatch()
    origin = resolve(source)
    checkpoint.check_output_folder(output, overwrite, origin.path)
    file = CheckedMasks(masks)
    with watch("prepare"):
        loaded: Loaded | Origin = origin
        matrices: Matrices | None = None
        if not origin.shards:
            weights = load_weights(origin, parse_dtype(dtype), torch.device("cpu"))
            loaded = Loaded(weights, load_tokenizer(origin), origin)
            matrices = find_matrices(weights)
        _check_names(origin, file, matrices, masks)
        size = sum(matrix.parameter.nbytes for matrix in matrices.values()) if matrices else 0
        checkpoint.check_disk_space(output, checkpoint.checkpoint_bytes(origin, size))
    found: dict[str, str] = {}

    def check(name: str, digest: str) -> None:
        found[name] = digest
        if digest != file.facts["digests"][name] and not force:
            made = f"{file.facts['base_name']}, {file.facts['base'][:12]}"
            raise MismatchError(
                f"{masks} was made for another model ({made}) than {origin}, which has other weights in {name}; "
                "give that model, or --force"
            )

    with runs.open_run(output, {"verb": "apply"}) as run, checkpoint.new_folder(output, run.folder) as folder:
        with watch("write"):
            (folder / checkpoint.MASKS).parent.mkdir()
            shutil.copyfile(masks, folder / checkpoint.MASKS)
            checkpoint.write_checkpoint(loaded, file, folder, check)
        removed = file.removed()
        report = {
            "model": {"name": str(origin), "fingerprint": checkpoint.fingerprint(found)},
            "pattern": file.facts["pattern"],
            **realised(removed, file.shapes),
            "masks_sha256": sha256(masks),
            "differs": sorted(name for name in found if found[name] != file.facts["digests"][name]),
            "versions": versions(),
            "seconds": watch.seconds,
        }
        card.write(folder, report, origin)
        checkpoint.write_report(folder, report)
    return report


def plan(source: str | Path, recipe: Recipe, *, device: str | None = None, max_memory: int | None = None) -> forecast.Plan:
    """What pruning this model would touch, cost and yield; writes nothing.

    It reads no weights, but samples of them for a size: from safetensors files, while a model in another format is loaded.
    """
    origin = resolve(source)
    model = skeleton(origin)
    matrices = find_matrices(model, recipe.include, recipe.exclude)
    stored = stored_dtype(origin, matrices)
    tokens = (recipe.windows or WINDOWS) * (recipe.length or LENGTH)
    machine = Machine(device, max_memory)
    place, controller = place_of(machine), recipe.resolved_controller
    dtype = parse_dtype(recipe.dtype) or fast_dtype(stored, place)
    step = recipe.step_tokens(recipe.length or LENGTH)
    needs = forecast.needs(model, matrices, dtype, controller, step, dtype == stored, recipe.refine)
    execution: str
    to_load = recipe.size is not None and not origin.shards
    try:
        execution = choose(origin, needs, machine, place)
    except InputError:
        if to_load:
            raise
        execution = "none"
    weights = load(origin, recipe.dtype, "cpu") if to_load else origin
    aim = aim_of(recipe, model, matrices, weights, refuse=False)
    arguments = origin, model, matrices, aim.pattern, dtype, tokens, place, controller, needs, execution, aim.misfits
    found = forecast.make_plan(*arguments)
    return replace(found, size=aim.budget.size, level=aim.level) if aim.budget else found


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
            saliency = metrics.on_one_scale(saliency, pattern.local or recipe.comparable)
            return (job.choose_level(saliency) or pattern)(saliency), record
        loaded, metric = job.loaded, recipe.parsed_metric()
        arguments = loaded.model, job.matrices, job.windows.tokens, metric, pattern, progress
        cut = calibration.sequential(*arguments, refine=recipe.refine, residency=loaded.residency, run=run)
        return cut.items(), {}


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
    if isinstance(settings, paper.Paper):
        if job.execution == "streamed" or ranks.count() > 1:
            raise InputError(
                "--controller paper learns a copy of the weights in memory, in one process; use --controller feedback"
            )
        duals, record = paper.descend(*arguments, settings, recipe.seed, progress)
    else:
        duals, record = descent.descend(*arguments, settings, recipe.seed, progress, loaded.residency, run)
    return duals, {"controller": {"targets": [str(target) for target in targets], **record}}


def _finished(output: Path, recipe: Recipe, source: Source) -> dict[str, Any] | None:
    """The report of this very run, if its output is there already: a job that is started again has nothing to do."""
    path = output / checkpoint.REPORT
    if runs.pending(output) or not path.is_file():
        return None
    try:
        report = objects.parse(path.read_bytes())
        objects.check(report, {"model": dict})
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; --overwrite without --resume makes it anew") from None
    return report if _same_run(report.get("recipe"), report["model"].get("name"), output, recipe, source) else None


def _calibrated(output: Path, recipe: Recipe, source: Source) -> dict[str, Any] | None:
    """As :func:`_finished`: the facts of a scores file."""
    if runs.pending(output) or not output.is_file():
        return None
    facts = artefacts.ScoresFile(output).facts
    return facts if _same_run(facts.get("recipe"), facts.get("base_name"), output, recipe, source) else None


def _same_run(settings: Any, name: Any, output: Path, recipe: Recipe, source: Source) -> bool:
    if settings != json.loads(json.dumps(recipe.record())) or name != str(source):
        return False
    runs.discard(output)
    return True


def _fitting(targets: Sequence[patterns.Pattern], shapes: Mapping[str, tuple[int, int]]) -> list[patterns.Pattern]:
    """The targets that every matrix can have."""
    return [target for target in targets if not any(target.misfit(*shape) for shape in shapes.values())]


def _check_names(origin: Origin, file: artefacts.MasksFile, matrices: Matrices | None, path: Path) -> None:
    """Masks for a model of another architecture name matrices that this one does not have."""
    keys = shards.entries(origin.shards)
    for name in file:
        if name not in matrices if matrices is not None else not shards.find_key(f"{name}.weight", keys):
            raise MismatchError(f"{path} was made for another model: {origin} has no matrix {name}")


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
