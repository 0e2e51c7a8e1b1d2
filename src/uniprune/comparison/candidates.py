"""What a request comes to: a candidate for each row, its method and recipe checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from safetensors import SafetensorError, safe_open

from uniprune.artefacts.mask_tools import CheckedMasks
from uniprune.artefacts.masks import MasksFacts
from uniprune.artefacts.scores import ScoresFile
from uniprune.checkpoints.origin import Origin
from uniprune.common import fields
from uniprune.comparison.methods import ByBlock, Candidate, Corrected, ForAny, FromFile, Local, Method, SparseGPT
from uniprune.comparison.request import ComparisonRequest
from uniprune.controller.controllers import ALIASES, CONTROLLERS
from uniprune.errors import InputError, UniPruneError
from uniprune.job.aim import aim_of
from uniprune.job.recipe import Recipe
from uniprune.job.settings import Settings, Sparsity
from uniprune.models.loading import Loaded
from uniprune.models.matrices import Matrices
from uniprune.saliency.metrics import METRICS
from uniprune.sparsity.patterns import spelling
from uniprune.sparsity.patterns.nm import NM
from uniprune.storage import strict_json
from uniprune.storage.files import path_of
from uniprune.storage.tensor_file import KEY

OTHERS = ("any", "sequential", "refine", "sparsegpt")


def parse(name: str) -> Method:
    """A method from its spelling. Raises InputError for an unknown one, and for a file that is neither scores nor masks."""
    if name.endswith(".safetensors"):
        return _of_file(name)
    kind, _, rest = name.partition(":")
    if kind in METRICS:
        return Local(name, {"metric": name, "controller": "none"})
    try:
        settings = fields.parse_pairs(filter(None, rest.split(",")), "feedback:step_size=0.006")
    except InputError as error:
        raise InputError(f"method {name}: {error}") from None
    if kind in CONTROLLERS or kind in ALIASES:
        return Corrected(name, {"controller": kind, "tuning": settings})
    if kind == "any":
        return ForAny(name, {"controller": "feedback", "tuning": settings})
    if kind == "sparsegpt":
        return fields.build(SparseGPT, {"name": name, "settings": {"controller": "none"}, **settings}, f"method {kind}")
    if name in ("sequential", "refine"):
        return ByBlock(name, {name: True})
    known = ", ".join((*METRICS, *CONTROLLERS, *OTHERS))
    raise InputError(f"method {name!r:.200} is unknown; use {known}, or a scores or masks file (.safetensors)")


def _of_file(name: str) -> FromFile:
    path = path_of(name)
    if not path.is_file():
        raise InputError(f"method {name} is a file that does not exist; give a scores or masks file, or a method's name")
    try:
        with safe_open(path, framework="pt") as file:
            facts = strict_json.parse((file.metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise InputError(f"method {name} is not a complete safetensors file of uniprune ({error})") from None
    if facts.get("kind") == MasksFacts.kind_name():
        return FromFile(name, {"controller": "none"}, CheckedMasks(path))
    return FromFile(name, {"controller": "none"}, ScoresFile(path))


def asked(request: ComparisonRequest) -> list[Candidate]:
    """The candidates that a request is about, method by method. Raises InputError that names the method at fault."""
    given = request.given()
    shared = {name: given[name] for name in Settings.model_fields if name in given}
    without = {name: value for name, value in shared.items() if name not in Sparsity.model_fields}
    found: list[Candidate] = []
    for name in dict.fromkeys(request.methods):
        method = parse(name)
        for sparsity in dict.fromkeys(map(spelling.canonical, method.sparsities(request.sparsities))):
            with naming(name, sparsity):
                settings = without if method.has_masks else shared | {"sparsity": sparsity}
                if not method.has_masks and isinstance(spelling.parse(sparsity), NM):
                    settings.pop("scope", None)  # it is of fractions
                elif method.default_scope and not settings.get("allow"):  # of choices there is one budget in any case
                    settings["scope"] = settings.get("scope") or method.default_scope
                found.append(Candidate(method, sparsity, Recipe(**settings | dict(method.settings))))
    if not found:
        raise InputError("nothing to compare; give --methods and --sparsity, such as wanda,feedback and 0.5,2:4")
    return found


def fitted(candidates: list[Candidate], matrices: Matrices, source: Loaded | Origin) -> list[Candidate]:
    """The candidates with their patterns, as a model's matrices can have them. Raises InputError, MismatchError if not."""
    found = []
    for candidate in candidates:
        with naming(candidate.method.name, candidate.sparsity):
            pattern = aim_of(candidate.recipe, matrices, source).pattern
            candidate.method.check(pattern, matrices)
            found.append(replace(candidate, pattern=pattern))
    return found


@contextmanager
def naming(method: str, sparsity: str) -> Iterator[None]:
    """An error inside ``with`` says of which method at which sparsity it is."""
    try:
        yield
    except UniPruneError as error:
        raise type(error)(f"method {method} at {sparsity}: {error}") from None
