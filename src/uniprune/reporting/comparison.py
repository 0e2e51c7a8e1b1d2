"""The table of ``compare``, as cells; and as Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from uniprune.common.formatting import MINUS, NONE, apart, percent, short, shots_words
from uniprune.common.significance import mcnemar
from uniprune.comparison.results import DENSE, Comparison, ComparisonRow
from uniprune.evaluation.protocols import sentence
from uniprune.reporting.summary import measure
from uniprune.reporting.tables import Cell, Grid, as_markdown, fraction, plain, shown, without_empty
from uniprune.sparsity.structure import SCOPES

# Settings that two tables have in common where their rows differ by the calibration samples alone.
SHARED = ("metric", "budget_tokens", "steps", "scope", "rules", "unsupported", "include", "exclude", "dtype")
PERPLEXITY = "perplexity"  # the column in which the best of a sparsity are marked
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "∞": r"$\infty$",
    MINUS: "$-$",
    NONE: "--",
}


class CalibrationKey(NamedTuple):
    """What the rows of a table were calibrated on."""

    text: str
    windows: int | None
    length: int | None
    seed: Any

    @classmethod
    def of(cls, table: Comparison) -> CalibrationKey:
        facts = table.protocol.calibration
        read = (facts.text, facts.windows, facts.length) if facts else (NONE, None, None)
        return cls(*read, table.protocol.settings.get("seed"))

    @property
    def samples(self) -> str:
        return f"{self.windows} samples of {self.length}, seed {self.seed}"


def grid(table: Comparison) -> Grid:
    """One row for each method and sparsity, sparsity by sparsity; columns in which nothing stands are left out."""
    tasks = list(dict.fromkeys(name for row in table.rows for name in row.tasks))
    scoped = len(table.scopes) > 1
    columns = ["method:", "sparsity:", *(["scope:"] if scoped else []), "zeros", PERPLEXITY, "±"]
    columns += [*apart(tasks).values(), "seconds"]
    rows = [_cells(row, table.labels[row.method], tasks, scoped) for row in ordered(table)]
    marked = frozenset((index, columns.index(PERPLEXITY)) for index in best(table))
    return Grid(f"{short(table.model)}: {measure(table.protocol)}", columns, rows, sortable=True, best=marked)


def readings(table: Comparison) -> Grid:
    """The same perplexities per word and byte, and by how much of a sample a prediction saw."""
    positions = list(dict.fromkeys(place for row in table.rows for place in row.by_position or ()))
    rows: list[list[Cell]] = []
    for row in ordered(table):
        values = [row.word_perplexity, row.byte_perplexity, *((row.by_position or {}).get(place) for place in positions)]
        rows.append([table.labels[row.method], row.pattern or NONE, shown(row.perplexity), *map(shown, values)])
    columns = ["method:", "sparsity:", "per token", "per word", "per byte", *(f"after {place} tokens" for place in positions)]
    return without_empty(
        Grid("Perplexity per token, word and byte, and by position in the sample", columns, rows, sortable=True)
    )


def flips(table: Comparison) -> Grid | None:
    """Answers that each row gained and lost against the dense model; None where it is not known which are right."""
    dense = next((row for row in table.rows if row.method == DENSE), None)
    tasks = apart(name for row in table.rows for name in row.tasks)
    methods = table.labels
    rows = [cells for row in ordered(table) for cells in _flips(row, dense, methods[row.method], tasks)] if dense else []
    columns = ["method:", "sparsity:", "task:", "metric:", "accuracy", "dense", "gained", "lost", "McNemar's p"]
    return Grid("Answers gained and lost against the dense model", columns, rows, sortable=True) if rows else None


def _flips(row: ComparisonRow, dense: ComparisonRow, method: str, tasks: Mapping[str, str]) -> Iterator[list[Cell]]:
    for task, metrics in row.right.items() if row is not dense else ():
        for metric in metrics:
            changed = row.flips(dense, task, metric)
            asked = (row.tasks.get(task), dense.tasks.get(task))
            values = [value for each in asked if isinstance(value := getattr(each, metric, None), float)]
            if changed and len(values) == len(asked):
                p = mcnemar(*changed)
                cells: list[Cell] = [method, row.pattern or NONE, tasks[task], metric]
                yield [*cells, *map(fraction, values), *map(str, changed), (f"{p:.2g}", p)]


def written(table: Comparison) -> list[Grid]:
    """For each prompt how every row's model goes on."""
    grids = []
    labels = table.labels
    for index, prompt in enumerate(table.protocol.prompts):
        rows: list[list[Cell]] = [
            [labels[row.method], row.pattern or NONE, row.written[index]] for row in ordered(table) if index < len(row.written)
        ]
        grids.append(Grid(prompt, ["method:", "sparsity:", "goes on:"], rows, prose=True))
    return [grid for grid in grids if grid.rows]


def sources(tables: Sequence[Comparison]) -> list[Grid]:
    """For each method and sparsity that tables of several calibration samples have: the perplexity on each text, after each.

    Of one model, made with the same settings, on evaluation samples of one number and length: others have tables of their own.
    """
    perplexities: dict[tuple[Any, ...], dict[tuple[CalibrationKey, str], float]] = {}
    for table in tables:
        how = table.protocol
        alike = [how.windows, how.length, *(str(how.settings.get(name)) for name in SHARED)]
        calibrated = CalibrationKey.of(table)
        for row in table.rows:
            if row.pattern:
                values = perplexities.setdefault((table.model, row.method, row.pattern, *alike), {})
                values[calibrated, how.text.text if how.text else NONE] = row.perplexity
    models = apart(model for model, *_ in perplexities)
    methods = apart(method for _, method, *_ in perplexities)
    grids = []
    for (model, method, pattern, *_), values in perplexities.items():
        calibrations = list(dict.fromkeys(calibrated for calibrated, _ in values))
        read = list(dict.fromkeys(text for _, text in values))
        if len(calibrations) > 1:
            texts, heads = apart(calibration.text for calibration in calibrations), apart(read)
            several = len(texts) < len(calibrations)
            names = {
                calibration: f"{texts[calibration.text]}, {calibration.samples}" if several else texts[calibration.text]
                for calibration in calibrations
            }
            rows: list[list[Cell]] = [
                [names[calibration], *(shown(values.get((calibration, text))) for text in read)] for calibration in calibrations
            ]
            what = f"{models[model]}, {methods[method]} at {pattern}"
            caption = f"{what}: perplexity on each text, by the text it was calibrated on"
            grids.append(Grid(caption, ["calibrated on:", *heads.values()], rows, sortable=True))
    return grids


def ordered(table: Comparison) -> list[ComparisonRow]:
    """The dense model, then sparsity by sparsity the methods as they were asked for."""
    patterns = list(dict.fromkeys([None, *table.sparsities, *(row.pattern for row in table.rows)]))
    return sorted(table.rows, key=lambda row: patterns.index(row.pattern))


def notes(table: Comparison) -> list[str]:
    """What is to be known beside the numbers."""
    scopes = table.scopes
    said = []
    if scopes:
        words = " or ".join(
            f"{SCOPES.get(scope, scope)} ({scope})" if len(scopes) > 1 else SCOPES.get(scope, scope) for scope in scopes
        )
        differs = "; it differs between methods, see the column scope" if len(scopes) > 1 else ""
        said.append(f"A fraction is {words}{differs}.")
    updating = dict.fromkeys(row.method for row in table.rows if row.updates_weights)
    if updating:
        said.append(f"{', '.join(updating)} updates the weights that remain; all others leave them as they are.")
    if any(row.tasks for row in table.rows):
        shots = sorted({task.num_fewshot or 0 for row in table.rows for task in row.tasks.values()})
        said.append(f"Tasks: {shots_words(shots)} accuracy ± standard error.")
    said.append("Seconds: of calibration, without masks and evaluation; rows that share a calibration all have its time.")
    if any(row.resumed for row in table.rows):
        said.append("Seconds after a >: of a calibration that was interrupted, the time since.")
    return [*said, sentence(table.reading)]


def best(table: Comparison) -> set[int]:
    """Which of the ordered rows has the lowest perplexity of its sparsity, where there are several."""
    rows = ordered(table)
    chosen = set()
    for pattern in {row.pattern for row in rows if row.method != DENSE}:
        alike = [index for index, row in enumerate(rows) if row.pattern == pattern]
        if len(alike) > 1:
            chosen.add(min(alike, key=lambda index: rows[index].perplexity))
    return chosen


def markdown(table: Comparison) -> str:
    """The table, its notes and what its models wrote as Markdown."""
    contents = grid(table)
    bold = best(table)
    heads = [name for name, _ in contents.heads]
    lines = [heads, ["---:" if numeric else "---" for _, numeric in contents.heads]]
    lines += _emphasised(contents, bold, "**{}**", lambda text: text.replace("|", r"\|"))
    said = [contents.caption, "\n".join(f"| {' | '.join(line)} |" for line in lines), *notes(table)]
    for each in written(table):
        said += [plain(each.caption), as_markdown(each)]
    return "\n\n".join(said) + "\n"


def latex(table: Comparison) -> str:
    """The table and its notes as LaTeX, for the package booktabs."""
    contents = grid(table)
    bold = best(table)
    rows = _emphasised(contents, bold, r"\textbf{{{}}}", _escaped)
    patterns = [row.pattern for row in ordered(table)]
    lines = [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{''.join('r' if n else 'l' for _, n in contents.heads)}}}"]
    lines += [r"\toprule", _line([_escaped(name) for name, _ in contents.heads])]
    for index, row in enumerate(rows):
        if index == 0 or patterns[index] != patterns[index - 1]:
            lines.append(r"\midrule")
        lines.append(_line(row))
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in [contents.caption, *notes(table)])]
    return "\n".join(lines) + "\n"


def _cells(row: ComparisonRow, method: str, tasks: list[str], scoped: bool) -> list[Cell]:
    error: Cell = NONE if row.nats_stderr is None else shown(row.perplexity * row.nats_stderr)
    seconds = row.seconds.get("calibrate")
    time: Cell = NONE if seconds is None else (f"{'> ' if row.resumed else ''}{seconds:.1f}", seconds)
    name = f"{method} (updates weights)" if row.updates_weights else method
    cells: list[Cell] = [name, row.pattern or NONE, *([row.scope or NONE] if scoped else [])]
    zeros = percent(row.sparsity), row.sparsity
    return [*cells, zeros, shown(row.perplexity), error, *(_accuracy(row, name) for name in tasks), time]


def _accuracy(row: ComparisonRow, name: str) -> Cell:
    if name not in row.tasks:
        return NONE
    task = row.tasks[name]
    error = "" if task.acc_stderr is None else f" ± {100 * task.acc_stderr:.1f}"
    return f"{100 * task.acc:.1f}{error}", task.acc


def _emphasised(table: Grid, bold: set[int], form: str, escape: Callable[[str], str]) -> list[list[str]]:
    """The cells as text, the perplexities of some rows in a form of their own."""
    at = table.columns.index(PERPLEXITY)
    rows = [[escape(cell if isinstance(cell, str) else cell[0]) for cell in row] for row in table.rows]
    for index in bold:
        rows[index][at] = form.format(rows[index][at])
    return rows


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escaped(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(SPECIAL.get(letter) or re.sub(r"([#$%&_{}])", r"\\\1", letter) for letter in text)
