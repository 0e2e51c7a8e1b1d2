"""What results say in one sentence, in a few large figures, and in sentences.

The verdict is for those who read no further: what was pruned, what it costs, what it saves, whether anything is faster; of
clauses, each of which says so where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from uniprune.common.formatting import NOTE, count, number, percent, points, short, size
from uniprune.comparison.results import DENSE, UNIFORM, Comparison
from uniprune.reporting.summary import ReportedModel, Summary, Tradeoff, alike, measure, same_model
from uniprune.runtime.layout import Provenance
from uniprune.sparsity.structure import Structure
from uniprune.speed.kernels import ANY_MASK
from uniprune.speed.results import MARGIN

ALIKE = 0.02  # of the prunable weights: of one pattern, about the same archive
NEAR = 1.1  # times the dense perplexity, that is hardly worse
FEW = 3  # sparsities, or tables, that are named one by one


@dataclass(frozen=True)
class Figure:
    """A large figure: what it is, the value, and what is to be known of it."""

    label: str
    value: str
    detail: str


def sentences(summary: Summary) -> list[str]:
    """The findings in words: much of one pruned model, little of several, of which a table says more."""
    pruned = summary.pruned
    said: list[str] = []
    if len(pruned) == 1:
        said += _about(summary, pruned[0])
    elif pruned:
        sparsities = [subject.sparsity for subject in pruned if subject.sparsity is not None]
        ends = list(dict.fromkeys(percent(end(sparsities)) for end in (min, max))) if sparsities else []
        between = f", {' to '.join(ends)} of their prunable weights zero" if ends else ""
        said.append(f"{len(pruned)} pruned models{between}: {', '.join(subject.label for subject in pruned)}.")
    for tradeoff in summary.tradeoffs:
        said += traded(tradeoff)
    return [*said, NOTE]


def traded(tradeoff: Tradeoff) -> Iterator[str]:
    """What patterns there are, and the sparsest that costs next to nothing."""
    sparsities = [point.sparsity for point in tradeoff.points]
    if any(point.label is None for point in tradeoff.points):
        yield (
            f"{len(sparsities)} patterns of {short(tradeoff.model)} between {percent(min(sparsities))} and "
            f"{percent(max(sparsities))} sparsity, measured on {tradeoff.measure}."
        )
    dense = tradeoff.dense
    near = [point for point in tradeoff.points if dense is not None and point.perplexity <= NEAR * dense]
    if near:
        best = max(near, key=lambda point: (point.sparsity, -point.perplexity))
        yield (
            f"The sparsest whose perplexity is within {NEAR - 1:.0%} of the dense {number(dense)} is {best.name}: "
            f"{number(best.perplexity)} at {percent(best.sparsity)}."
        )


def figures(summary: Summary) -> list[Figure]:
    """The few figures that matter of one pruned model; of several, a table says more."""
    if len(summary.pruned) != 1:
        return []
    (subject,) = summary.pruned
    shown = []
    if subject.sparsity is not None:
        pruning = subject.pruning
        weights = (pruning.prunable or pruning.weights) if pruning else 0
        detail = f"of {count(weights)} prunable weights: {pruning.pattern_words}" if pruning else ""
        shown.append(Figure("Sparsity", percent(subject.sparsity), detail or "of the prunable weights are zero"))
    if reading := subject.reading:
        dense = summary.dense_perplexity(subject)
        value = number(reading.perplexity)
        detail = measure(reading) + ("" if dense is None else "; dense \N{RIGHTWARDS ARROW} pruned, lower is better")
        shown.append(Figure("Perplexity", value if dense is None else f"{number(dense)} \N{RIGHTWARDS ARROW} {value}", detail))
    if change := subject.change:
        tasks = len(subject.changes)
        of = f"the mean of {tasks} tasks" if tasks > 1 else subject.changes[0].task
        shown.append(Figure("Accuracy", points(change.value, change.error), f"points against the dense model, {of}"))
    if near := subject.closeness:
        detail = f"nats per token from the dense model; the same likeliest token at {percent(near.agreement)} of positions"
        shown.append(Figure("KL divergence", number(near.kl), detail))
    return shown


def _about(summary: Summary, subject: ReportedModel) -> Iterator[str]:
    if pruning := subject.pruning:
        every = "prunable weights" if pruning.prunable in (None, pruning.weights) else "weights that were chosen"
        yield (
            f"{percent(pruning.sparsity)} of the {count(pruning.weights)} {every}, in {len(pruning.matrices)} matrices, were "
            f"set to zero: {pruning.pattern_words}."
        )
        if subject.sparsity != pruning.zeros:
            yield f"With those that were zero before, {percent(subject.sparsity)} of the prunable weights are zero."
    elif subject.sparsity is not None:
        yield f"{percent(subject.sparsity)} of the prunable weights are zero."
    if reading := subject.reading:
        assert reading.perplexity is not None
        dense = summary.dense_perplexity(subject)
        where = measure(reading)
        if dense is None:
            yield f"Perplexity is {number(reading.perplexity)} on {where}."
        else:
            yield f"Perplexity goes from {number(dense)} dense to {number(reading.perplexity)} pruned, on {where}."
    if change := subject.change:
        tasks = len(subject.changes)
        beyond = change.error is not None and abs(change.value) > 2 * change.error
        verdict = "more" if beyond else "no more"
        error = "" if change.error is None else f"; that is {verdict} than twice its standard error"
        yield (
            f"Accuracy, {f'the mean of {tasks} tasks' if tasks > 1 else subject.changes[0].task}, changes by "
            f"{points(change.value, change.error)} points against the dense model{error}."
        )
    if near := subject.closeness:
        yield (
            f"Next-token distributions are {number(near.kl)} nats per token (KL) from the dense model's; both find the same "
            f"token likeliest at {percent(near.agreement)} of positions."
        )


def verdict(summary: Summary) -> str | None:
    """The sentence; None where nothing of it is known."""
    if summary.comparisons and len(summary.pruned) != 1:
        tables = summary.comparisons[:FEW]
        forms = [row.structure for table in tables for row in table.rows if row.structure]
        models = [table.model for table in tables]
        clauses = [*map(_compared, tables), _bytes(summary, models[0], forms), _speed(summary, models, forms)]
    elif len(summary.pruned) == 1:
        (subject,) = summary.pruned
        forms = [subject.pruning.structure] if subject.pruning and subject.pruning.structure else []
        names = [name for name in (subject.base, subject.label) if name]
        saved = _bytes(summary, subject.base or subject.label, forms, subject)
        clauses = [_pruned(summary, subject), saved, _speed(summary, names, forms)]
    elif summary.tradeoffs:
        clauses = [_ends(summary.tradeoffs[0])]
    else:
        clauses = []
    said = [clause for clause in clauses if clause]
    return f"{'; '.join(said)}." if said else None


# ------------------------------------------------------------------------------------------------- the verdict: quality


def _pruned(summary: Summary, subject: ReportedModel) -> str:
    """What is left of one model's quality, beside the dense model's and the best baseline's."""
    what = short(subject.base) or subject.label
    if subject.sparsity is not None:
        words = f" ({subject.pruning.pattern_words})" if subject.pruning else ""
        what += f" without {percent(subject.sparsity)} of its prunable weights{words}"
    said = []
    if reading := subject.reading:
        assert reading.perplexity is not None
        cost = f"has perplexity {number(reading.perplexity)}"
        if dense := summary.dense_perplexity(subject):
            cost += f", {number(reading.perplexity / dense)} times the dense model's {number(dense)},"
        if baseline := _baseline(summary, subject):
            cost += f" where the best baseline, {baseline[0]}, has {number(baseline[1])},"
        said.append(f"{cost} on {measure(reading)}")
    if change := subject.change:
        said.append(f"{points(change.value, change.error)} points of accuracy on tasks against it")
    return f"{what} {' and '.join(said)}" if said else f"{what}: its quality was not measured"


def _baseline(summary: Summary, subject: ReportedModel) -> tuple[str, float] | None:
    """Method and perplexity of the best row without a controller, at the same sparsity, measured alike; whose a file is, is not
    known.
    """
    pruning = subject.pruning
    groups = bool(pruning and pruning.structure and pruning.structure.nm)
    rows = [
        (table.labels[row.method], row.perplexity)
        for table in summary.comparisons
        if same_model(table.model, subject.base) and alike(table.protocol, subject.reading)
        for row in table.rows
        if row.pattern
        and row.controller is None
        and row.file_sha256 is None
        and bool(row.structure and row.structure.nm) == groups
        if subject.sparsity is not None and abs(row.sparsity - subject.sparsity) < UNIFORM
    ]
    return min(rows, key=lambda row: row[1], default=None)


def _compared(table: Comparison) -> str:
    """Which method is best at each sparsity, beside the dense model and the next best."""
    methods = dict.fromkeys(row.method for row in table.rows if row.method != DENSE)
    dense = next((row.perplexity for row in table.rows if row.method == DENSE), None)
    patterns = list(dict.fromkeys(row.pattern for row in table.rows if row.pattern))
    best = [_best(table, pattern, dense) for pattern in patterns[:FEW]]
    more = f", and {len(patterns) - FEW} more sparsities" if len(patterns) > FEW else ""
    by = f"{len(methods)} methods" if len(methods) > 1 else next(iter(methods), "nothing yet")
    return f"{short(table.model)} pruned by {by}, perplexity on {measure(table.protocol)}: {', '.join(best)}{more}"


def _best(table: Comparison, pattern: str, dense: float | None) -> str:
    rows = [row for row in table.rows if row.pattern == pattern]
    labels = table.labels
    first, *others = sorted(rows, key=lambda row: row.perplexity)
    said = []
    if dense:
        said.append(f"{number(first.perplexity / dense)} times the dense {number(dense)}")
    if others:
        said.append(f"next best {labels[others[0].method]} {number(others[0].perplexity)}")
    remarks = f" ({'; '.join(said)})" if said else ""
    return f"at {pattern} {labels[first.method]} has {number(first.perplexity)}{remarks}"


def _ends(facts: Tradeoff) -> str:
    points = facts.front or facts.points
    first, last = points[0], points[-1]
    dense = f", dense {number(facts.dense)}" if facts.dense else ""
    ends = f"goes from {number(first.perplexity)} at {first.name} to {number(last.perplexity)} at {last.name}"
    if first is last:
        ends = f"is {number(first.perplexity)} at {first.name}" + (", which no other beats" if len(facts.points) > 1 else "")
    ways = f"{len(facts.points)} ways" if len(facts.points) > 1 else "one way"
    return f"{short(facts.model)} pruned in {ways}: perplexity on {facts.measure} {ends}{dense}"


# ----------------------------------------------------------------------------------------- the verdict: bytes and speed


def _bytes(summary: Summary, model: str, forms: Iterable[Structure], subject: ReportedModel | None = None) -> str:
    """What pruning saves where it is known: of a folder that was packed to run, of archives that a sweep estimated.

    model: the dense one; subject: the pruned one, if there is but one.
    """
    masks = subject.pruning.masks_sha256 if subject and subject.pruning else None
    zeros = subject.sparsity if subject else None
    packings = [packing for packing in summary.packings if _may_be_of(packing.source, model, masks)]
    if len(packings) == 1:
        (packed,) = packings
        return f"packed to run it takes {size(packed.bytes)}, {percent(packed.ratio)} of the checkpoint"
    wanted = {form.spelling for form in forms}
    for facts in summary.tradeoffs:
        known = [
            point
            for point in facts.points
            if point.bytes and point.name in wanted and (zeros is None or abs(point.sparsity - zeros) < ALIKE)
        ]
        if known and facts.dense_bytes and same_model(facts.model, model):
            sizes = " or ".join(f"{size(point.bytes)} ({point.name})" for point in known)
            return f"its archive takes {sizes}, not {size(facts.dense_bytes)}"
    return "its files are as large as the dense model's until they are packed"


def _may_be_of(packed: Provenance, model: str, masks: str | None) -> bool:
    """Whether what was packed is a model pruned by these masks, as far as both sides say."""
    if packed.masks_sha256 and masks:
        return packed.masks_sha256 == masks
    return packed.model is None or same_model(packed.model.name, model)


def _speed(summary: Summary, models: Sequence[str], forms: Iterable[Structure]) -> str:
    """Whether the products of masks of these kinds are faster on the machine that ``bench`` ran on."""
    measured = (each for each in summary.speeds if any(same_model(each.model, model) for model in models))
    speeds = next(measured, None)
    if speeds is None:
        said = [subject.pruning.speed for subject in summary.pruned if subject.pruning and subject.pruning.speed]
        return said[0][0].lower() + said[0][1:].rstrip(".") if len(said) == 1 else "whether it is faster was not measured"
    faster = []
    for kind, sparsity in dict.fromkeys((_kind(form), form.sparsity) for form in forms):
        best = speeds.fastest([ANY_MASK, kind], sparsity)
        if best and best.low >= 1 + MARGIN:
            faster.append(
                f"{kind or ANY_MASK} {best.speedup:.2f} times as fast ({best.kernel}, {best.dtype}, batch {best.batch})"
            )
    place = f"on {speeds.place},"
    if faster:
        return f"{place} matrix products can be faster: {', '.join(faster)}"
    return f"{place} nothing is faster"


def _kind(form: Structure) -> str | None:
    """As ``bench`` names masks."""
    return {"N:M": form.spelling, "unstructured": "unstructured", "tiles": f"{form.height}x{form.width} tiles"}.get(form.kind)
