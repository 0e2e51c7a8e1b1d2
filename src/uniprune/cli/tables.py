"""Results for people: terminal tables. Machines read the JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rich.table import Table

from uniprune.artefacts.reports import ExpertRemoval, Pruning
from uniprune.common.formatting import NOTE, count, number, percent, short, size
from uniprune.common.matrix_names import kind_of
from uniprune.comparison.results import Comparison
from uniprune.evaluation.protocols import sentence
from uniprune.evaluation.results import Check, Evaluation, Sweep, samples
from uniprune.job.forecast.estimate import Plan
from uniprune.reporting import comparison
from uniprune.reporting.capabilities import capabilities, parts
from uniprune.reporting.headline import sentences, verdict
from uniprune.reporting.summary import ReportedModel, Summary, tradeoff_of
from uniprune.reporting.tables import Cell, Grid, accuracies, closeness, harness, models, speeds, sweep_texts, texts, tradeoff
from uniprune.speed.results import Speeds


def plan_table(plan: Plan) -> Table:
    """The matrices of a plan, one row per kind."""
    columns = ["matrix:", "count", "out x in", "weights"]
    if plan.pattern:
        columns.append(f"{plan.structure.spelling if plan.structure else plan.pattern}:")  # rules show in the rows
    rows: list[list[Cell]] = []
    for group in plan.groups:
        row: list[Cell] = [group.name, str(group.count), f"{group.shape[0]} x {group.shape[1]}", count(group.weights)]
        if group.pattern:
            row.append(f"{group.pattern} ({group.unsupported})" if group.unsupported else group.pattern)
        rows.append(row)
    caption = f"{plan.model}: {count(plan.prunable)} of {count(plan.parameters)} weights are prunable"
    return _table(Grid(caption, columns, rows))


def executions_table(plan: Plan) -> Table:
    """What each way to run a plan would take, in each process; the chosen one is marked."""
    columns = ["execution:", "memory", "host memory", "disk meanwhile", "read", "written", "seconds"]
    rows: list[list[Cell]] = []
    for name, one in plan.executions.items():
        taken = (one.memory, one.host, one.disk, one.read, one.written)
        cells = [size(value) if value else "" for value in taken]
        rows.append([f"{name} *" if name == plan.execution else name, *cells, f"{max(one.seconds, 1):.0f}"])
    return _table(Grid("how it can be run: forecasts", columns, rows))


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


def evaluation_table(results: Mapping[str, Evaluation]) -> Table:
    """Perplexities side by side: label -> result of ``evaluate``, all on the same text."""
    first = next(iter(results.values()))
    text = first.text.text if first.text else "unknown"
    rows: list[list[Cell]] = []
    for label, result in results.items():
        value, error = result.perplexity, result.nats_stderr
        spread = "" if error is None or value is None else f"{value * error:.2f}"
        rows.append([label, f"{value:.2f}", spread, percent(result.sparsity), result.dtype or ""])
    caption = f"token perplexity: {text}, {samples(first)}"
    return _table(Grid(caption, ["model:", "perplexity", "± error", "zeros", "dtype"], rows))


def bench_table(found: Speeds) -> Table:
    """Speeds against the dense product of the same dtype."""
    return _table(speeds(found))


def evaluation_tables(result: Evaluation) -> list[Table | str]:
    """One result of ``evaluate`` as tables and sentences: those of what it measured, accuracies as a report shows them."""
    tables: list[Table | str] = []
    subjects = [ReportedModel(short(result.name), None, (result,))]
    if result.perplexity is not None:
        tables += [evaluation_table({result.name: result}), *_tables(texts(subjects)), *perplexity_lines(result)]
    else:
        against = f", against {result.against}" if result.against else ""
        codes = f" (dequantised from {result.quantised})" if result.quantised else ""
        tables.append(_inert(f"{result.name}: {percent(result.sparsity)} zeros, {result.dtype}{codes}{against}"))
    tables += _tables(accuracies(subjects), parts(subjects), harness(subjects), capabilities(subjects))
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


def sweep_tables(result: Sweep) -> list[Table]:
    """One row per pattern, and what was measured on each of several texts, as a report shows them."""
    return _tables(tradeoff(tradeoff_of(result)), sweep_texts(result))


def comparison_table(found: Comparison) -> list[Table | str]:
    """The table of ``compare``, what is to be known beside it, and what its models wrote."""
    return [_table(comparison.grid(found)), *map(_inert, comparison.notes(found)), *_tables(*comparison.written(found))]


def _plus_minus(error: float | None, unit: str = "") -> str:
    return "" if error is None else f" ± {error:.2g} {unit}".rstrip()


def report_tables(summary: Summary) -> list[Table]:
    """A report's tables, as far as they fit a terminal."""
    subjects = summary.subjects
    return _tables(
        *map(comparison.grid, summary.comparisons),
        models(subjects),
        *map(tradeoff, summary.tradeoffs),
        texts(subjects),
        *map(sweep_texts, summary.sweeps),
        accuracies(subjects),
        parts(subjects),
        harness(subjects),
        capabilities(subjects),
        closeness(subjects),
    )


def report_lines(summary: Summary) -> list[str]:
    """A report's findings, in sentences."""
    return [_inert(sentence) for sentence in filter(None, (summary.title, verdict(summary), *sentences(summary)))]


def _tables(*grids: Grid | None) -> list[Table]:
    """Those that there are."""
    return [_table(grid) for grid in grids if grid]


def _table(grid: Grid) -> Table:
    """Without empty columns. What a narrow terminal has no room for goes on in the next line, but no word of a head does."""
    table = Table(title=_inert(grid.caption))
    rows = [[_inert(cell if isinstance(cell, str) else cell[0]) for cell in row] for row in grid.rows]
    shown = [index for index in range(len(grid.heads)) if any(row[index] for row in rows) or not rows]
    for name, numeric in (grid.heads[index] for index in shown):
        width = max(map(len, name.split()), default=0)
        table.add_column(_inert(name), justify="right" if numeric else "left", overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    return table


def _inert(text: str) -> str:
    """Text of others, that does not move the cursor. It is no markup either: see terminal.console."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
