"""The command ``permute``: a dense checkpoint that computes the same, with its hidden channels in an order that suits N:M.

What is written is a model like any other. So it is calibrated, pruned, packed and served as it is, and masks are bound to it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uniprune.artefacts import writer
from uniprune.artefacts.reports import Gain, Permutation
from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.origin import resolve
from uniprune.common import distributed
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import Stopwatch, versions
from uniprune.errors import InputError
from uniprune.job.inference import inferring
from uniprune.job.options import RunOptions
from uniprune.job.prepare import Job, device_of, prepare, progress_of
from uniprune.job.recipe import Recipe
from uniprune.models.channels import Channels, find_channels, fold, folding, reorder
from uniprune.models.loading import Loaded, Source, skeleton
from uniprune.models.matrices import choose_matrices
from uniprune.reporting import model_card
from uniprune.saliency.calibration import one_shot
from uniprune.sparsity.channel_order import kept, search
from uniprune.sparsity.patterns import NM
from uniprune.sparsity.structure import structure
from uniprune.storage import files


@inferring
def permute(
    source: Source,
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    max_memory: int | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Permutation:
    """Writes the model with its MLPs' hidden channels reordered for an N:M pattern, and pruning.json; returns that report.

    recipe: of it count the pattern, the metric that scores what is kept, and the text. source: as in
    :func:`pipeline.prune`; a model in memory is itself reordered. The report says for each consumer (down_proj) how much of
    its scores the pattern keeps, before and after. The dense outputs are the same up to the order of floating-point sums.
    Raises InputError for a pattern other than N:M, and for a model in which no reordering could be proved to be harmless.
    """
    pattern = recipe.pattern()
    if not isinstance(pattern, NM):
        raise InputError(f"{pattern}: the order of channels matters to N:M patterns only; use --sparsity 2:4")
    recipe = recipe.model_copy(update={"controller": "none"})
    origin = source.origin if isinstance(source, Loaded) else resolve(source)
    if origin and origin.quantised:
        raise InputError(
            f"model {origin} is quantised ({origin.quantised}): channels in another order would have other blocks and scales; "
            "prune it as it is, or permute the model that it was made from"
        )
    model = source.model if isinstance(source, Loaded) else skeleton(origin)  # type: ignore[arg-type]
    found = find_channels(model, choose_matrices(model, recipe.include, recipe.exclude))
    if not found:
        raise InputError(f"{source}: it has no hidden channels that could be proved to go in any order")
    watch = Stopwatch()
    options = RunOptions.of(device=device, max_memory=max_memory, overwrite=overwrite)
    with distributed.joined(device_of(options)):
        if distributed.count() > 1:
            raise InputError("permute runs in one process; start it without torchrun")
        with watch("prepare"):
            job = prepare(source, recipe, output, options, progress=progress)
        with progress_of(output, options, job.identity(recipe, command="permute")) as run:
            consumers = {channels.consumer: job.matrices[channels.consumer] for channels in found}
            with watch("calibrate"):
                saliency = one_shot(replace(job.calibration(progress, run), matrices=consumers), recipe.parsed_metric())
            orders: dict[str, Tensor] = {}
            gains: dict[str, Gain] = {}
            with watch("search"):
                for name, scores in progress(saliency.items(), "permuting", len(consumers)):
                    orders[name] = search(scores, pattern.n, pattern.m, seed=recipe.seed)
                    total = float(scores.sum(dtype=torch.float64))
                    orderings = (None, orders[name])  # of scores that are all 0, any order keeps all there is
                    before, after = (kept(scores, pattern.n, pattern.m, order) / total if total else 1.0 for order in orderings)
                    gains[name] = Gain(kept_before=before, kept_after=after)
            with files.new_folder(output, run.folder) as folder:
                with watch("write"):
                    write(job, found, orders, folder)
                report = Permutation(
                    model=job.model,
                    recipe=recipe.record(),
                    pattern=str(pattern),
                    structure=structure(pattern),
                    permuted=gains,
                    calibration=job.windows.describe(),
                    versions=versions(),
                    seconds=watch.seconds,
                )
                model_card.write(folder, report, job.loaded.origin)
                report.write(folder / files.REPORT)
                run.commit("done", {})
    return report


def write(job: Job, found: list[Channels], orders: dict[str, Tensor], folder: Path) -> None:
    """The checkpoint in another order; what has none of the channels is copied byte by byte."""
    origin = job.loaded.origin
    if origin is None or not origin.files:
        fold(job.loaded.model, found, orders)
        writer.write_checkpoint(job.loaded, None, folder)
        return
    writer.write_checkpoint(origin, None, folder)
    files = Files(folder)
    for channels in found:
        for name, (axis, order) in folding(channels, orders[channels.consumer]).items():
            entry = files.entries[files.layout(job.loaded.model).key(name)]
            bits = np.memmap(entry.file, entry.uint, "r+", entry.start, entry.shape)
            reorder(bits, axis, order)
            bits.flush()
