"""What a recipe's metric and controller make of calibration text: the saliency that masks are cut from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uniprune.job.recipe import Recipe
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.record import ControllerRecord, ScoringRecord, warn_of_starved
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.views import Comparable, Scores, View


def scored(calibration: Calibration, recipe: Recipe, targets: Sequence[Pattern]) -> tuple[Scores, ScoringRecord]:
    """The saliency that masks are cut from, and what the report says of its making."""
    metric, controller = recipe.parsed_metric(), recipe.parsed_controller()
    if controller is None:
        local = one_shot(calibration, metric)
        warn_of_starved(local.starved)
        return local, ScoringRecord(starved=local.starved)
    steps = recipe.steps_within(calibration.windows.shape[1])
    scores, record = controller.calibrate(calibration, metric, targets, steps, recipe.seed)
    saliency = Comparable(scores) if controller.comparable else View(scores)
    aimed = {"targets": [str(target) for target in targets]}
    warn_of_starved(record.starved)
    return saliency, ScoringRecord(ControllerRecord(**(record.model_dump() | aimed)))


def fitting(targets: Sequence[Pattern], shapes: Mapping[str, tuple[int, int]]) -> list[Pattern]:
    """The targets that every matrix can have."""
    return [target for target in targets if not any(target.unsupported(*shape) for shape in shapes.values())]
