"""The table of ``compare``, as cells; and as Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable

from uniprune.common.formatting import MINUS, NONE, number, percent, short
from uniprune.comparison.results import DENSE, Comparison, ComparisonRow
from uniprune.evaluation.protocols import sentence
from uniprune.reporting.summary import measure
from uniprune.reporting.tables import Cell, Grid
from uniprune.sparsity.structure import SCOPES

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


def grid(found: Comparison) -> Grid:
    """One row for each method and sparsity, sparsity by sparsity; columns in which nothing stands are left out."""
    tasks = list(dict.fromkeys(name for row in found.rows for name in row.tasks))
    scoped = len(found.scopes) > 1
    columns = ["method:", "sparsity:", *(["scope:"] if scoped else []), "zeros", PERPLEXITY, "±"]
    columns += [*(short(task) for task in tasks), "seconds"]
    rows = [_cells(row, tasks, scoped) for row in ordered(found)]
    return Grid(f"{short(found.model)}: {measure(found.protocol)}", columns, rows, sortable=True)


def ordered(found: Comparison) -> list[ComparisonRow]:
    """The dense model, then sparsity by sparsity the methods as they were asked for."""
    patterns = list(dict.fromkeys([None, *found.sparsities, *(row.pattern for row in found.rows)]))
    return sorted(found.rows, key=lambda row: patterns.index(row.pattern))


def notes(found: Comparison) -> list[str]:
    """What is to be known beside the numbers."""
    scopes = found.scopes
    said = []
    if scopes:
        words = " or ".join(
            f"{SCOPES.get(scope, scope)} ({scope})" if len(scopes) > 1 else SCOPES.get(scope, scope) for scope in scopes
        )
        differs = "; it differs between methods, see the column scope" if len(scopes) > 1 else ""
        said.append(f"A fraction is {words}{differs}.")
    updating = dict.fromkeys(row.method for row in found.rows if row.updates_weights)
    if updating:
        said.append(f"{', '.join(updating)} updates the weights that remain; all others leave them as they are.")
    if any(row.tasks for row in found.rows):
        said.append("Tasks: zero-shot accuracy ± standard error.")
    said.append("Seconds: of calibration, without masks and evaluation; rows that share a calibration all have its time.")
    if any(row.resumed for row in found.rows):
        said.append(">: of a calibration that was interrupted, the time since.")
    return [*said, sentence(found.reading)]


def best(found: Comparison) -> set[int]:
    """Which of the ordered rows has the lowest perplexity of its sparsity, where there are several."""
    rows, chosen = ordered(found), set()
    for pattern in {row.pattern for row in rows if row.method != DENSE}:
        alike = [index for index, row in enumerate(rows) if row.pattern == pattern]
        if len(alike) > 1:
            chosen.add(min(alike, key=lambda index: rows[index].perplexity))
    return chosen


def verdict(found: Comparison) -> str:
    """Which method has the lowest perplexity, in a sentence."""
    rows = ordered(found)
    dense = next((f"dense {number(row.perplexity)}" for row in rows if row.method == DENSE), "")
    lowest = [f"at {rows[i].pattern} {number(rows[i].perplexity)} by {short(rows[i].method)}" for i in sorted(best(found))]
    count = len({row.method for row in rows} - {DENSE})
    said = "; ".join(filter(None, [dense, *lowest]))
    return f"{count} methods on {short(found.model)}, {measure(found.protocol)}. The lowest perplexities: {said}."


def markdown(found: Comparison) -> str:
    """The table and its notes as Markdown."""
    table, bold = grid(found), best(found)
    heads = [name for name, _ in table.heads]
    lines = [heads, ["---:" if numeric else "---" for _, numeric in table.heads]]
    lines += _emphasised(table, bold, "**{}**", lambda text: text.replace("|", r"\|"))
    said = [table.caption, "\n".join(f"| {' | '.join(line)} |" for line in lines), *notes(found)]
    return "\n\n".join(said) + "\n"


def latex(found: Comparison) -> str:
    """The table and its notes as LaTeX, for the package booktabs."""
    table, bold = grid(found), best(found)
    rows, patterns = _emphasised(table, bold, r"\textbf{{{}}}", _escaped), [row.pattern for row in ordered(found)]
    lines = [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{''.join('r' if n else 'l' for _, n in table.heads)}}}"]
    lines += [r"\toprule", _line([_escaped(name) for name, _ in table.heads])]
    for index, row in enumerate(rows):
        if index == 0 or patterns[index] != patterns[index - 1]:
            lines.append(r"\midrule")
        lines.append(_line(row))
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in [table.caption, *notes(found)])]
    return "\n".join(lines) + "\n"


def _cells(row: ComparisonRow, tasks: list[str], scoped: bool) -> list[Cell]:
    error = NONE if row.nats_stderr is None else number(row.perplexity * row.nats_stderr)
    seconds = row.seconds.get("calibrate")
    time = NONE if seconds is None else f"{'> ' if row.resumed else ''}{seconds:.1f}"
    name = f"{short(row.method)} (updates weights)" if row.updates_weights else short(row.method)
    cells: list[Cell] = [name, row.pattern or NONE, *([row.scope or NONE] if scoped else [])]
    return [*cells, percent(row.sparsity), number(row.perplexity), error, *(_accuracy(row, name) for name in tasks), time]


def _accuracy(row: ComparisonRow, name: str) -> str:
    if name not in row.tasks:
        return NONE
    task = row.tasks[name]
    error = "" if task.acc_stderr is None else f" ± {100 * task.acc_stderr:.1f}"
    return f"{100 * task.acc:.1f}{error}"


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
