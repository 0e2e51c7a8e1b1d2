"""The command ``permute``: a dense checkpoint that computes the same, with its channels in an order that suits N:M.

What is written is a model like any other. So it is calibrated, pruned, packed and served as it is, and masks are bound to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uniprune.artefacts import writer
from uniprune.artefacts.reports import Gain, Permutation
from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.layout import keys_of, names_of
from uniprune.common import distributed
from uniprune.common.pictures import showing
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import Stopwatch, versions
from uniprune.errors import InputError, UniPruneError
from uniprune.job.destination import ToCheckpoint
from uniprune.job.forecast.prospect import use_device
from uniprune.job.inference import inferring
from uniprune.job.options import RunOptions
from uniprune.job.prepare import Job, prepare, progress_of
from uniprune.job.recipe import Recipe, check_recipe
from uniprune.models.channels.folding import Channels, fold, folding, reorder
from uniprune.models.channels.heads import find_heads
from uniprune.models.channels.hidden import find_hidden
from uniprune.models.channels.stream import find_stream
from uniprune.models.channels.trial import TOKENS
from uniprune.models.loading import Source, resolved
from uniprune.models.matrices import find_blocks
from uniprune.models.replay.replay import Replay
from uniprune.reporting import model_card
from uniprune.saliency.calibration import one_shot
from uniprune.sparsity.channel_order import kept, search_within
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.structure import structure
from uniprune.sparsity.views import Scores
from uniprune.storage import files

logger = logging.getLogger(__name__)
SAMPLE = 1 << 22  # scores that the order of the residual stream is searched for on: 1,024 rows of 4,096 channels
Order = tuple[Channels, Tensor]
Names = Mapping[int, Sequence[str]]  # of parameters, by id


@inferring
def permute(
    source: Source,
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    max_memory: int | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Permutation:
    """Writes the model with its channels reordered for an N:M pattern, and pruning.json; returns that report.

    Hidden channels of MLPs, values within their heads and the residual stream are reordered, each where that could be proved to
    be harmless. recipe: of it count the pattern, the metric that scores what is kept, and the text. source: as in
    :func:`uniprune.prune`; a model in memory is itself reordered. The report says for each matrix whose inputs have another
    order how much of its scores the pattern keeps, before and after. The dense outputs are the same up to the order of
    floating-point sums.
    Raises InputError for a pattern other than N:M, and for a model in which no reordering could be proved to be harmless.
    """
    output = files.path_of(output)
    check_recipe(recipe)
    pattern = recipe.pattern()
    if not isinstance(pattern, NM):
        raise InputError(f"{pattern}: the order of channels matters to N:M patterns only; use --sparsity 2:4")
    recipe = recipe.replace(controller="none")
    origin = resolved(source).origin
    if origin and origin.quantised:
        raise InputError(
            f"model {origin} is quantised ({origin.quantised}): channels in another order would have other blocks and scales; "
            "prune it as it is, or permute the model that it was made from"
        )
    if distributed.started() > 1:
        raise InputError("permute runs in one process; start it without torchrun")
    watch = Stopwatch()
    options = RunOptions.of(device=device, max_memory=max_memory, overwrite=overwrite)
    with distributed.joined(use_device(options, source)):
        with watch("prepare"):
            job = prepare(source, recipe, ToCheckpoint(output, masks=False), options, progress)
            found = find(job, pattern)
        if not found:
            raise InputError(f"{source}: it has no channels that could be proved to go in any order")
        with progress_of(output, options, job.identity(recipe, command="permute")) as run:
            consumers = {name: job.matrices[name] for channels in found for name in channels.consumers}
            with watch("calibrate"):
                saliency = one_shot(replace(job.calibration(progress, run), matrices=consumers), recipe.parsed_metric())
            with watch("search"):
                orders = []
                for channels in progress(found, "permuting", len(found)):
                    scores = rows(channels, saliency, recipe.seed)
                    orders.append((channels, search_within(scores, channels.groups, pattern.n, pattern.m, recipe.seed)))
                gains = dict(gained(orders, saliency, pattern))
            with files.new_folder(output, run.folder) as folder:
                with watch("write"):
                    write(job, orders, folder)
                report = Permutation(
                    model=job.model,
                    recipe=recipe.record(),
                    pattern=str(pattern),
                    structure=structure(pattern),
                    permuted={name: gains[name] for name in consumers},
                    calibration=job.windows.describe(),
                    versions=versions(),
                    seconds=watch.seconds,
                )
                model_card.complete(folder, report, job.loaded.origin)
                run.commit("done", {})
    return report


def find(job: Job, pattern: NM) -> list[Channels]:
    """All channels that may be reordered, in the model and in its checkpoint."""
    found = find_hidden(job.loaded.model, job.matrices)
    others = job.matrices.keys() - {name for channels in found for name in channels.consumers}
    try:
        with showing(job.loaded.model, None):  # where channels lie, text alone tells
            found += _between_modules(job, others, pattern)
    except InputError:
        raise
    except UniPruneError as error:
        logger.info("only hidden channels of MLPs may move: %s", error)
    names = names_of(job.loaded.model)
    return [channels for channels in found if _stored(job, channels, names)]


def _between_modules(job: Job, consumers: Set[str], pattern: NM) -> list[Channels]:
    """The channels that are proved by running blocks one by one. Raises UniPruneError for a model whose blocks cannot be."""
    model, ids = job.loaded.model, job.windows.tokens[:1, :TOKENS]
    replay = Replay.probed(model, find_blocks(model)[1], ids, job.loaded.residency)
    heads = find_heads(model, consumers, replay, ids)
    found = [channels for channels in heads if channels.size // channels.groups % pattern.m == 0]
    if (stream := find_stream(model, consumers, replay, ids)) and _all_loaded(job, stream.size):
        found.append(stream)
    return found


def _stored(job: Job, channels: Channels, names: Names) -> bool:
    """Whether the checkpoint has each parameter that goes along as a tensor of its own."""
    try:
        return all(keys(job, axis.parameter, names) for axis in channels.axes)
    except InputError as error:
        logger.info("%s: its inputs stay in their order: %s", channels.consumers[0], error)
        return False


def _all_loaded(job: Job, width: int) -> bool:
    """Whether the model has all tensors of the checkpoint that are as wide as its residual stream.

    Those that it does not load (heads that predict several tokens) would be left in the old order.
    """
    origin = job.loaded.origin
    if origin is None or not origin.files:
        return True
    located = {key for place in origin.files.layout(job.loaded.model).located.values() for key in keys_of(place)}
    strange = [key for key, entry in origin.files.entries.items() if key not in located and width in entry.shape]
    if strange:
        logger.info("the residual stream stays in its order: the model does not load %s", strange[0])
    return not strange


def keys(job: Job, parameter: str, names: Names) -> set[str]:
    """The checkpoint's tensors that are a parameter: one, or two if it is tied and stored by both names.

    names: of the model's parameters. Where there is no checkpoint, the parameter's name.
    Raises InputError for a parameter that is stored in another form.
    """
    origin, model = job.loaded.origin, job.loaded.model
    if origin is None or not origin.files:
        return {parameter}
    return {origin.files.layout(model).key(name) for name in names[id(model.get_parameter(parameter))]}


def rows(channels: Channels, saliency: Scores, seed: int) -> Tensor:
    """The scores that an order is searched for on, ``[rows, size]``.

    Of several consumers, each has the same share of its rows among them, and the same mean.
    """
    if len(channels.consumers) == 1:
        return channels.rows(saliency[channels.consumers[0]])
    generator = torch.Generator().manual_seed(seed)
    share = min(1.0, SAMPLE / sum(saliency.size(name) for name in channels.consumers))
    drawn = []
    for name in channels.consumers:
        scores = channels.rows(saliency[name])
        some = torch.randperm(len(scores), generator=generator)[: max(1, round(share * len(scores)))]
        drawn.append(scores[some.to(scores.device)] / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny))
    return torch.cat(drawn)


def gained(orders: list[Order], saliency: Scores, pattern: NM) -> Iterator[tuple[str, Gain]]:
    """What each matrix gained whose inputs have another order."""
    for channels, order in orders:
        for name in channels.consumers:
            scores = saliency[name]
            total = float(scores.sum(dtype=torch.float64))
            inputs = (None, channels.inputs(order))  # of scores that are all 0, any order keeps all there is
            before, after = (kept(scores, pattern.n, pattern.m, one) / total if total else 1.0 for one in inputs)
            yield name, Gain(kept_before=before, kept_after=after)


def write(job: Job, orders: list[Order], folder: Path) -> None:
    """The checkpoint in another order; what has none of the channels is copied byte by byte."""
    origin = job.loaded.origin
    if origin is None or not origin.files:
        fold(job.loaded.model, orders)
        writer.write_checkpoint(job.loaded, None, folder)
        return
    writer.write_checkpoint(origin, None, folder)
    written, names = Files(folder), names_of(job.loaded.model)
    for channels, order in orders:
        for name, (axis, entries) in folding(channels, order):
            for key in keys(job, name, names):
                entry = written.entries[key]
                bits = np.memmap(entry.file, entry.uint, "r+", entry.start, entry.shape)
                reorder(bits, axis, entries)
                bits.flush()
