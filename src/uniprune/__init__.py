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
    "assessment": ("check", "evaluate"),
    "errors": ("InputError", "MismatchError", "UniPruneError"),
    "metrics": ("Magnitude", "RIA", "StochRIA", "Wanda"),
    "models": ("Loaded", "load"),
    "page": ("report",),
    "patterns": ("NM", "Unstructured"),
    "pipeline": ("apply", "calibrate", "mask", "plan", "prune"),
    "recipe": ("Recipe",),
    "reordering": ("permute",),
    "semi_structured": ("to_semi_structured",),
    "speed": ("bench",),
    "curve": ("sweep",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

if TYPE_CHECKING:
    from uniprune.assessment import check, evaluate
    from uniprune.curve import sweep
    from uniprune.errors import InputError, MismatchError, UniPruneError
    from uniprune.metrics import RIA, Magnitude, StochRIA, Wanda
    from uniprune.models import Loaded, load
    from uniprune.page import report
    from uniprune.patterns import NM, Unstructured
    from uniprune.pipeline import apply, calibrate, mask, plan, prune
    from uniprune.recipe import Recipe
    from uniprune.reordering import permute
    from uniprune.semi_structured import to_semi_structured
    from uniprune.speed import bench

__all__ = [
    "NM",
    "RIA",
    "InputError",
    "Loaded",
    "Magnitude",
    "MismatchError",
    "Recipe",
    "StochRIA",
    "UniPruneError",
    "Unstructured",
    "Wanda",
    "__version__",
    "apply",
    "bench",
    "calibrate",
    "check",
    "evaluate",
    "load",
    "mask",
    "permute",
    "plan",
    "prune",
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
