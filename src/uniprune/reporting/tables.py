"""The tables of a report, as rows of text: the page and the terminal show the same ones."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uniprune.artefacts.reports import Pruning
from uniprune.common.formatting import NONE, apart, count, number, percent, points, short, size
from uniprune.evaluation.results import Compared, Row, Sweep, TaskResult
from uniprune.reporting.results import ResultFile
from uniprune.reporting.summary import ReportedModel, Tradeoff, measure
from uniprune.speed.results import Speeds
from uniprune.speed.timing import Result

Cell = str | tuple[str, float]
"""Text, or text and the number that it is sorted by."""

METRICS = ("acc", "acc_norm", "perplexity")
LOSSES = {"nats", "nats_stderr", "tokens"}
RESULTS = {"matrices", "controller", "tasks", "lm_eval", "closeness", "generations", "rows", "dense", "by_text"}
RESULTS |= {"perplexity", "word_perplexity", "byte_perplexity", "by_position", "capabilities", "sparsity"}
RESULTS |= {"lm_eval_reference", "lm_eval_against"}
IGNORED = LOSSES | RESULTS | {"kind", "format", "structure"}  # no settings
LONGEST = 4  # values of a list that are shown one by one


@dataclass(frozen=True)
class Grid:
    """A table. ``columns``: names, those of text with a trailing colon; the first column heads its row.

    prose: its text wraps. best: cells (row, column) that stand out.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    sortable: bool = False
    prose: bool = False
    best: frozenset[tuple[int, int]] = frozenset()

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Each column's name, and whether it holds numbers."""
        return [(column.removesuffix(":"), not column.endswith(":")) for column in self.columns]


def as_csv(grid: Grid) -> str:
    """A table as CSV (RFC 4180), its numbers as they were measured. A spreadsheet takes no text in it for a formula."""
    lines: list[list[Cell]] = [[name for name, _ in grid.heads], *grid.rows]
    file = io.StringIO(newline="")
    csv.writer(file).writerows(map(_saved, line) for line in lines)
    return file.getvalue()


def as_markdown(grid: Grid) -> str:
    """A table of GitHub's Markdown."""
    heads = [name for name, _ in grid.heads]
    rule = ["---:" if numeric else "---" for _, numeric in grid.heads]
    rows = [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in grid.rows]
    lines = [[plain(cell) for cell in row] for row in (heads, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def plain(text: str) -> str:
    """Text of others in one line, that is no markup of Markdown's."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return re.sub(r"([\\`*_\[\]<>|#~$&!])", r"\\\1", line)


def _saved(cell: Cell) -> str | float:
    if not isinstance(cell, str):
        return cell[1]
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def models(subjects: Sequence[ReportedModel]) -> Grid | None:
    """One row for each model; None where there is but one."""
    if len(subjects) < 2:
        return None
    rows: list[list[Cell]] = []
    for subject in subjects:
        near, change, reading = subject.closeness, subject.change, subject.reading
        pattern = subject.pruning.pattern if subject.pruning else "dense" if subject.dense else NONE
        rows.append(
            [
                subject.label,
                pattern,
                percent(None) if subject.sparsity is None else fraction(subject.sparsity),
                shown(reading.perplexity) if reading else NONE,
                measure(reading) if reading else NONE,
                shown(near.kl) if near else NONE,
                (points(change.value, change.error), 100 * change.value) if change else NONE,
            ]
        )
    columns = ["model:", "pattern:", "sparsity", "perplexity", "measured on:", "KL", "accuracy, points"]
    return without_empty(Grid("Perplexity, divergence from the dense model, and change of accuracy", columns, rows))


def readings(subjects: Sequence[ReportedModel]) -> Grid | None:
    """The perplexities of each evaluation per token, word and byte, by position, and what they compare with."""
    found = [(subject, each) for subject in subjects for each in subject.evaluations if each.perplexity is not None]
    positions = list(dict.fromkeys(place for _, each in found for place in each.by_position or ()))
    rows: list[list[Cell]] = []
    for subject, each in found:
        error = None if each.nats_stderr is None or each.perplexity is None else each.perplexity * each.nats_stderr
        values: list[float | None] = [each.perplexity, error, each.word_perplexity, each.byte_perplexity]
        values += [(each.by_position or {}).get(place) for place in positions]
        like = "; ".join(one.protocol for one in each.comparable)
        rows.append([subject.label, measure(each), *map(shown, values), like])
    places = [f"after {place} tokens" for place in positions]
    columns = ["model:", "text:", "per token", "±", "per word", "per byte", *places, "published protocol:"]
    caption = "Perplexity per token, word and byte, and by position in the sample"
    return without_empty(Grid(caption, columns, rows, sortable=True)) if rows else None


def texts(subjects: Sequence[ReportedModel]) -> Grid | None:
    """The perplexity of each model on each of several texts, the reference's, and the divergence between them."""
    rows: list[list[Cell]] = []
    for subject in subjects:
        for each in subject.evaluations:
            near = (each.closeness.by_text if each.closeness else None) or {}
            for name, found in (each.by_text or {}).items():
                error = None if found.nats_stderr is None else found.perplexity * found.nats_stderr
                other = near.get(name)
                reference = [shown(other.reference_perplexity), shown(other.kl)] if other else [NONE, NONE]
                rows.append([subject.label, short(name), shown(found.perplexity), shown(error), *reference])
    columns = ["model:", "text:", "perplexity", "±", "other's", "KL"]
    compared = any(each.closeness and each.closeness.by_text for subject in subjects for each in subject.evaluations)
    caption = "Perplexity by text" + (", and KL from the model evaluated against" if compared else "")
    return without_empty(Grid(caption, columns, rows, sortable=True)) if rows else None


def sweep_texts(sweep: Sweep) -> Grid | None:
    """The perplexity of each pattern on each of several texts, and its divergence from the dense model there."""
    measured = [("dense", sweep.dense), *((_named(row), row) for row in sweep.rows)]
    found = [(name, costs.by_text) for name, costs in measured if costs and costs.by_text]
    texts = list(dict.fromkeys(text for _, by_text in found for text in by_text))
    rows: list[list[Cell]] = []
    for name, by_text in found:
        known = [by_text.get(text) for text in texts]
        rows.append(
            [name, *(cell for one in known for cell in ((shown(one.perplexity), shown(one.kl)) if one else (NONE, NONE)))]
        )
    columns = ["pattern:", *(column for text in texts for column in (short(text), "KL"))]
    caption = f"{short(sweep.model)}: perplexity by text, and KL from the dense model"
    return Grid(caption, columns, rows, sortable=True) if rows else None


def _named(row: Row) -> str:
    return f"{row.pattern} by {row.scope}" if row.scope else row.pattern


def speeds(found: Speeds) -> Grid:
    """How fast products with sparse masks are beside dense ones."""
    head, *rows = bench_rows(found.results)
    columns = [f"{name}:" if index < len(("masks", "type")) else name for index, name in enumerate(head)]
    caption = f"{short(found.model)} on {found.place}: times as fast as the dense product of the same type (?: or not)"
    return Grid(caption, columns, [list(row) for row in rows], sortable=True)


def tradeoff(facts: Tradeoff) -> Grid:
    """One row for each pattern."""
    rows: list[list[Cell]] = []
    if facts.dense is not None:
        rows.append(["dense", fraction(0.0), shown(facts.dense), _sized(facts.dense_bytes), ""])
    for point in facts.points:
        sparsity, front = fraction(point.sparsity), "yes" if point.front else ""
        rows.append([point.name, sparsity, shown(point.perplexity), _sized(point.bytes), front])
    columns = ["pattern:", "sparsity", "perplexity", "packed", "best for its size:"]
    return without_empty(Grid(f"{short(facts.model)}: {facts.measure}", columns, rows, sortable=True))


def kinds(grid: Mapping[tuple[str, str], float]) -> Grid:
    """Sparsity of each kind of matrix, over the blocks."""
    rows: list[list[Cell]] = []
    for name in dict.fromkeys(kind for _, kind in grid):
        values = [value for (_, kind), value in grid.items() if kind == name]
        mean = sum(values) / len(values)
        rows.append([name, *map(fraction, (mean, min(values), max(values)))])
    return Grid(
        "Sparsity by kind of matrix, over the decoder blocks", ["matrix:", "mean", "least", "most"], rows, sortable=True
    )


def matrices(pruning: Pruning) -> Grid:
    """One row for each matrix."""
    rows: list[list[Cell]] = [
        [
            name,
            (f"{matrix.shape[0]} x {matrix.shape[1]}", float(matrix.size)),
            (count(matrix.size), float(matrix.size)),
            fraction(matrix.sparsity),
        ]
        for name, matrix in pruning.matrices.items()
    ]
    return Grid("Every pruned matrix", ["matrix:", "out x in", "weights", "sparsity"], rows, sortable=True)


def accuracies(subjects: Sequence[ReportedModel]) -> Grid | None:
    """One row for each model, task and metric; beside a reference the answers gained and lost, and McNemar's p."""
    rows: list[list[Cell]] = []
    several = len({subject.label for subject, _, _ in asked(subjects)}) > 1
    labels = apart(name for _, name, _ in asked(subjects))
    for subject, name, task in asked(subjects):
        for metric in METRICS:
            value = getattr(task, metric, None)
            if isinstance(value, (int, float)):
                rows.append(
                    [
                        labels[name],
                        subject.label if several else "",
                        task.metric if metric == "acc" and task.metric else metric,
                        str(task.questions),
                        *_compared(task, metric, value),
                    ]
                )
        for metric, found in task.others.items():
            row = [labels[name], subject.label if several else "", metric, str(found.n)]
            rows.append([*row, fraction(found.value), fraction(found.stderr), NONE, NONE, NONE, NONE])
    columns = ["task:", "model:", "metric:", "n", "value", "±", "other", "gained", "lost", "p"]  # as narrow as a terminal
    if not rows:
        return None
    compared = any(row[-1] != NONE for row in rows)
    test = ", and McNemar's test of the difference" if compared else ""
    return without_empty(Grid(f"Accuracy on n questions ± standard error{test}", columns, rows))


def asked(subjects: Sequence[ReportedModel]) -> Iterator[tuple[ReportedModel, str, TaskResult]]:
    """Every task that a model was asked, once where several evaluations asked the same questions in the same way."""
    for subject in subjects:
        seen = set()
        for evaluation in subject.evaluations:
            for name, task in evaluation.tasks.items():
                this = name, task.sha256, task.num_fewshot, evaluation.against
                if task.sha256 is None or this not in seen:
                    yield subject, name, task
                seen.add(this)


def harness(subjects: Sequence[ReportedModel]) -> Grid | None:
    """What lm-evaluation-harness found."""
    rows: list[list[Cell]] = []
    for subject in subjects:
        for evaluation in subject.evaluations:
            for task, metrics in evaluation.lm_eval.items():
                for metric, value in metrics.items():
                    if isinstance(value, (int, float)) and "_stderr" not in metric:
                        error = metrics.get(f"{metric}_stderr")
                        errors: Cell = (f"{error:.4f}", error) if isinstance(error, float) else NONE
                        marks = evaluation.lm_eval_against.get(task, {}).get(metric)
                        reference = evaluation.lm_eval_reference.get(task, {}).get(metric, marks.reference if marks else None)
                        _, *other = _against(marks)
                        values = [NONE if one is None else (f"{one:.4f}", one) for one in (value, reference)]
                        rows.append([task, subject.label, metric, values[0], errors, values[1], *other])
    columns = ["task:", "model:", "metric:", "value", "± error", "other", "gained", "lost", "p"]
    return without_empty(Grid("lm-evaluation-harness", columns, rows)) if rows else None


def bench_rows(results: Sequence[Result]) -> list[list[str]]:
    """Speeds as ``bench`` measures them, head first: a row for each kernel, dtype and batch, a column for each sparsity.

    A question mark follows where the rounds' quartiles lie on both sides of 1.
    """
    sparsities = sorted({row.sparsity for row in results})
    rows: dict[tuple[str, str, str], dict[float, str]] = {}
    for row in results:
        masks = row.kind if row.dtype == row.against else f"{row.kind}, against {row.against}"
        cell = f"{row.speedup:.2f}" + ("?" if row.low < 1 < row.high else "")
        rows.setdefault((masks, row.dtype, str(row.batch)), {})[row.sparsity] = cell
    body = [[*label, *(cells.get(sparsity, "") for sparsity in sparsities)] for label, cells in rows.items()]
    return [["masks", "type", "batch", *(f"{100 * sparsity:g}%" for sparsity in sparsities)], *body]


def closeness(subjects: Sequence[ReportedModel]) -> Grid | None:
    """How far each model is from the one that it was evaluated against, which is named unless it is the dense one."""
    rows: list[list[Cell]] = []
    for subject in subjects:
        for evaluation in subject.evaluations:
            if near := evaluation.closeness:
                text = short(near.text.text) if near.text else NONE
                agreement = fraction(near.agreement), fraction(near.agreement_stderr)
                tokens: Cell = (f"{near.tokens:,}", near.tokens) if near.tokens is not None else NONE
                other = subject.other(evaluation)
                rows.append([subject.label, other, shown(near.kl), shown(near.kl_stderr), *agreement, tokens, text])
    columns = ["model:", "against:", "KL, nats per token", "± error", "same likeliest token", "± error", "tokens", "text:"]
    return Grid("Next-token distributions, compared with those of another model", columns, rows) if rows else None


def protocol(source: ResultFile) -> Grid:
    """Everything that is needed to get a result again: what the file says, but for the results themselves."""
    settings = {key: value for key, value in source.data.items() if key not in IGNORED}
    tasks = {name: facts.get("sha256") for name, facts in (source.data.get("tasks") or {}).items()}
    stated = {"tasks": tasks, **(settings.pop("protocol", None) or {})}
    rows: list[list[Cell]] = [[key, value] for key, value in _flat(settings | stated)]
    return Grid(
        f"How {source.path.name} was {'made' if source.kind == 'pruning' else 'measured'}", ["setting:", "value:"], rows
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings, one line each; empty ones are left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} / {key}" if name else str(key))
    elif isinstance(value, list) and len(value) > LONGEST:
        yield name, f"{len(value)} values"
    elif value not in (None, "", []):
        yield name, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else number(value)
    return repr(value)[1:-1] if isinstance(value, str) and not value.isprintable() else short(str(value))


def _compared(task: TaskResult, metric: str, value: float) -> list[Cell]:
    found = shown(value) if metric == "perplexity" else fraction(value)
    return [found, fraction(getattr(task, f"{metric}_stderr", None)), *_against(task.against.get(metric))]


def _against(other: Compared | None) -> list[Cell]:
    """A reference's accuracy, the answers gained and lost, McNemar's p."""
    if other is None:
        return [NONE, NONE, NONE, NONE]
    return [fraction(other.reference), str(other.gained), str(other.lost), (f"{other.p:.2g}", other.p)]


def shown(value: float | None) -> Cell:
    """A perplexity, sorted by its value; what is no number comes last."""
    return NONE if value is None else (number(value), value if math.isfinite(value) else math.inf)


def fraction(value: float | None) -> Cell:
    """In percent, sorted by its value, which is from 0 to 1."""
    return NONE if value is None else (percent(value), value)


def _sized(value: int | None) -> Cell:
    return (size(value), float(value)) if value is not None else NONE


def without_empty(grid: Grid) -> Grid:
    """The columns in which something stands."""
    kept = [index for index in range(len(grid.columns)) if any(row[index] not in (NONE, "") for row in grid.rows)]
    rows = [[row[index] for index in kept] for row in grid.rows]
    return Grid(grid.caption, [grid.columns[index] for index in kept], rows, grid.sortable)
