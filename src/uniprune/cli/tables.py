"""Results for people: terminal tables. Machines read the JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.table import Table

from uniprune.artefacts.reports import ExpertRemoval, Pruning
from uniprune.common.formatting import NOTE, count, number, percent, size
from uniprune.common.matrix_names import kind_of
from uniprune.comparison.results import Comparison
from uniprune.evaluation.protocols import sentence
from uniprune.evaluation.results import Check, Evaluation, Row, Sweep, samples
from uniprune.job.forecast.estimate import Plan
from uniprune.reporting import comparison
from uniprune.reporting.capabilities import capabilities, parts
from uniprune.reporting.headline import sentences, verdict
from uniprune.reporting.results import ResultFile
from uniprune.reporting.summary import Summary, summarise
from uniprune.reporting.tables import Grid, accuracies, bench_rows, closeness, harness, models, sweep_texts, texts, tradeoff
from uniprune.speed.results import Speeds


def plan_table(plan: Plan) -> Table:
    """The matrices of a plan, one row per kind."""
    heads = [("matrix", False), ("count", True), ("out x in", True), ("weights", True)]
    if plan.pattern:
        heads.append((plan.structure.spelling if plan.structure else plan.pattern, False))  # rules show in the rows
    title = f"{plan.model}: {count(plan.prunable)} of {count(plan.parameters)} weights are prunable"
    table = _table(title, heads)
    for group in plan.groups:
        cells = [group.name, str(group.count), f"{group.shape[0]} x {group.shape[1]}", count(group.weights)]
        gets = f"{group.pattern} ({group.unsupported})" if group.unsupported else group.pattern
        table.add_row(*cells, *([gets] if plan.pattern else []))
    return table


def executions_table(plan: Plan) -> Table:
    """What each way to run a plan would take, in each process; the chosen one is marked."""
    heads = ("execution", "memory", "host memory", "disk meanwhile", "read", "written", "seconds")
    table = _table("how it can be run: forecasts", ((head, head != "execution") for head in heads))
    for name, one in plan.executions.items():
        taken = (one.memory, one.host, one.disk, one.read, one.written)
        cells = [size(value) if value else "" for value in taken]
        table.add_row(f"{name} *" if name == plan.execution else name, *cells, f"{max(one.seconds, 1):.0f}")
    return table


def plan_lines(plan: Plan) -> list[str]:
    """The forecast of a plan, in sentences."""
    lines = []
    if plan.sparsity is not None:
        lines.append(f"Sparsity {plan.sparsity:.1%} of the prunable weights, {plan.sparsity_of_model:.1%} of all parameters.")
    if plan.size is not None:
        lines.append(
            f"Sparsity {plan.sparsity_for_size:g}: the archive that `uniprune pack` makes then has at most {plan.size:,} bytes."
        )
    if plan.quantised is not None:
        lines.append(
            f"Quantised ({plan.quantised}): dequantised to {plan.dtype} to be scored, pruned in the codes; scales stay."
        )
    if plan.experts:
        kept, groups = plan.experts, f", as many in each of {plan.experts.groups} groups" if plan.experts.groups > 1 else ""
        lines.append(
            f"Experts: {kept.kept} of {kept.of} stay in each of {kept.layers} layers{groups}; {count(kept.parameters)} "
            "parameters are left, and nothing else is changed."
        )
    chosen = plan.execution if plan.execution != "none" else "none of them fits into the memory"
    lines.append(
        f"Execution: {chosen} ({plan.dtype}). About {max(plan.seconds, 1):.0f} s for {plan.tokens} calibration tokens on this "
        f"machine, {size(plan.disk)} of disk for the output."
    )
    for (kind, why), times in Counter((kind_of(name), why) for name, why in plan.left_dense.items()).items():
        lines.append(f"Left dense: {times} x {kind}, {why}.")
    if plan.shared:
        lines.append(
            f"Shared by several modules, and pruned once: {len(plan.shared)} matrices, e.g. {next(iter(plan.shared))}."
        )
    if not plan.fits:
        lines.append(
            "Some layers do not support the pattern: prune refuses until --unsupported, --rule or --exclude says what they get."
        )
    return lines if plan.experts else [*lines, NOTE]


def pruned_lines(report: Pruning | ExpertRemoval) -> list[str]:
    """What a run removed, in sentences."""
    if isinstance(report, Pruning):
        lines = [f"{report.pattern}, sparsity {report.sparsity:.4f} in {len(report.matrices)} matrices"]
        if report.model.quantised:
            lines.append(
                f"Its codes are the source's ({report.model.quantised}), those of pruned weights that of 0; scales stay."
            )
        return [*lines, NOTE, *([f"{report.speed} uniprune bench measures more."] if report.speed else [])]
    kept = report.experts
    lines = [f"{kept.kept} of {kept.of} experts in each of {kept.layers} layers, {count(kept.parameters)} parameters"]
    if report.unreached:
        unreached = sum(map(len, report.unreached.values()))
        layer, numbers = next(iter(report.unreached.items()))
        lines.append(f"No calibration token was routed to {unreached} experts, e.g. number {numbers[0]} of {layer}.")
    return lines


def evaluation_table(rows: Mapping[str, Evaluation]) -> Table:
    """Perplexities side by side: label -> result of ``evaluate``, all on the same text."""
    first = next(iter(rows.values()))
    text = first.text.text if first.text else "unknown"
    heads = ("model", "perplexity", "± error", "zeros", "dtype")
    table = _table(f"token perplexity: {text}, {samples(first)}", ((head, head != "model") for head in heads))
    for label, result in rows.items():
        value, error = result.perplexity, result.nats_stderr
        spread = "" if error is None or value is None else f"{value * error:.2f}"
        table.add_row(_inert(label), f"{value:.2f}", spread, percent(result.sparsity), result.dtype)
    return table


def bench_table(speeds: Speeds) -> Table:
    """Speeds against the dense product of the same dtype."""
    head, *rows = bench_rows(speeds.results)
    place = f"{speeds.device}, {speeds.threads} thread{'s' if speeds.threads > 1 else ''}"
    title = f"{speeds.model} on {place}: times as fast as the dense product of the same type (?: or not)"
    table = _table(title, ((column, column not in ("masks", "type")) for column in head))
    for row in rows:
        table.add_row(*row)
    return table


def text_tables(result: Evaluation | Sweep) -> list[Table]:
    """What was measured on each of several texts, as a report shows it."""
    found = sweep_texts(result) if isinstance(result, Sweep) else texts(summarise([ResultFile(Path(), {}, result)]))
    return [_grid_table(found)] if found else []


def evaluation_tables(result: Evaluation) -> list[Table | str]:
    """One result of ``evaluate`` as tables and sentences: those of what it measured, accuracies as a report shows them."""
    tables: list[Table | str] = []
    if result.perplexity is not None:
        tables += [evaluation_table({result.name: result}), *text_tables(result), *perplexity_lines(result)]
    else:
        against = f", against {result.against}" if result.against else ""
        codes = f" (dequantised from {result.quantised})" if result.quantised else ""
        tables.append(_inert(f"{result.name}: {percent(result.sparsity)} zeros, {result.dtype}{codes}{against}"))
    summary = summarise([ResultFile(Path(), {}, result)])
    found = accuracies(summary), parts(summary), harness(summary), capabilities(summary)
    tables += [_grid_table(grid) for grid in found if grid]
    notes = [_inert(f"lm-evaluation-harness: {note}.") for note in result.lm_eval_notes]
    return [*tables, *notes, *closeness_lines(result)]


def perplexity_lines(result: Evaluation) -> list[str]:
    """The same perplexity per word and byte, and by position; what windows began with; what it compares with."""
    lines, text = [], result.text
    if result.quantised is not None:
        lines.append(f"Quantised ({result.quantised}): dequantised to {result.dtype}.")
    if result.word_perplexity is not None:
        per_byte = result.byte_perplexity
        close = f"{per_byte:.4f}" if per_byte and per_byte < 100 else number(per_byte)  # bytes are told apart by the digits
        lines.append(f"Per word {number(result.word_perplexity)}, per byte {close}.")
    if len(found := result.by_position or {}) > 1:
        lines.append(f"By position: {', '.join(f'{name} {value:.2f}' for name, value in found.items())}.")
    if text and text.rolling:
        lines.append(f"Documents read one by one: {text.documents}{', each after two BOS' if text.second_bos else ''}.")
    elif text and text.windows_with_bos is not None:
        lines.append(f"{text.windows_with_bos} of {text.windows} samples begin with BOS.")
    return [_inert(line) for line in (*lines, sentence(result))]


def closeness_lines(result: Evaluation) -> list[str]:
    """How near a model's predictions and continuations are to another's, in sentences."""
    lines = []
    if found := result.closeness:
        lines.append(
            f"Beside {result.against} (perplexity {found.reference_perplexity:.2f}): KL {number(found.kl)} nats per "
            f"token{_plus_minus(found.kl_stderr)}, the same likeliest token at {found.agreement:.1%} of {found.tokens} "
            f"tokens{_plus_minus(found.agreement_stderr and 100 * found.agreement_stderr, 'points')}."
        )
    for row in result.generations:
        lines += [f"> {row.prompt!r}", f"  model:   {row.model!r}", f"  against: {row.against!r}"]
        lines.append(f"  the same for {row.same_tokens} of {row.tokens} tokens")
    return [_inert(line) for line in lines]


def check_lines(result: Check) -> list[str]:
    """Whether a recorded result was reproduced, and where not."""
    place = "" if result.same_machine else " (on a machine of another kind: values may differ by 1 %)"
    lines = [f"{result.result}: {'reproduced' if result.reproduced else 'NOT reproduced'}{place}"]
    lines += [f"  {one.what}: {one.recorded} was recorded, now {one.found}" for one in result.differences[:10]]
    if (more := len(result.differences) - 10) > 0:
        lines.append(f"  and {more} more")
    recorded, now = result.versions.recorded, result.versions.now
    changed = [f"{name} {recorded[name]} -> {now.get(name)}" for name in recorded if recorded[name] != now.get(name)]
    return lines + ([f"  other versions: {', '.join(changed)}"] if changed else [])


def sweep_table(result: Sweep) -> Table:
    """One row per sparsity; * marks those that no other beats in both perplexity and size."""
    how = result.protocol
    text = how.text.text if how.text else "unknown"
    heads = ("pattern", "zeros", "perplexity", "packed MB", "")
    title = f"{result.model}: {text}, {samples(how)}"
    table = _table(title, ((head, head != "pattern") for head in heads))
    rows = list(result.rows)
    if dense := result.dense:
        rows.insert(0, Row(pattern="dense", sparsity=0.0, perplexity=dense.perplexity, bytes=dense.bytes))
    for row in rows:
        megabytes = "" if row.bytes is None else f"{row.bytes / 1e6:.1f}"
        table.add_row(row.pattern, percent(row.sparsity), f"{row.perplexity:.2f}", megabytes, "*" if row.pareto else "")
    return table


def comparison_table(found: Comparison) -> list[Table | str]:
    """The table of ``compare``, and what is to be known beside it."""
    return [_grid_table(comparison.grid(found)), *map(_inert, comparison.notes(found))]


def _plus_minus(error: float | None, unit: str = "") -> str:
    return "" if error is None else f" ± {error:.2g} {unit}".rstrip()


def report_tables(summary: Summary) -> list[Table]:
    """A report's tables, as far as they fit a terminal."""
    found = [models(summary), *map(tradeoff, summary.tradeoffs), texts(summary), *map(sweep_texts, summary.sweeps)]
    found += [
        accuracies(summary),
        parts(summary),
        harness(summary),
        capabilities(summary),
        closeness(summary),
    ]
    return [_grid_table(grid) for grid in found if grid]


def report_lines(summary: Summary) -> list[str]:
    """A report's findings, in sentences."""
    return [_inert(sentence) for sentence in filter(None, (summary.title, verdict(summary), *sentences(summary)))]


def _grid_table(grid: Grid) -> Table:
    table = _table(grid.caption, grid.heads)
    for row in grid.rows:
        table.add_row(*(_inert(cell if isinstance(cell, str) else cell[0]) for cell in row))
    return table


def _table(title: str, heads: Iterable[tuple[str, bool]]) -> Table:
    """heads: a column's name, and whether it has numbers. What a narrow terminal has no room for goes on in the next line."""
    table = Table(title=_inert(title))
    for name, numeric in heads:
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    return table


def _inert(text: str) -> str:
    """Text of others, that does not move the cursor. It is no markup either: see terminal.console."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
