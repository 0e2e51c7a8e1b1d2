"""The methods that have rows: each prunes a model in memory, and gives its weights back as they were."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from uniprune.artefacts.mask_tools import CheckedMasks
from uniprune.artefacts.scores import ScoresFile
from uniprune.common.provenance import Stopwatch, sha256
from uniprune.comparison import sparsegpt
from uniprune.comparison.calibrations import CalibrationCache, Scored
from uniprune.errors import InputError
from uniprune.job.prepare import Job
from uniprune.job.recipe import Recipe
from uniprune.job.samples import TEXT_ALONE, check_takes_images
from uniprune.job.settings import Sparsity
from uniprune.models import masking
from uniprune.models.matrices import Matrices
from uniprune.saliency.record import ScoringRecord
from uniprune.saliency.sequential import refined, sequential
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns.protocol import Masks, Pattern
from uniprune.sparsity.patterns.spelling import default_scope
from uniprune.sparsity.structure import Structure, asked_as, claimed, structure
from uniprune.sparsity.views import comparable_for
from uniprune.storage.files import path_of


@dataclass(frozen=True)
class Candidate:
    """A method at a sparsity, spelled as records spell it. pattern: for the model's matrices; None of masks that are there."""

    method: Method
    sparsity: str
    recipe: Recipe
    pattern: Pattern | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        return self.method.name, self.sparsity

    def __str__(self) -> str:
        return f"{self.method.name} {self.sparsity}"

    @property
    def structure(self) -> Structure | None:
        """What its pattern is, or claims to be."""
        return structure(self.pattern) if self.pattern else self.method.claimed


@dataclass(frozen=True)
class CreatedMasks:
    """Masks of matrices, seconds by stage, and what a row says of the calibration."""

    masks: Masks
    seconds: dict[str, float] = field(default_factory=dict)
    record: ScoringRecord = field(default_factory=ScoringRecord)


@dataclass(frozen=True)
class Method:
    """name: as it is spelled. settings: of the recipe, over those of all methods."""

    name: str
    settings: Mapping[str, Any]
    updates_weights: ClassVar[bool] = False
    starts_from_metric: ClassVar[bool] = False  # the one of ``--metric``

    def check_images(self, recipe: Recipe) -> None:
        """Raises InputError if it cannot be calibrated on images."""
        check_takes_images(recipe)

    def calibration(self, candidate: Candidate) -> str:
        """The name of the calibration that a candidate needs."""
        return str(candidate)

    @property
    def has_masks(self) -> bool:
        """Whether its masks are there already."""
        return False

    @property
    def claimed(self) -> Structure | None:
        """What masks that are there already claim to be."""
        return None

    @property
    def default_scope(self) -> Scope | None:
        """The budget group of a fraction that none is said for; None: as its recipe has it."""
        return None

    def sparsities(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Those at which it has a row."""
        return asked

    def recorded(self, recipe: Recipe) -> dict[str, Any]:
        """What a row says of how its masks are made without ``compare``: a recipe, and the hash of a file."""
        return {"recipe": recipe.record()}

    def check(self, pattern: Pattern | None, matrices: Matrices) -> None:
        """Raises InputError for a pattern that it cannot create, or a file for other matrices."""

    def check_weights(self, job: Job) -> None:
        """Raises MismatchError for a file that was made for other weights."""

    def forget(self, cache: CalibrationCache, candidate: Candidate) -> None:
        """Deletes what was kept of a calibration in case of an interruption, now that its row is written."""
        cache.forget(self.calibration(candidate))

    @contextmanager
    def pruned(self, cache: CalibrationCache, candidate: Candidate) -> Iterator[CreatedMasks]:
        """Inside ``with``, the model is pruned; afterwards its weights are as they were, bit for bit."""
        created = self.create(cache, candidate)
        with masking.applied(cache.matrices, created.masks):
            yield created

    def create(self, cache: CalibrationCache, candidate: Candidate) -> CreatedMasks:
        """The masks."""
        raise NotImplementedError


@dataclass(frozen=True)
class Local(Method):
    """A local metric: one pass over the text, for all sparsities."""

    def create(self, cache: CalibrationCache, candidate: Candidate) -> CreatedMasks:
        return _created(cache.local(candidate.recipe.parsed_metric()), candidate)


@dataclass(frozen=True)
class Corrected(Method):
    """A controller, calibrated for each sparsity alone."""

    starts_from_metric: ClassVar[bool] = True

    def create(self, cache: CalibrationCache, candidate: Candidate) -> CreatedMasks:
        assert candidate.pattern is not None
        return _created(cache.corrected(candidate.recipe, [candidate.pattern], self.calibration(candidate)), candidate)


@dataclass(frozen=True)
class ForAny(Method):
    """The controller, calibrated once, for sparsities of all kinds."""

    starts_from_metric: ClassVar[bool] = True

    def calibration(self, candidate: Candidate) -> str:
        return self.name

    def forget(self, cache: CalibrationCache, candidate: Candidate) -> None:
        """Other sparsities need it still."""

    def recorded(self, recipe: Recipe) -> dict[str, Any]:
        return {"recipe": {name: value for name, value in recipe.record().items() if name not in Sparsity.model_fields}}

    def create(self, cache: CalibrationCache, candidate: Candidate) -> CreatedMasks:
        return _created(cache.for_any(candidate.recipe, self.calibration(candidate)), candidate)


@dataclass(frozen=True)
class ByBlock(Method):
    """Masks block after block, each calibrated on the pruned blocks before it."""

    starts_from_metric: ClassVar[bool] = True

    def create(self, cache: CalibrationCache, candidate: Candidate) -> CreatedMasks:
        assert candidate.pattern is not None
        by_block, watch = refined if candidate.recipe.refine else sequential, Stopwatch()
        with watch("calibrate"):
            masks, starved = by_block(
                cache.calibration(self.calibration(candidate)), candidate.recipe.parsed_metric(), candidate.pattern
            )
        return CreatedMasks(dict(masks), watch.seconds, ScoringRecord(starved=starved))


@dataclass(frozen=True)
class SparseGPT(Method):
    """damp, block_size: see ``sparsegpt``."""

    damp: float = 0.01
    block_size: int = 128
    updates_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.damp < math.inf or self.block_size < 1:
            raise InputError(f"sparsegpt: damp = {self.damp} is negative, or block_size = {self.block_size} below 1")

    def recorded(self, recipe: Recipe) -> dict[str, Any]:
        return {}

    def check_images(self, recipe: Recipe) -> None:
        raise InputError(f"{self.name} reads text alone; leave it out, {TEXT_ALONE}")

    def check(self, pattern: Pattern | None, matrices: Matrices) -> None:
        assert pattern is not None
        sparsegpt.check(pattern, matrices)

    @contextmanager
    def pruned(self, cache: CalibrationCache, candidate: Candidate) -> Iterator[CreatedMasks]:
        assert candidate.pattern is not None
        watch, given = Stopwatch(), (cache.model, cache.matrices, cache.tokens, candidate.pattern)
        with masking.preserved(cache.matrices, cache.matrices):
            with watch("calibrate"):
                found = sparsegpt.sparsegpt(*given, self.damp, self.block_size, cache.progress)
            yield CreatedMasks(found, watch.seconds)


@dataclass(frozen=True)
class FromFile(Method):
    """Masks that are there already, or scores to create them from."""

    file: ScoresFile | CheckedMasks

    @property
    def has_masks(self) -> bool:
        return isinstance(self.file, CheckedMasks)

    @property
    def claimed(self) -> Structure | None:
        return claimed(self.file.facts.pattern) if isinstance(self.file, CheckedMasks) else None

    @property
    def default_scope(self) -> Scope | None:
        return default_scope(self.file.comparable) if isinstance(self.file, ScoresFile) else None

    def sparsities(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        return (asked_as(self.file.facts.pattern),) if isinstance(self.file, CheckedMasks) else asked

    def recorded(self, recipe: Recipe) -> dict[str, Any]:
        return {"file_sha256": sha256(path_of(self.name))}

    def check(self, pattern: Pattern | None, matrices: Matrices) -> None:
        self.file.facts.check_matrices(self.file.shapes, matrices, "it", "this one, with the layers that are chosen,")
        if isinstance(self.file, ScoresFile) and pattern is not None:
            self.file.warn_unless_for([pattern])

    def check_weights(self, job: Job) -> None:
        found = {name: job.binding.digests[name] for name in self.file.shapes}
        self.file.facts.check_digests(found, f"method {self.name}", job.loaded)

    def create(self, cache: CalibrationCache, candidate: Candidate) -> CreatedMasks:
        if isinstance(self.file, CheckedMasks):
            return CreatedMasks(dict(self.file))
        return _created(Scored(self.file, None, ScoringRecord()), candidate)


def _created(found: Scored, candidate: Candidate) -> CreatedMasks:
    pattern, watch = candidate.pattern, Stopwatch()
    assert pattern is not None
    with watch("mask"):
        masks = dict(pattern(comparable_for(found.saliency, pattern)))
    calibration = {} if found.seconds is None else {"calibrate": found.seconds}
    return CreatedMasks(masks, calibration | watch.seconds, found.record)
