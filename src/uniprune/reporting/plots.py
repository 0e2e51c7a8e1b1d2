"""The plots of a report: inline SVG that takes its colours and its font from the page around it.

matplotlib draws with stand-in colours; they are then replaced by CSS variables, so that one drawing suits light and dark. The
same numbers give the same bytes: ids are salted by the plot's name, and there is no date.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from uniprune.common.formatting import NONE, number, percent
from uniprune.comparison.results import DENSE, Comparison
from uniprune.reporting.summary import EVALUATED, Point, Tradeoff
from uniprune.reporting.tables import Cell, Grid
from uniprune.saliency.record import ControllerRecord

INK, FAINT, SURFACE = "#010203", "#020304", "#030405"
SERIES = tuple(f"#0a0b{index:02x}" for index in range(1, 7))
VARIABLES = {INK: "currentColor", FAINT: "var(--line)", SURFACE: "var(--surface)"}
VARIABLES |= {colour: f"var(--series-{index})" for index, colour in enumerate(SERIES, 1)}
MARKERS = "osD^vP"
LONGEST = 24  # letters of a label
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


@dataclass(frozen=True)
class Plot:
    """``svg``: an <svg> element without a size of its own. ``says``: what it shows, in a sentence, for those who cannot see it.

    ``data``: the numbers that are drawn.
    """

    svg: str
    says: str
    data: Grid


def tradeoff(name: str, facts: Tradeoff, by: str) -> Plot | None:
    """Perplexity, on a logarithmic scale, against ``by``: ``sparsity`` or ``bytes``. None where nothing is known of it."""
    scale, unit = (100, "removed, % of prunable weights") if by == "sparsity" else (1e-6, "packed size, MB")
    seen = [point for point in facts.points if 0 < point.perplexity < math.inf and getattr(point, by) is not None]
    if not seen:
        return None
    dense = facts.dense if facts.dense is not None and 0 < facts.dense < math.inf else None
    with _figure(name, 4.8, 3.5) as (figure, made):
        axes = figure.subplots()
        front = [point for point in facts.front if point in seen]
        if by == ("bytes" if facts.packed else "sparsity") and len(front) > 1:
            x, y = [scale * getattr(point, by) for point in front], [point.perplexity for point in front]
            axes.plot(x, y, color=INK, lw=1, ls=":", label="Pareto front", zorder=1)
        order = sorted({point.series for point in seen}, key=lambda series: (series == EVALUATED, series == "N:M", series))
        for index, series in enumerate(order):
            _scatter(axes, [point for point in seen if point.series == series], series, index % len(SERIES), by, scale)
        if dense is not None:
            axes.axhline(dense, color=INK, lw=1, ls=(0, (4, 3)), label="dense")
        _log(axes, "y", [point.perplexity for point in seen] + [dense or seen[0].perplexity])
        axes.margins(x=0.09, y=0.1)
        axes.set(xlabel=unit, ylabel="perplexity")
        _legend(axes)
    told = ", ".join(f"{point.name} {number(point.perplexity)}" for point in seen)
    dense_note = f"; dense {number(dense)}" if dense is not None else ""
    ends = [("dense", 0.0 if by == "sparsity" else facts.dense_bytes, dense)] if dense is not None else []
    data = [*ends, *((point.name, getattr(point, by), point.perplexity) for point in seen)]
    says = f"Perplexity against {by if by == 'sparsity' else 'packed size'}: {told}{dense_note}."
    return made(says, ["pattern:", by, "perplexity"], data)


def _scatter(axes: Any, points: Sequence[Point], series: str, index: int, by: str, scale: float) -> None:
    """One series; a curve if they are sparsities of one sweep."""
    x, y = [scale * getattr(point, by) for point in points], [point.perplexity for point in points]
    style = MARKERS[index] + ("-" if series.startswith("sparsities") and len(points) > 1 else "")
    axes.plot(x, y, style, color=SERIES[index], ms=5.5, label=_label(series))
    if not series.startswith("sparsities"):
        for at, value, point in zip(x, y, points, strict=True):
            text = point.pattern if point.label is None else point.label
            axes.annotate(_label(text), (at, value), xytext=(6, 5), textcoords="offset points", fontsize=9.5)


def methods(name: str, table: Comparison) -> Plot | None:
    """Perplexities on a logarithmic scale: a line of markers for each sparsity, one for each method, and the dense model's."""
    rows = [row for row in table.rows if row.pattern and 0 < row.perplexity < math.inf]
    if not rows:
        return None
    dense = next((row.perplexity for row in table.rows if row.method == DENSE and 0 < row.perplexity < math.inf), None)
    patterns, names = (list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("pattern", "method"))
    labels = table.labels
    with _figure(name, 4.8, 1.2 + 0.4 * len(patterns) + 0.18 * (len(names) // 3)) as (figure, made):
        axes = figure.subplots()
        for index, method in enumerate(names):
            mine = [row for row in rows if row.method == method]
            at = [patterns.index(row.pattern) for row in mine]
            axes.plot([row.perplexity for row in mine], at, label=_label(labels[method]), ls="", ms=7, **_look(index))
        if dense is not None:
            axes.axvline(dense, color=INK, lw=1, ls=(0, (4, 3)), label="dense")
        _log(axes, "x", [row.perplexity for row in rows] + [dense or rows[0].perplexity])
        axes.set_yticks(range(len(patterns)), list(map(_label, patterns)))
        axes.set(ylim=(len(patterns) - 0.5, -0.5), xlabel="perplexity")
        _legend(axes)
    told = ", ".join(f"{labels[row.method]} at {row.pattern} {number(row.perplexity)}" for row in rows)
    dense_note = f"; dense {number(dense)}" if dense is not None else ""
    data = ((row.method, row.pattern or "", row.sparsity, row.perplexity) for row in table.rows)
    return made(f"Perplexity by method: {told}{dense_note}.", ["method:", "pattern:", "sparsity", "perplexity"], data)


def curves(name: str, table: Comparison) -> Plot | None:
    """Perplexity, on a logarithmic scale, against sparsity: a curve for each method. None where no method has two fractions."""
    fractions = [row for row in table.rows if row.structure and row.structure.kind == "unstructured"]
    seen = [row for row in fractions if 0 < row.perplexity < math.inf]
    names = [
        name for name in dict.fromkeys(row.method for row in seen) if len({r.sparsity for r in seen if r.method == name}) > 1
    ]
    if not names:
        return None
    labels = table.labels
    with _figure(name, 4.8, 3.5) as (figure, made):
        axes = figure.subplots()
        for index, method in enumerate(names):
            mine = sorted((row for row in seen if row.method == method), key=lambda row: row.sparsity)
            x, y = [100 * row.sparsity for row in mine], [row.perplexity for row in mine]
            axes.plot(x, y, label=_label(labels[method]), ms=5.5, **_look(index))
        _log(axes, "y", [row.perplexity for row in seen])
        axes.set(xlabel="removed, % of prunable weights", ylabel="perplexity")
        _legend(axes)
    data = [(row.method, row.sparsity, row.perplexity) for row in seen if row.method in names]
    told = ", ".join(f"{labels[method]} {percent(sparsity)} {number(value)}" for method, sparsity, value in data)
    return made(f"Perplexity against sparsity by method: {told}.", ["method:", "sparsity", "perplexity"], data)


def heatmap(name: str, grid: Mapping[tuple[str, str], float]) -> Plot:
    """Sparsity by decoder block (a row for each) and kind of matrix (a column for each)."""
    blocks, kinds = (list(dict.fromkeys(place[axis] for place in grid)) for axis in (0, 1))
    low, high = min(grid.values()), max(grid.values())
    height = 1.6 + min(0.3, max(0.11, 3.6 / len(blocks)), 10 / len(blocks)) * len(blocks)
    with _figure(name, 4.8, height) as (figure, made):
        legend, axes = figure.subplots(2, 1, height_ratios=(0.11, height - 1.1))
        for (block, kind), sparsity in grid.items():
            place = kinds.index(kind) - 0.5, blocks.index(block) - 0.5
            axes.add_patch(Rectangle(place, 1, 1, fc=_shade((sparsity - low) / (high - low or 1)), ec=SURFACE, lw=1))
        axes.set(xlim=(-0.5, len(kinds) - 0.5), ylim=(len(blocks) - 0.5, -0.5), ylabel="decoder block")
        names = [_label(kind.removesuffix(".*").rpartition(".")[2]) for kind in kinds]
        axes.set_xticks(range(len(kinds)), names, rotation=35, ha="right", rotation_mode="anchor")
        every = max(1, len(blocks) // 10)
        axes.set_yticks(range(0, len(blocks), every), blocks[::every])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _shades(legend, low, high)
    (top, _), (least, _) = max(grid.items(), key=_second), min(grid.items(), key=_second)
    return made(
        f"Sparsity by block and kind of matrix, from {percent(low)} ({least[1]} of block {least[0]}) "
        f"to {percent(high)} ({top[1]} of block {top[0]}).",
        ["block:", "matrix:", "sparsity"],
        ((*place, sparsity) for place, sparsity in grid.items()),
    )


def descent(name: str, record: ControllerRecord) -> Plot | None:
    """The controller's loss at each step, and that on the held-out windows."""
    values, held = record.loss, record.held_out_loss
    if not any(map(math.isfinite, values)):
        return None
    with _figure(name, 4.8, 3.0) as (figure, made):
        axes = figure.subplots()
        axes.plot(range(1, len(values) + 1), values, color=SERIES[0], lw=1.3, label="each step", **_dots(values))
        if held:
            axes.plot(record.judged_at, held, "D-", color=SERIES[1], ms=5.5, label="held-out windows")
        axes.set(xlabel="step", ylabel=f"{record.objective}, {record.unit}", xlim=(-0.02 * len(values), None))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _legend(axes)
    told = f"; on held-out samples from {number(held[0])} to {number(min(held, key=_finite_first))} at best" if held else ""
    ends = f"from {number(values[0])} to {number(values[-1])}"
    judged = dict(zip(record.judged_at, held, strict=False))
    rows = [(float(step), dict(enumerate(values, 1)).get(step), judged.get(step)) for step in range(len(values) + 1)]
    says = f"The controller's {record.objective} over {len(values)} steps, {ends}{told}."
    return made(says, ["step", record.objective, "on held-out samples"], rows)


def flips(name: str, record: ControllerRecord) -> Plot | None:
    """The share of masks that each step flipped."""
    shares = [100 * share for share in record.flips]
    if not any(map(math.isfinite, shares)):
        return None
    with _figure(name, 4.8, 3.0) as (figure, made):
        axes = figure.subplots()
        axes.plot(range(1, len(shares) + 1), shares, color=SERIES[2], lw=1.3, **_dots(shares))
        axes.set(xlabel="step", ylabel="masks flipped, %", ylim=(0, None), xlim=(-0.02 * len(shares), None))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    first, last = percent(record.flips[0]), percent(record.flips[-1])
    says = f"Share of masks flipped by each of {len(shares)} steps, {first} at first and {last} at last."
    return made(says, ["step", "share of masks flipped"], ((float(step), share) for step, share in enumerate(record.flips, 1)))


@dataclass(frozen=True)
class Marker:
    """An accuracy with its standard error."""

    task: str
    series: str
    value: float
    error: float | None


def accuracies(name: str, bars: Sequence[Marker]) -> Plot | None:
    """Accuracies by task, a marker for each model, with standard errors."""
    bars = [bar for bar in bars if math.isfinite(bar.value)]
    if not bars:
        return None
    tasks, series = list(dict.fromkeys(bar.task for bar in bars)), list(dict.fromkeys(bar.series for bar in bars))
    step = min(0.24, 0.6 / len(series))
    with _figure(name, 4.8, 1.3 + len(tasks) * (0.3 + 0.16 * len(series))) as (figure, made):
        axes = figure.subplots()
        for index, one in enumerate(series):
            mine = [bar for bar in bars if bar.series == one]
            heights = [tasks.index(bar.task) + step * (index - (len(series) - 1) / 2) for bar in mine]
            errors = [100 * (bar.error or 0) for bar in mine]
            axes.errorbar(
                [100 * bar.value for bar in mine],
                heights,
                xerr=errors,
                fmt=MARKERS[index % 6],
                color=SERIES[index % len(SERIES)],
                ms=6,
                elinewidth=1.4,
                capsize=3,
                label=_label(one),
            )
        axes.set_yticks(range(len(tasks)), list(map(_label, tasks)))
        axes.set(ylim=(len(tasks) - 0.5, -0.5), xlabel="accuracy, %")
        axes.grid(axis="y", visible=False)
        _legend(axes)
    told = ", ".join(f"{bar.task} {bar.series} {percent(bar.value)}" for bar in bars)
    rows = ((bar.task, bar.series, bar.value, bar.error) for bar in bars)
    return made(f"Accuracy on tasks with standard errors: {told}.", ["task:", "model:", "accuracy", "± error"], rows)


@contextmanager
def _figure(
    name: str, width: float, height: float
) -> Iterator[tuple[Any, Callable[[str, Sequence[str], Iterable[Sequence[Any]]], Plot]]]:
    """A figure of a size in inches, and what makes a Plot of it and a sentence once it is drawn."""
    drawn = io.StringIO()

    def made(says: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Plot:
        cells = [list(map(_cell, row)) for row in rows]
        return Plot(_inline(drawn.getvalue(), name), says, Grid(name, list(columns), cells))

    settings: Any = dict(matplotlib.rcParamsDefault) | STYLE | {"svg.hashsalt": name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts count, not those here
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, made
        figure.savefig(drawn, format="svg", transparent=True)


def _cell(value: str | float | None) -> Cell:
    return value if isinstance(value, str) else NONE if value is None else (number(value), value)


def _inline(drawn: str, name: str) -> str:
    """What the SVG backend wrote, as an element of a page: no size, no fonts, the page's colours, ids of its own."""
    svg = drawn[drawn.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    head, _, rest = svg.partition(">")
    box = re.search(r'viewBox="[^"]+"', head)
    assert box
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", rest)
    rest = re.sub(r"font-family: [^;\"]*;? ?", "", rest)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)  # nothing refers to a group
    rest = re.sub(r' (d|x|y|transform)="[^"]*"', _rounded, rest)
    rest = re.sub(r"(?<=>)\s+(?=<)", "", rest)
    rest = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r"#0c0d([0-9a-f]{2})", _shaded, rest)
    rest = re.sub("|".join(VARIABLES), lambda found: VARIABLES[found[0]], rest)
    return f'<svg {box[0]} xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true">{rest}'


def _rounded(found: re.Match[str]) -> str:
    """A place to a hundredth of a pixel."""
    return re.sub(r"(?<=\d\.\d\d)\d+", "", re.sub(r"\s+", " ", found[0]))


def _shade(part: float) -> str:
    """The stand-in for a shade, ``part`` of the way from the lightest to the strongest."""
    return f"#0c0d{round(100 * part):02x}"


def _shaded(found: re.Match[str]) -> str:
    return f"color-mix(in oklab, var(--heat) {8 + 0.92 * int(found[1], 16):.0f}%, var(--surface))"


def _shades(axes: Any, low: float, high: float) -> None:
    """The legend of the shades."""
    for index in range(50):
        axes.add_patch(Rectangle((index / 50, 0), 1.1 / 50, 1, fc=_shade(index / 49), lw=0))
    axes.set(xlim=(0, 1), ylim=(0, 1), yticks=[])
    axes.set_xticks((0, 0.5, 1), [percent(low), percent((low + high) / 2), percent(high)])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _label(text: str) -> str:
    """A name, short enough to leave room for the plot."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
    return f" {text}" if text.startswith("_") else text  # a legend leaves those out


def _look(index: int) -> dict[str, Any]:
    """Marker and colour: the first six differ in both, thirty-six in one of them."""
    return {"marker": MARKERS[(index + index // len(SERIES)) % len(MARKERS)], "color": SERIES[index % len(SERIES)]}


def _log(axes: Any, along: str, values: Sequence[float]) -> None:
    """A logarithmic scale with ticks that read as numbers: 1, 2, 5 and their like, as many as are in the range."""
    axes.set(**{f"{along}scale": "log"})
    axis = getattr(axes, f"{along}axis")
    low, high = math.log10(min(values)), math.log10(max(values))
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if high - low < 0.6 else (1, 2, 5) if high - low < 3 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1, max(1, math.ceil((high - low) / 8)))
    ticks = [step * 10.0**power for power in powers for step in steps if power < 308]
    near = [tick for tick in ticks if low - 0.06 <= math.log10(tick) <= high + 0.06]
    axis.set_ticks(near if len(near) > 1 else [float(f"{end:.3g}") for end in sorted({min(values), max(values)})])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if 1e-3 < value < 1e6 else f"{value:.0e}"))
    axis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing; none for a single series."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, handlelength=1.4, columnspacing=1.4
        )


def _dots(values: Sequence[float]) -> dict[str, Any]:
    return {"marker": "o", "ms": 3.5} if len(values) < 60 else {}


def _finite_first(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _second(pair: tuple[Any, float]) -> float:
    return pair[1]
