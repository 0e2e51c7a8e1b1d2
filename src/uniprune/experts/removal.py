"""Experts removed whole: what a run needs, which experts it keeps, and the checkpoint without the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from uniprune.artefacts.reports import ExpertCounts, ExpertLayer
from uniprune.checkpoints.checkpoint import Files, checkpoint_of
from uniprune.checkpoints.companion_files import copy_companions, copy_terms
from uniprune.common.matrix_names import expression_for
from uniprune.common.progress import Progress, silent
from uniprune.experts import files as expert_files
from uniprune.experts.criteria import best, by_weights, observe, of_experts
from uniprune.experts.structure import ExpertReduction, reduction_of
from uniprune.job.destination import ToCheckpoint
from uniprune.job.options import RunOptions
from uniprune.job.prepare import Job, prepare
from uniprune.job.recipe import Recipe
from uniprune.job.scoring import scored
from uniprune.models.loading import Source, model_of, resolved
from uniprune.models.matrices import Matrices, find_matrices
from uniprune.saliency.metrics import REAP
from uniprune.saliency.record import ScoringRecord
from uniprune.sparsity.patterns.spelling import default_scope
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.storage import strict_json
from uniprune.storage.runs import Run

KeptLayers = Mapping[str, ExpertLayer]


@dataclass(frozen=True)
class Removal:
    """A run that removes experts, checked and loaded. recipe: as it was asked for; reduction: what is kept of each layer."""

    job: Job
    recipe: Recipe
    reduction: ExpertReduction

    @property
    def counts(self) -> ExpertCounts:
        return counts(self.reduction, self.job.loaded.model)

    @property
    def files(self) -> Files:
        checkpoint = self.job.loaded.checkpoint
        assert isinstance(checkpoint, Files)
        return checkpoint

    def choose(self, progress: Progress, run: Run) -> tuple[dict[str, ExpertLayer], ScoringRecord]:
        """Which experts each layer keeps, and what the report says of how their scores came to be.

        One forward pass over the calibration text sees what every expert puts out; another metric, or a controller, then has
        the passes that it needs.
        """
        calibration = self.job.calibration(progress, run)
        fraction = self.recipe.experts
        assert fraction is not None
        seen = observe(calibration)
        record = ScoringRecord()
        scores = {layer: experts.reap for layer, experts in seen.items()}
        if not isinstance(self.recipe.parsed_metric(), REAP):
            target = Unstructured(fraction, default_scope(self.recipe.comparable))
            saliency, record = scored(calibration, self.recipe, [target])
            blind = self.recipe.parsed_metric().statistic is None and not self.recipe.uses_controller
            scores = by_weights(saliency, calibration.matrices, None if blind else seen)
        layers = {
            layer: ExpertLayer(
                kept=best(scores[layer], self.reduction.kept, self.reduction.groups),
                tokens=experts.tokens,
                scores=scores[layer].tolist(),
                reap=experts.reap.tolist(),
            )
            for layer, experts in seen.items()
        }
        return layers, record

    def write(self, layers: KeptLayers, folder: Path) -> None:
        """Writes the checkpoint with the experts that are kept into an empty folder."""
        located = self.files.layout(self.job.loaded.model).located
        kept = {layer: experts.kept for layer, experts in layers.items()}
        copy_companions(self.files, folder)
        copy_terms(self.job.loaded.origin, folder)
        expert_files.write(self.files, self.reduction.tensors(self.files, located, kept), folder, self.counts.parameters)
        config = folder / "config.json"
        settings = self.reduction.configure(strict_json.parse(config.read_bytes()))
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def counts(reduction: ExpertReduction, model: nn.Module) -> ExpertCounts:
    """What is kept of a model, in numbers."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    left = sum(size * reduction.kept // reduction.experts if name in reduction.axes else size for name, size in sizes.items())
    return ExpertCounts(
        layers=len(reduction.layers),
        of=reduction.experts,
        kept=reduction.kept,
        groups=reduction.groups,
        parameters=left,
        left_out=len(reduction.left_out),
    )


def planned(fraction: float, model: nn.Module, matrices: Matrices) -> tuple[Matrices, ExpertCounts, int]:
    """Of a run the matrices that it scores, what would be kept, and the bytes of the smaller checkpoint."""
    reduction = reduction_of(fraction, model, matrices)
    files = checkpoint_of(model)
    assert isinstance(files, Files)
    some = {layer: range(reduction.kept) for layer in reduction.layers}  # whichever are kept, the size is the same
    size = expert_files.size(files, reduction.tensors(files, files.layout(model).located, some))
    return of_experts(matrices), counts(reduction, model), size


def prepared(source: Source, recipe: Recipe, output: Path, options: RunOptions, progress: Progress = silent) -> Removal:
    """Checks what is asked for, the cheap things first, and loads what it takes. Raises InputError if it cannot be done."""
    assert recipe.experts is not None
    model = model_of(resolved(source))
    matrices = find_matrices(model)
    reduction = reduction_of(recipe.experts, model, matrices)
    inner = recipe.model_copy(update={"include": alike(of_experts(matrices))})
    return Removal(prepare(source, inner, ToCheckpoint(output, masks=False), options, progress), recipe, reduction)


def alike(matrices: Matrices) -> tuple[str, ...]:
    """Regular expressions that match these matrices, and those in other blocks and of other experts at the same places."""
    return tuple(dict.fromkeys(map(expression_for, matrices)))
