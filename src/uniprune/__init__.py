"""Post-training pruning of language models: local saliency, one budget, masks, and no weight ever updated.

    >>> import uniprune
    >>> recipe = uniprune.Recipe(sparsity="2:4", text="c4")
    >>> report = uniprune.prune("HuggingFaceTB/SmolLM2-135M", recipe, Path("pruned"))  # doctest: +SKIP

The names below are loaded when they are first used: importing PyTorch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "controller.fisher": ("Fisher",),
    "controller.mirror_descent": ("MirrorDescent",),
    "controller.protocol": ("Controller", "ControllerRecord", "Cost"),
    "controller.unipruning": ("UniPruning",),
    "entrypoints.apply": ("apply",),
    "entrypoints.bench": ("bench",),
    "entrypoints.calibrate": ("calibrate",),
    "entrypoints.compare": ("compare",),
    "entrypoints.evaluate": ("check", "evaluate"),
    "entrypoints.mask": ("mask",),
    "entrypoints.permute": ("permute",),
    "entrypoints.plan": ("plan",),
    "entrypoints.prune": ("prune", "prune_in_place"),
    "entrypoints.report": ("report",),
    "entrypoints.sweep": ("sweep",),
    "errors": ("InputError", "MismatchError", "UniPruneError"),
    "job.recipe": ("Recipe",),
    "models.loading": ("Loaded", "load"),
    "runtime.model": ("accelerate",),
    "saliency.calibration": ("Calibration",),
    "saliency.metrics": ("RIA", "Magnitude", "Metric", "StochRIA", "Wanda"),
    "saliency.statistics": ("SquaredNorm", "Statistic"),
    "sparsity.patterns.nm": ("NM",),
    "sparsity.patterns.protocol": ("BasePattern", "Pattern"),
    "sparsity.patterns.tiled": ("Tiled",),
    "sparsity.patterns.unstructured": ("Unstructured",),
    "speed.semi_structured": ("to_semi_structured",),
    "training": ("KeepZeros", "merge_adapters"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

if TYPE_CHECKING:
    from uniprune.controller.fisher import Fisher
    from uniprune.controller.mirror_descent import MirrorDescent
    from uniprune.controller.protocol import Controller, ControllerRecord, Cost
    from uniprune.controller.unipruning import UniPruning
    from uniprune.entrypoints.apply import apply
    from uniprune.entrypoints.bench import bench
    from uniprune.entrypoints.calibrate import calibrate
    from uniprune.entrypoints.compare import compare
    from uniprune.entrypoints.evaluate import check, evaluate
    from uniprune.entrypoints.mask import mask
    from uniprune.entrypoints.permute import permute
    from uniprune.entrypoints.plan import plan
    from uniprune.entrypoints.prune import prune, prune_in_place
    from uniprune.entrypoints.report import report
    from uniprune.entrypoints.sweep import sweep
    from uniprune.errors import InputError, MismatchError, UniPruneError
    from uniprune.job.recipe import Recipe
    from uniprune.models.loading import Loaded, load
    from uniprune.runtime.model import accelerate
    from uniprune.saliency.calibration import Calibration
    from uniprune.saliency.metrics import RIA, Magnitude, Metric, StochRIA, Wanda
    from uniprune.saliency.statistics import SquaredNorm, Statistic
    from uniprune.sparsity.patterns.nm import NM
    from uniprune.sparsity.patterns.protocol import BasePattern, Pattern
    from uniprune.sparsity.patterns.tiled import Tiled
    from uniprune.sparsity.patterns.unstructured import Unstructured
    from uniprune.speed.semi_structured import to_semi_structured
    from uniprune.training import KeepZeros, merge_adapters

__all__ = [
    "NM",
    "RIA",
    "BasePattern",
    "Calibration",
    "Controller",
    "ControllerRecord",
    "Cost",
    "Fisher",
    "InputError",
    "KeepZeros",
    "Loaded",
    "Magnitude",
    "Metric",
    "MirrorDescent",
    "MismatchError",
    "Pattern",
    "Recipe",
    "SquaredNorm",
    "Statistic",
    "StochRIA",
    "Tiled",
    "UniPruneError",
    "UniPruning",
    "Unstructured",
    "Wanda",
    "__version__",
    "accelerate",
    "apply",
    "bench",
    "calibrate",
    "check",
    "compare",
    "evaluate",
    "load",
    "mask",
    "merge_adapters",
    "permute",
    "plan",
    "prune",
    "prune_in_place",
    "report",
    "sweep",
    "to_semi_structured",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
