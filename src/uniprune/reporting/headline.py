"""What results say in a few large figures and in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from uniprune.common.formatting import NOTE, count, number, percent, points, short
from uniprune.reporting import comparison
from uniprune.reporting.summary import Subject, Summary, Tradeoff, measure

NEAR = 1.1  # times the dense perplexity, that is hardly worse


@dataclass(frozen=True)
class Figure:
    """A large figure: what it is, the value, and what is to be known of it."""

    label: str
    value: str
    detail: str


def sentences(summary: Summary) -> list[str]:
    """The findings in words: much of one pruned model, little of several, of which a table says more."""
    pruned = summary.pruned
    found: list[str] = []
    if len(pruned) == 1:
        found += _about(summary, pruned[0])
    elif pruned:
        sparsities = [subject.sparsity for subject in pruned if subject.sparsity is not None]
        between = (
            f", {percent(min(sparsities))} to {percent(max(sparsities))} of their prunable weights zero" if sparsities else ""
        )
        found.append(f"{len(pruned)} pruned models{between}: {', '.join(subject.label for subject in pruned)}.")
    for tradeoff in summary.tradeoffs:
        found += _traded(tradeoff)
    found += [comparison.verdict(each) for each in summary.comparisons]
    return [*found, NOTE]


def _traded(tradeoff: Tradeoff) -> Iterator[str]:
    sparsities = [point.sparsity for point in tradeoff.points]
    if any(point.label is None for point in tradeoff.points):
        yield (
            f"{len(sparsities)} patterns of {short(tradeoff.model)} between {percent(min(sparsities))} and "
            f"{percent(max(sparsities))} sparsity, measured on {tradeoff.measure}."
        )
    dense = tradeoff.dense
    near = [point for point in tradeoff.points if dense is not None and point.perplexity <= NEAR * dense]
    if near:
        best = max(near, key=lambda point: point.sparsity)
        yield (
            f"The sparsest whose perplexity is within {NEAR - 1:.0%} of the dense {number(dense)} is {best.name}: "
            f"{number(best.perplexity)} at {percent(best.sparsity)}."
        )


def figures(summary: Summary) -> list[Figure]:
    """The few figures that matter of one pruned model; of several, a table says more."""
    if len(summary.pruned) != 1:
        return []
    (subject,) = summary.pruned
    found = []
    if subject.sparsity is not None:
        pruning = subject.pruning
        detail = f"of {count(pruning.weights)} prunable weights: {pruning.pattern_words}" if pruning else ""
        found.append(Figure("Sparsity", percent(subject.sparsity), detail or "of the prunable weights are zero"))
    if reading := subject.reading:
        dense = summary.dense_perplexity(subject)
        value = number(reading.perplexity)
        detail = measure(reading) + ("" if dense is None else "; dense \N{RIGHTWARDS ARROW} pruned, lower is better")
        found.append(Figure("Perplexity", value if dense is None else f"{number(dense)} \N{RIGHTWARDS ARROW} {value}", detail))
    if change := subject.change:
        tasks = len(subject.changes)
        of = f"the mean of {tasks} tasks" if tasks > 1 else subject.changes[0].task
        found.append(Figure("Accuracy", points(change.value, change.error), f"points against the dense model, {of}"))
    if near := subject.closeness:
        detail = f"nats per token from the dense model; the same likeliest token at {percent(near.agreement)} of positions"
        found.append(Figure("KL divergence", number(near.kl), detail))
    return found


def _about(summary: Summary, subject: Subject) -> Iterator[str]:
    if pruning := subject.pruning:
        yield (
            f"{percent(pruning.sparsity)} of the {count(pruning.weights)} prunable weights, in {len(pruning.matrices)} "
            f"matrices, are zero: {pruning.pattern_words}."
        )
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
            f"Zero-shot accuracy, {f'the mean of {tasks} tasks' if tasks > 1 else subject.changes[0].task}, changes by "
            f"{points(change.value, change.error)} points against the dense model{error}."
        )
    if near := subject.closeness:
        yield (
            f"Next-token distributions are {number(near.kl)} nats per token (KL) from the dense model's; both find the same "
            f"token likeliest at {percent(near.agreement)} of positions."
        )
