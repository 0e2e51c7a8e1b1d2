"""What results say, put together: which measurements are of which model, what compares with what, in figures and words.

Nothing is compared that was not measured alike: perplexities of other texts or windows never stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import abspath, normpath
from pathlib import PurePath

from uniprune.artefacts.reports import Pruning
from uniprune.common.formatting import apart, percent, short
from uniprune.common.significance import paired_error
from uniprune.comparison.results import DENSE as METHOD_DENSE
from uniprune.comparison.results import Comparison, ComparisonProtocol
from uniprune.evaluation.results import Closeness, Evaluation, Row, Sweep, SweepProtocol, samples, unbeaten
from uniprune.reporting.results import ResultFile
from uniprune.runtime.layout import Packing
from uniprune.speed.results import Speeds
from uniprune.storage.files import path_of
from uniprune.storage.record import Facts

Measured = Evaluation | SweepProtocol | ComparisonProtocol  # all say on which windows of which text

CLOSE = 0.005  # of the weights: a model with fewer zeros is nobody's pruned one, and two this close may be one

EVALUATED = "evaluated"


class Change(Facts):
    """Of an accuracy against the dense model's on the same questions: ``error`` is its standard error."""

    task: str
    value: float
    error: float | None


@dataclass(frozen=True)
class ReportedModel:
    """A model: how it was pruned, if that is known, and what was measured of it."""

    label: str
    pruning: Pruning | None
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros among the prunable weights: what masks removed, or more, in a model that had zeros before."""
        measured = next((each.sparsity for each in self.evaluations if each.sparsity is not None), None)
        if self.pruning is None or (measured is not None and measured > self.pruning.zeros + CLOSE):
            return measured
        return self.pruning.zeros

    @property
    def dense(self) -> bool:
        return self.pruning is None and self.sparsity is not None and self.sparsity < CLOSE

    @property
    def base(self) -> str | None:
        """The dense model's name."""
        if self.pruning:
            return self.pruning.model.name
        if masked := next((each.model for each in self.evaluations if each.masks), None):
            return masked
        return next((each.against for each in self.evaluations if each.against), None)

    def is_against_dense(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation compares with the dense model, and not with another, pruned one say."""
        return evaluation.against is None or same_model(evaluation.against, self.base)

    def other(self, evaluation: Evaluation) -> str:
        """What an evaluation compares with, in a word."""
        return "dense" if self.is_against_dense(evaluation) else short(evaluation.against)

    @property
    def _against_dense(self) -> list[Evaluation]:
        return list(filter(self.is_against_dense, self.evaluations))

    @property
    def reading(self) -> Evaluation | None:
        """The evaluation that has the perplexity."""
        return next((each for each in self.evaluations if each.perplexity is not None), None)

    @property
    def closeness(self) -> Closeness | None:
        return next((each.closeness for each in self._against_dense if each.closeness), None)

    @property
    def changes(self) -> list[Change]:
        """Of ``acc``, task by task, where the dense model answered the same questions; a task in several evaluations once."""
        found, seen = [], set()
        for each in self._against_dense:
            for name, task in each.tasks.items():
                this = task.sha256 or name, task.num_fewshot
                if (other := task.against.get("acc")) and this not in seen:
                    seen.add(this)
                    value, error = task.acc - other.reference, paired_error(other.gained, other.lost, task.questions)
                    found.append(Change(task=short(name), value=value, error=error))
        return found

    @property
    def change(self) -> Change | None:
        """The mean over tasks; their errors are independent."""
        changes = self.changes
        if not changes:
            return None
        errors = [change.error for change in changes if change.error is not None]
        error = math.hypot(*errors) / len(changes) if len(errors) == len(changes) else None
        return Change(task="mean", value=sum(change.value for change in changes) / len(changes), error=error)


class Point(Facts):
    """A pruned model in a trade-off. ``front``: no other beats it (``unbeaten``). ``label``: of one evaluated by itself.

    kind: of its pattern, if that is known (``Structure``).
    """

    pattern: str
    scope: str | None
    kind: str | None
    sparsity: float
    perplexity: float
    bytes: int | None = None
    front: bool = False
    label: str | None = None

    @property
    def name(self) -> str:
        name = f"{self.pattern} by {self.scope}" if self.scope else self.pattern
        return name if self.label is None else f"{self.label}: {name}"

    @property
    def series(self) -> str:
        """What it is drawn with: a sweep's sparsities of one scope are a curve, everything else stands alone."""
        if self.label is not None:
            return EVALUATED
        if self.scope and self.kind in ("unstructured", None):
            return f"sparsities by {self.scope}"
        return self.kind or "patterns"


class Tradeoff(Facts):
    """Perplexities of several pruned models of one dense model, all measured alike."""

    model: str
    measure: str
    dense: float | None
    dense_bytes: int | None
    points: list[Point]

    @property
    def front(self) -> list[Point]:
        """The points that no other beats, the best perplexity first."""
        return sorted((point for point in self.points if point.front), key=lambda point: point.perplexity)

    @property
    def packed(self) -> bool:
        """Whether the packed size of every point is known."""
        return all(point.bytes is not None for point in self.points)


@dataclass(frozen=True)
class Summary:
    """All of a report but its looks. ``subjects``: pruned ones first, in the order of the sources."""

    subjects: list[ReportedModel]
    tradeoffs: list[Tradeoff]
    sweeps: list[Sweep]
    comparisons: list[Comparison] = field(default_factory=list)
    speeds: list[Speeds] = field(default_factory=list)
    packings: list[Packing] = field(default_factory=list)

    @property
    def pruned(self) -> list[ReportedModel]:
        return [subject for subject in self.subjects if not subject.dense]

    @property
    def title(self) -> str:
        bases = {short(subject.base) for subject in self.pruned if subject.base}
        base = next(iter(bases)) if len(bases) == 1 else None
        if len(self.pruned) == 1:
            (one,) = self.pruned
            return f"{base or one.label}, {percent(one.sparsity)} pruned" if one.sparsity else one.label
        if self.pruned:
            return f"{base}: {len(self.pruned)} pruned models" if base else f"{len(self.pruned)} models"
        if self.sweeps:
            return f"{short(self.sweeps[0].model)} at many sparsities"
        if self.subjects:
            return self.subjects[0].label
        if self.comparisons:
            return f"{short(self.comparisons[0].model)}: methods compared"
        return f"{short(self.speeds[0].model)}: speed on {self.speeds[0].device}" if self.speeds else "A packed model"

    def dense_perplexity(self, subject: ReportedModel) -> float | None:
        """The dense model's on the same text and windows, if one of the sources has it."""
        base, reading = subject.base, subject.reading
        if subject.dense or not base or not reading:
            return None
        if reading.closeness and reading.closeness.reference_perplexity and same_model(reading.against, base):
            return reading.closeness.reference_perplexity
        known = (
            perplexity
            for model, measured, perplexity in self._dense_readings()
            if same_model(model, base) and alike(measured, reading)
        )
        return next(known, None)

    def _dense_readings(self) -> Iterator[tuple[str, Measured, float]]:
        """Models, how they were measured, and the dense perplexity."""
        for subject in self.subjects:
            for each in subject.evaluations if subject.dense else ():
                if each.perplexity is not None:
                    yield each.model, each, each.perplexity
        for sweep in self.sweeps:
            if sweep.dense:
                yield sweep.model, sweep.protocol, sweep.dense.perplexity
        for table in self.comparisons:
            for row in table.rows:
                if row.method == METHOD_DENSE:
                    yield table.model, table.protocol, row.perplexity


def summarise(sources: Sequence[ResultFile]) -> Summary:
    """Sources, put together."""
    sweeps = [source.result for source in sources if isinstance(source.result, Sweep)]
    evaluations = [source.result for source in sources if isinstance(source.result, Evaluation)]
    found, left = list[tuple[str, Pruning | None, tuple[Evaluation, ...]]](), evaluations
    prunings = [(_place(source), source) for source in sources if isinstance(source.result, Pruning)]
    names = [place.name for place, _ in prunings]
    for place, source in prunings:
        assert isinstance(source.result, Pruning)
        mine = [each for each in left if _is_of(each, place.name, source, names)]
        left = [each for each in left if each not in mine]
        found.append((str(place), source.result, tuple(mine)))
    for name in dict.fromkeys(each.name for each in left):
        found.append((name, None, tuple(each for each in left if each.name == name)))
    labels = apart(name for name, *_ in found)
    subjects = [ReportedModel(labels[name], pruning, mine) for name, pruning, mine in found]
    subjects.sort(key=lambda subject: subject.dense)
    comparisons = [source.result for source in sources if isinstance(source.result, Comparison)]
    speeds = [source.result for source in sources if isinstance(source.result, Speeds)]
    packings = [source.result for source in sources if isinstance(source.result, Packing)]
    return Summary(subjects, list(_tradeoffs(subjects, sweeps)), sweeps, comparisons, speeds, packings)


def _place(source: ResultFile) -> PurePath:
    """Where an output folder is, or was: what it is called, and told from others of that name by."""
    if source.path.is_dir():
        return source.path.resolve()
    output = source.data.get("output")
    return PurePath("/", output) if isinstance(output, str) and output else source.path.resolve().with_suffix("")


def _is_of(evaluation: Evaluation, label: str, source: ResultFile, labels: Sequence[str]) -> bool:
    """Whether an evaluation is of this output folder: by path, by its name where no other has it; and the zeros must agree."""
    assert isinstance(source.result, Pruning)
    if evaluation.masks or not agree(evaluation, source.result):
        return False
    if source.path.is_dir() and abspath(evaluation.model) == abspath(source.path):
        return True
    return PurePath(evaluation.model).name == label and labels.count(label) == 1


def agree(evaluation: Evaluation, pruning: Pruning) -> bool:
    """Whether what was measured can be what was pruned so, by its masks and its zeros as far as they are known."""
    measured = evaluation.protocol.masks_sha256
    if measured and pruning.masks_sha256:  # a model that was pruned before has more zeros than these masks
        return measured == pruning.masks_sha256
    return evaluation.sparsity is None or abs(evaluation.sparsity - pruning.zeros) <= CLOSE


def _tradeoffs(subjects: Sequence[ReportedModel], sweeps: Sequence[Sweep]) -> Iterator[Tradeoff]:
    """Of each sweep, with the models that were evaluated as it was; and of evaluations that are alike."""
    left = [each for each in subjects if each.base and each.reading and each.sparsity is not None and not each.dense]
    for sweep in sweeps:
        mine = [each for each in left if alike(sweep.protocol, each.reading) and same_model(each.base, sweep.model)]
        left = [each for each in left if each not in mine]
        yield tradeoff_of(sweep, mine)
    while left:
        first = left[0]
        mine = [each for each in left if alike(each.reading, first.reading) and each.base == first.base]
        left = [each for each in left if each not in mine]
        if len(mine) > 1:
            dense = Summary(list(subjects), [], []).dense_perplexity(first)
            assert first.reading is not None
            yield Tradeoff(
                model=first.base or first.label,
                measure=measure(first.reading),
                dense=dense,
                dense_bytes=None,
                points=_front(list(map(_point, mine))),
            )


def tradeoff_of(sweep: Sweep, others: Iterable[ReportedModel] = ()) -> Tradeoff:
    """What a sweep shows. others: models that were evaluated as it was."""
    return Tradeoff(
        model=sweep.model,
        measure=measure(sweep.protocol),
        dense=sweep.dense.perplexity if sweep.dense else None,
        dense_bytes=sweep.dense.bytes if sweep.dense else None,
        points=_front([*map(_point_of_row, sweep.rows), *map(_point, others)]),
    )


def _point(subject: ReportedModel) -> Point:
    reading, sparsity = subject.reading, subject.sparsity
    assert reading is not None
    assert reading.perplexity is not None
    assert sparsity is not None
    pattern = subject.pruning.pattern if subject.pruning else percent(sparsity)
    return Point(pattern=pattern, scope=None, kind=None, sparsity=sparsity, perplexity=reading.perplexity, label=subject.label)


def _point_of_row(row: Row) -> Point:
    kind = row.structure.kind if row.structure else None
    return Point(
        pattern=row.pattern,
        scope=row.scope,
        kind=kind,
        sparsity=row.sparsity,
        perplexity=row.perplexity,
        bytes=row.bytes,
    )


def _front(points: list[Point]) -> list[Point]:
    """In order of sparsity, those marked that no other beats."""
    found = sorted(points, key=lambda point: (point.sparsity, point.pattern))
    return [point.model_copy(update={"front": best}) for point, best in zip(found, unbeaten(found), strict=True)]


# ----------------------------------------------------------------------------------------------------------- measures


def same_model(one: str | None, other: str | None) -> bool:
    """Whether two names are of one model: hub names, or paths, of which a relative one may be from another working folder.

    The last folder's name does not tell: ``a/model`` is not ``b/model``.
    """
    if not one or not other:
        return False
    paths = [PurePath(normpath(path_of(name))) for name in (one, other)]
    if all(path.is_absolute() for path in paths):
        return paths[0] == paths[1]
    if abspath(paths[0]) == abspath(paths[1]):
        return True
    ends = [tuple(part for part in path.parts if part != "..")[::-1] for path in paths]
    return all(ends) and all(a == b for a, b in zip(*ends, strict=False)) and paths[0].is_absolute() != paths[1].is_absolute()


def alike(one: Measured | None, other: Measured | None) -> bool:
    """Whether two perplexities were measured on the same windows of the same text."""
    return one is not None and other is not None and None not in _key(one) and _key(one) == _key(other)


def _key(facts: Measured) -> tuple[str | None, int | None, int | None, int | None]:
    text = facts.text
    return (text.sha256 or text.text) if text else None, facts.windows, facts.length, facts.stride or facts.length


def measure(facts: Measured) -> str:
    """The text and the windows of a perplexity, in words."""
    name = short(facts.text.text) if facts.text else "an unnamed text"
    return f"{name}, {samples(facts)}" if facts.windows and facts.length else name
