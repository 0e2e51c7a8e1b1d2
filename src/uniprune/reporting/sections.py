"""The parts of a report's page: what each shows of the results, and only those for which there are any."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from uniprune.artefacts.reports import Pruning, by_place
from uniprune.common.formatting import apart, number, percent, short
from uniprune.common.significance import standard_error
from uniprune.comparison.results import UNIFORM
from uniprune.evaluation.results import Generation
from uniprune.reporting import capabilities as report_capabilities
from uniprune.reporting import comparison
from uniprune.reporting import tables as report_tables
from uniprune.reporting.headline import traded
from uniprune.reporting.plots import Marker, Plot, accuracies, curves, descent, flips, heatmap, methods, tradeoff
from uniprune.reporting.results import ResultFile
from uniprune.reporting.summary import ReportedModel, Summary
from uniprune.reporting.tables import Grid
from uniprune.saliency.record import ControllerRecord

MAPS = 3  # heat maps of a table's rows
DRAWN = 5  # models in one plot of accuracies; the table has all
METRIC = "acc"
WIDE = 6  # columns


@dataclass(frozen=True)
class Dialogue:
    """A prompt and how two models go on: ``same`` is what both begin with, then each with its own."""

    prompt: str
    same: str
    model: str
    against: str
    says: str
    other: str


@dataclass(frozen=True)
class Panel:
    """Plots and a table of one model, say, beside each other. ``folded``: tables that are shown on demand.

    table_first: tables before the paragraphs, which are notes to them.
    """

    title: str = ""
    paragraphs: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    folded: list[Grid] = field(default_factory=list)
    dialogues: list[Dialogue] = field(default_factory=list)
    table_first: bool = False

    @property
    def side_by_side(self) -> bool:
        """Whether the table is narrow enough to stand beside the plot."""
        return len(self.plots) == 1 and all(len(grid.columns) < WIDE for grid in self.grids)


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    parts: list[Panel]


def sections(sources: Sequence[ResultFile], summary: Summary) -> list[Section]:
    """Those that have something to show, in the order of the page."""
    models = report_tables.models(summary.subjects)
    every = [
        Section("models", "The models", [Panel(grids=[models])] if models else []),
        Section("comparison", "Methods compared", list(_comparisons(summary))),
        Section("tradeoff", "Perplexity against sparsity", list(_tradeoffs(summary))),
        Section("sparsity", "Where the zeros are", [*_zeros(summary), *_zeros_of_rows(summary)]),
        Section("controller", "The controller's descent", list(_descents(summary))),
        Section("texts", "Perplexity by text", list(_texts(summary))),
        Section("perplexity", "Perplexity in other units", list(_readings(summary))),
        Section("zero-shot", "Accuracy on tasks", list(_accuracies(summary))),
        Section("closeness", "Closeness to the dense model", list(_closeness(summary))),
        Section("generations", "Generations side by side", list(_generations(summary))),
        Section("speed", "Speed of sparse products", list(_speeds(summary))),
        Section("protocol", "Protocol", [Panel(folded=[report_tables.protocol(source) for source in sources])]),
    ]
    return [section for section in every if section.parts]


def _comparisons(summary: Summary) -> Iterator[Panel]:
    for index, table in enumerate(summary.comparisons):
        drawn = methods(f"methods-{index}", table), curves(f"curves-{index}", table)
        plots = [plot for plot in drawn if plot]
        yield Panel(grids=[comparison.grid(table)], paragraphs=comparison.notes(table), plots=plots, table_first=True)
    if grids := comparison.sources(summary.comparisons):
        says = "What pruning is calibrated on decides what it keeps: the text of the calibration beside that of the evaluation."
        yield Panel("Calibration and evaluation text", [says], grids=grids)


def _tradeoffs(summary: Summary) -> Iterator[Panel]:
    for index, facts in enumerate(summary.tradeoffs):
        drawn = (tradeoff(f"tradeoff-{index}-{by}", facts, by) for by in ("sparsity", "bytes"))
        grid = report_tables.tradeoff(facts)
        yield Panel(
            title=short(facts.model) if len(summary.tradeoffs) > 1 else "",
            paragraphs=[f"Measured on {facts.measure}. The scale is logarithmic; lower is better.", *traded(facts)],
            plots=[plot for plot in drawn if plot],
            grids=[grid],
        )


def _zeros(summary: Summary) -> Iterator[Panel]:
    for index, (subject, pruning) in enumerate(_prunings(summary)):
        sparsities = [matrix.sparsity for matrix in pruning.matrices.values()]
        title = _title(summary, subject)
        folded = [report_tables.matrices(pruning)]
        pattern = pruning.pattern_words
        if max(sparsities) - min(sparsities) < UNIFORM:
            says = f"Each of the {len(sparsities)} matrices has sparsity {percent(pruning.sparsity)}: {pattern}."
            yield Panel(title, [says], folded=folded)
        else:
            says = f"The matrices have between {percent(min(sparsities))} and {percent(max(sparsities))}: {pattern}."
            plot = heatmap(f"sparsity-{index}", pruning.grid)
            yield Panel(title, [says], [plot], [report_tables.kinds(pruning.grid)], folded)


def _zeros_of_rows(summary: Summary) -> Iterator[Panel]:
    """Of the best rows of tables, sparsity by sparsity, whose matrices differ."""
    for index, table in enumerate(summary.comparisons):
        best = [row for at, row in enumerate(comparison.ordered(table)) if at in comparison.best(table) and row.matrices]
        for order, row in enumerate(best[:MAPS]):
            grid = by_place({name: (sparsity, 1) for name, sparsity in row.matrices.items()})
            plot = heatmap(f"sparsity-of-{index}-{order}", grid)
            yield Panel(f"{table.labels[row.method]} at {row.pattern}", plots=[plot], grids=[report_tables.kinds(grid)])


def _descents(summary: Summary) -> Iterator[Panel]:
    for index, (subject, pruning) in enumerate(_prunings(summary)):
        record = pruning.controller
        if record and record.loss:
            drawn = descent(f"descent-{index}", record), flips(f"flips-{index}", record)
            yield Panel(_title(summary, subject), [_told(record)], [plot for plot in drawn if plot])


def _readings(summary: Summary) -> Iterator[Panel]:
    grid = report_tables.readings(summary.subjects)
    grids = [each for each in (grid, *map(comparison.readings, summary.comparisons)) if each and _more(each)]
    if grids:
        says = "Per token compares models with one tokenizer, per word and per byte all models."
        yield Panel(paragraphs=[says], grids=grids)


def _texts(summary: Summary) -> Iterator[Panel]:
    grids = [report_tables.texts(summary.subjects), *map(report_tables.sweep_texts, summary.sweeps)]
    if shown := [grid for grid in grids if grid]:
        yield Panel(paragraphs=["What pruning keeps depends on the text: each was read by itself."], grids=shown)


def _more(grid: Grid) -> bool:
    """Whether perplexities are there that other tables do not have."""
    return any(name.startswith(("per word", "per byte", "after", "published")) for name, _ in grid.heads)


def _told(record: ControllerRecord) -> str:
    steps = len(record.loss)
    text = f"{steps} steps on {record.tokens:,} tokens"
    if record.steps is not None and steps < record.steps:
        text += f", of {record.steps} that were planned: it had stopped improving"
    if record.targets:
        text += f"; aimed at {', '.join(dict.fromkeys(record.targets))}"
    if not record.held_out_loss or record.best_held_out_loss is None:
        return f"{text}."
    start, best = record.held_out_loss[0], record.best_held_out_loss
    text += f". On held-out samples, {record.objective} is {number(start)} {record.unit} at the start"
    text += f", and {number(best)} at best" if best < start else ", which no later masks improve on"
    return f"{text}. The best masks on those samples are the result."


def _accuracies(summary: Summary) -> Iterator[Panel]:
    grid = report_tables.accuracies(summary.subjects)
    harness = report_tables.harness(summary.subjects)
    if grid:
        plot = accuracies("accuracies", _markers(summary))
        says = f"Bars are standard errors of {METRIC}, of the questions as a sample."
        folded = [parts for parts in (report_capabilities.parts(summary.subjects, every=True),) if parts]
        grids = [report_capabilities.capabilities(summary.subjects), grid, report_capabilities.parts(summary.subjects)]
        yield Panel("", [says] if plot else [], [plot] if plot else [], [shown for shown in grids if shown], folded)
    if harness:
        yield Panel(grids=[harness])
    for table in summary.comparisons:
        if flipped := comparison.flips(table):
            says = (
                "McNemar's test counts only the answers that one of two models has right; of many, one is below 0.05 by chance."
            )
            yield Panel(paragraphs=[says], grids=[flipped])


def _markers(summary: Summary) -> list[Marker]:
    """Accuracies by model; each that others are compared with counts as one."""
    labels = list(dict.fromkeys(subject.label for subject, _, _ in report_tables.asked(summary.subjects)))[:DRAWN]
    names = apart(name for _, name, _ in report_tables.asked(summary.subjects))
    others = apart(each.against for subject in summary.subjects for each in subject.evaluations if each.tasks and each.against)
    markers = []
    dense = list[Marker]()
    for subject in summary.subjects:
        for each in subject.evaluations:
            series = subject.other(each)
            if subject.is_against_dense(each) and len(others) > 1:
                series = f"dense {others.get(each.against or '', '')}"
            for name, task in each.tasks.items():
                if subject.label in labels:
                    markers.append(Marker(names[name], subject.label, task.acc, task.acc_stderr))
                if other := task.against.get(METRIC):
                    right = round(other.reference * task.questions)
                    error = standard_error([index < right for index in range(task.questions)])
                    dense.append(Marker(names[name], series, other.reference, error))
    return [*dict.fromkeys([*dense, *markers])]  # a task may stand in several evaluations


def _closeness(summary: Summary) -> Iterator[Panel]:
    if grid := report_tables.closeness(summary.subjects):
        says = (
            "KL is the mean over positions of the divergence of the model's next-token distribution from the other's, 0 if "
            "they are the same."
        )
        yield Panel("", [says], grids=[grid])


def _generations(summary: Summary) -> Iterator[Panel]:
    for subject in summary.subjects:
        dialogues = [
            dialogue(each, subject.other(evaluation)) for evaluation in subject.evaluations for each in evaluation.generations
        ]
        if dialogues:
            says = "Greedy continuations of the same prompts. What only one of the models says is marked."
            yield Panel(_title(summary, subject), [says], dialogues=dialogues)
    for table in summary.comparisons:
        if grids := comparison.written(table):
            yield Panel(paragraphs=["Greedy continuations of the same prompts."], grids=grids)


def _speeds(summary: Summary) -> Iterator[Panel]:
    for speeds in summary.speeds:
        title = f"{short(speeds.model)} on {speeds.place}"
        yield Panel(title, [*speeds.verdicts, *speeds.notes], grids=[report_tables.speeds(speeds)])


def dialogue(facts: Generation, other: str = "dense") -> Dialogue:
    """Two continuations, cut where the first word differs. other: whose the second one is."""
    sides = [facts.model, facts.against]
    if all(side.startswith(" ") for side in sides):
        sides = [side[1:] for side in sides]
    same = "".join(letter for letter, other in takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False)))
    if any(re.match(r"\w", side[len(same) :]) for side in sides):  # not within a word
        same = re.sub(r"\w+$", "", same)
    if facts.model == facts.against:
        says = "Both say the same."
    elif facts.same_tokens is not None:
        of = f" of {facts.tokens}" if facts.tokens is not None else ""
        says = (
            f"The first {facts.same_tokens}{of} tokens are the same."
            if facts.same_tokens
            else "They differ from the first token."
        )
    else:
        says = ""
    model, against = (side[len(same) :] for side in sides)
    return Dialogue(facts.prompt, same, model, against, says, other)


def _prunings(summary: Summary) -> list[tuple[ReportedModel, Pruning]]:
    return [(subject, subject.pruning) for subject in summary.subjects if subject.pruning]


def _title(summary: Summary, subject: ReportedModel) -> str:
    """Whose part it is, where there are several models."""
    return subject.label if len(summary.pruned) > 1 else ""
