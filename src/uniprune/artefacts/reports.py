"""What stands in ``pruning.json``, and what ``mask`` returns: the outcome of pruning as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from uniprune.checkpoints.origin import Origin, called
from uniprune.common.matrix_names import block_of, kind_of, split_at_block
from uniprune.common.provenance import sparsity
from uniprune.data.text import TextFacts
from uniprune.errors import InputError
from uniprune.models.blocks import dtype_of
from uniprune.models.loading import Loaded, dtype_name
from uniprune.saliency.record import ControllerRecord, Starved
from uniprune.sparsity.structure import Structure
from uniprune.storage.files import REPORT
from uniprune.storage.record import Count, Facts, Fraction, Record, Shape, parsed

OUTSIDE = "none"  # the block of a matrix whose name has no number


class ModelFacts(Facts):
    """A dense model: its name, and the fingerprint of its prunable matrices (docs/masks.md).

    quantised: how its files store weights as codes, if they do. dtype: computed in, to which codes were dequantised; None of a
    model that was not run.
    Of one from the Hub, repository: ``owner/name``, and commit: whose files were read.
    """

    name: str
    fingerprint: str | None = None
    quantised: str | None = None
    dtype: str | None = None
    repository: str | None = None
    commit: str | None = None

    @classmethod
    def of(cls, source: Loaded | Origin, fingerprint: str) -> ModelFacts:
        """A model as it was found, or as it is in memory."""
        facts: dict[str, Any] = {"quantised": str(source.quantised) if source.quantised else None}
        origin = source.origin
        if isinstance(source, Loaded):
            facts["dtype"] = dtype_name(dtype_of(source.model))
        if origin and origin.repository:
            facts |= {"repository": origin.repository, "commit": origin.commit}
        return cls(name=called(str(source)), fingerprint=fingerprint, **facts)

    @property
    def title(self) -> str:
        """What it is called, without where it lies."""
        return Path(self.repository or self.name).name


class PrunedMatrix(Facts):
    """``shape`` is (out, in); ``sparsity`` the fraction of its weights that is removed."""

    shape: Shape
    sparsity: Fraction

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


class SizeBudget(Facts):
    """The most bytes that the archive may have, and the sparsity that this became."""

    bytes: Count
    sparsity: Fraction


def by_place(matrices: Mapping[str, tuple[float, int]]) -> dict[tuple[str, str], float]:
    """Sparsity by (block, kind): the number of a matrix's block, and its kind among that block's. A block's experts are one.

    matrices: name -> sparsity, and size for the mean over experts.
    """
    totals: dict[tuple[str, str], list[float]] = {}
    for name, (removed, size) in matrices.items():
        place = block_of(name) or OUTSIDE, kind_of(split_at_block(name)[1])
        total = totals.setdefault(place, [0.0, 0.0])
        total[0] += removed * size
        total[1] += size
    return {place: part / whole if whole else 0.0 for place, (part, whole) in totals.items()}


class Realised(Facts):
    """A pattern and what it removed. unsupported: matrices that could not have it, and why."""

    pattern: str
    structure: Structure | None = None
    unsupported: dict[str, str] = {}
    sparsity: Fraction
    matrices: dict[str, PrunedMatrix]

    @property
    def weights(self) -> int:
        """How many weights are prunable."""
        return sum(matrix.size for matrix in self.matrices.values())

    @property
    def pattern_words(self) -> str:
        """What the pattern means."""
        return self.structure.words if self.structure else self.pattern

    @property
    def grid(self) -> dict[tuple[str, str], float]:
        """Sparsity by block and kind of matrix."""
        return by_place({name: (matrix.sparsity, matrix.size) for name, matrix in self.matrices.items()})


class Masked(Realised, Record):
    """What ``mask`` returns."""

    kind: Literal["mask"] = "mask"


class Pruning(Realised, Record):
    """``pruning.json`` of ``prune`` and ``apply``.

    size: if one was asked for. controller: if one ran. masks_sha256: of the masks file; None for a model that was pruned in
    place. prunable: weights of the model that could have been chosen, if they were counted. differs: matrices with other
    weights than the masks were made for (``apply --force``). speed: whether it is faster on the machine that wrote it, in a
    sentence. seconds: by stage.
    Of ``apply``, which has masks only, neither recipe nor calibration is known.
    """

    kind: Literal["pruning"] = "pruning"
    model: ModelFacts
    matrices: Annotated[dict[str, PrunedMatrix], Field(min_length=1)]
    recipe: dict[str, Any] = {}
    size: SizeBudget | None = None
    calibration: TextFacts | None = None
    controller: ControllerRecord | None = None
    starved: Starved | None = None
    masks_sha256: str | None = None
    prunable: Count | None = None
    differs: list[str] = []
    speed: str | None = None
    versions: dict[str, str] = {}
    seconds: dict[str, float] = {}

    @property
    def zeros(self) -> float:
        """The fraction removed of all prunable weights: of those that were chosen if no more were counted."""
        return self.sparsity * self.weights / self.prunable if self.prunable else self.sparsity


class Gain(Facts):
    """The share of a matrix's scores that the pattern keeps, before and after its inputs were reordered."""

    kept_before: float
    kept_after: float


class Permutation(Record):
    """``pruning.json`` of ``permute``. permuted: what each matrix gained whose inputs were reordered."""

    kind: Literal["permutation"] = "permutation"
    model: ModelFacts
    pattern: str
    structure: Structure | None = None
    permuted: dict[str, Gain]
    recipe: dict[str, Any] = {}
    calibration: TextFacts | None = None
    versions: dict[str, str] = {}
    seconds: dict[str, float] = {}


class ExpertCounts(Facts):
    """How many experts each of so many layers has and keeps. groups: of experts next to each other, that keep as many each.

    parameters: of the model without the others. left_out: stored tensors that go as well, of layers of experts that the model
    does not load (heads that predict several tokens).
    """

    layers: Count
    of: Count
    kept: Count
    groups: Count = 1
    parameters: Count
    left_out: Count = 0


class ExpertLayer(Facts):
    """A layer's experts. kept: their numbers. Of all of them, tokens: how many of the calibration text were routed to each;
    scores: what they were chosen by; reap: the router's weight times the norm of the output, the mean over those tokens.
    """

    kept: list[Count]
    tokens: list[Count]
    scores: list[float]
    reap: list[float]

    @property
    def unreached(self) -> list[int]:
        """The numbers of the experts that no token was routed to."""
        return [number for number, tokens in enumerate(self.tokens) if not tokens]


class ExpertRemoval(Record):
    """``pruning.json`` of ``prune`` with ``experts``. layers: by the name of the module that holds a layer's experts.

    unreached: the numbers of the experts that no token of the calibration text was routed to, by layer.
    """

    kind: Literal["experts"] = "experts"
    model: ModelFacts
    experts: ExpertCounts
    layers: Annotated[dict[str, ExpertLayer], Field(min_length=1)]
    unreached: dict[str, list[Count]] = {}
    recipe: dict[str, Any] = {}
    calibration: TextFacts | None = None
    controller: ControllerRecord | None = None
    starved: Starved | None = None
    versions: dict[str, str] = {}
    seconds: dict[str, float] = {}


def realised(removed: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Of :class:`Realised` the sparsity, in all and for each matrix."""
    return {
        "sparsity": sparsity(removed, shapes),
        "matrices": {name: PrunedMatrix(shape=shapes[name], sparsity=removed[name]) for name in removed},
    }


def report_of(folder: Path) -> Pruning | Permutation | ExpertRemoval | None:
    """What a model's folder says of how it was made; None of a dense one, and of one that somebody else made."""
    try:
        return read_report(folder / REPORT)
    except InputError:
        return None


def read_report(path: Path) -> Pruning | Permutation | ExpertRemoval:
    """A ``pruning.json``. Raises InputError that names the file and the field at fault."""
    data = parsed(path)
    if data.get("kind") == ExpertRemoval.kind_name():
        return ExpertRemoval.checked(path, data)
    return (Permutation if "permuted" in data else Pruning).checked(path, data)
