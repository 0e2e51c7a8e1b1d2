"""The controllers by name, their spelling in recipes and on the command line, and what they aim at for any sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uniprune.common import fields
from uniprune.controller.fisher import Fisher
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.protocol import Controller
from uniprune.controller.unipruning import UniPruning
from uniprune.errors import InputError
from uniprune.saliency.metrics import METRICS
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.patterns.unstructured import Unstructured

CONTROLLERS: dict[str, type[Controller]] = {
    "feedback": MirrorDescent,
    "fisher": Fisher,
    "unipruning": UniPruning,
}
ALIASES = {"paper": "unipruning"}  # what recipes and tables of earlier versions say
NONE = "none"  # the local metric alone


def parse(name: str, tuning: Mapping[str, Any]) -> Controller | None:
    """The controller of a name, with some of its settings; None for ``none``, which has none.

    Raises InputError for an unknown name or setting, and for a value that the setting cannot have.
    """
    if name == NONE:
        if tuning:
            raise InputError("tuning (--set) is of a controller, and none runs; leave it out")
        return None
    kind = CONTROLLERS.get(ALIASES.get(name, name))
    if kind is None:
        other = f"; {name} is a metric: --metric {name}" if name in METRICS else ""
        raise InputError(f"--controller = {name!r}: it is unknown; use one of {', '.join((NONE, *CONTROLLERS))}{other}")
    return fields.build(kind, tuning, "tuning (--set)")


def name_of(controller: Controller | None) -> str:
    """The name of a controller, that of its class if it is in no table."""
    if controller is None:
        return NONE
    names = {kind: name for name, kind in CONTROLLERS.items()}
    return names.get(type(controller), type(controller).__name__)


def record(controller: Controller | None) -> dict[str, Any]:
    """The settings of a recipe that ask for a controller; of one that is in no table, what JSON can say of it."""
    if controller is None or type(controller) in CONTROLLERS.values():
        default = fields.values_of(type(controller)()) if controller else {}
        values = fields.values_of(controller) if controller else {}
        tuning = {name: value for name, value in values.items() if value != default[name]}
        return {"controller": name_of(controller), "tuning": tuning}
    return {"controller": fields.record(controller), "tuning": {}}


def check(controller: Any) -> None:
    """Raises InputError, with the reason, unless an object can be the controller of a run."""
    declared = ("cost", "in_memory", "one_process", "comparable", "images", "holds_out")
    members = (*declared, "step_tokens", "logits", "calibrate")
    try:
        fields.check_object(controller, "controller", members)
    except InputError as error:
        raise InputError(f"{error}; a subclass of uniprune.Controller has all but cost and calibrate") from None


def any_sparsity() -> tuple[Pattern, ...]:
    """The targets, in turn, of a calibration whose scores are for any sparsity; 2:4 twice: it learns least from the others."""
    return *(Unstructured(sparsity, "model") for sparsity in (0.5, 0.6, 0.7)), NM(2, 4), NM(4, 8), NM(2, 4)
