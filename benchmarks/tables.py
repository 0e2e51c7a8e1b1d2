"""Writes the tables of docs and the README from benchmarks/results/*.json.

python benchmarks/tables.py
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ablations import VARIANTS
from common import ROOT, load
from every_type import Counts
from uniprune.comparison.results import Comparison
from uniprune.reporting.comparison import markdown
from uniprune.reporting.tables import bench_rows
from uniprune.speed.timing import Result

START, END = "<!-- {}: written by benchmarks/tables.py -->", "<!-- /{} -->"


def table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:  # what was not measured is no part of the docs
        raise ValueError(f"no rows for the table of {', '.join(head)}")
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def fill_lines(sentence: str) -> str:
    return textwrap.fill(sentence, 138, break_long_words=False, break_on_hyphens=False)


def number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.0f}"


def label(pattern: str, scope: str | None) -> str:
    return pattern if scope is None else f"{float(pattern):.0%} by {scope}"


PATTERNS = ("50%", "60%", "70%", "2:4", "4:8", "8:16", "6:8")
METHODS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "ria": "RIA",
    "stochria": "stochRIA",
    "fisher": "diagonal Fisher, one budget for the model",
    "fwanda": "Wanda and `--controller fisher`",
    "owl": "OWL",
    "sparsegpt": "SparseGPT (updates weights)",
    "sequential": "Wanda, `--sequential`",
    "refine": "Wanda, `--refine`",
    "paper": "published controller (`unipruning`)",
    "any": "**ours, one calibration for all**",
    "feedback": "**ours, calibrated for each**",
}

Curves = dict[str, dict[tuple[int, int], tuple[float, float]]]
"""By method and pattern, and by tokens in thousands and how many of them differ: perplexity and R."""

MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
PARTS = ("weights", "states", "masks", "working")  # of memory
KINDS = {
    "dense": "dense",
    "wanda": "2:4 by Wanda",
    "refine": "2:4 by `--refine`",
}


class Quality:
    """Rows of results/quality.json by method and pattern, those of seed 0 first: all tables but one are of that seed."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in sorted(rows, key=lambda row: row["seed"]):
            pattern = row["pattern"] if ":" in row["pattern"] else f"{float(row['pattern']):.0%}"
            self.rows.setdefault((row["method"], pattern), []).append(row)

    def value(self, method: str, pattern: str, column: str = "perplexity") -> float | None:
        """None where nothing was measured."""
        row = next((row for row in self.rows.get((method, pattern), []) if row["seed"] == 0), {})
        return row.get(column)

    @property
    def dense(self) -> dict[str, float]:
        return self.rows["dense", "0%"][0]

    def recovered(self, method: str, pattern: str, column: str = "perplexity") -> float | None:
        start, found = self.value("wanda", pattern, column), self.value(method, pattern, column)
        return self.gap(start, found, column) if start and found else None

    def gap(self, start: float, found: float, column: str = "perplexity") -> float:
        """R = (ln ppl_Wanda - ln ppl) / (ln ppl_Wanda - ln ppl_dense); start: Wanda's."""
        return math.log(start / found) / math.log(start / self.dense[column])

    def starts(self, pattern: str) -> dict[int, dict[str, Any]]:
        """Wanda's row of each seed."""
        return {row["seed"]: row for row in self.rows["wanda", pattern]}

    @property
    def patterns(self) -> list[str]:
        return [pattern for pattern in PATTERNS if any(key[1] == pattern for key in self.rows)]

    def methods(self) -> list[str]:
        return [method for method in METHODS if any(key[0] == method for key in self.rows)]

    def perplexities(self) -> str:
        lines = [["dense", *[number(self.dense["perplexity"])] * len(self.patterns)]]
        lines += [[METHODS[m], *(number(self.value(m, p)) for p in self.patterns)] for m in self.methods()]
        return table(["method", *self.patterns], lines)

    def gaps(self) -> str:
        shown = [m for m in self.methods() if m not in ("magnitude", "wanda")]
        lines = [[METHODS[m], *(number(self.recovered(m, p), 2) for p in self.patterns)] for m in shown]
        return table(["R", *self.patterns], lines)

    def shared(self) -> str:
        """What one calibration for all costs against one for each."""
        pairs = [(self.value("any", p), self.value("feedback", p)) for p in self.patterns]
        ratios = [f"{both / alone:.3f}" if both and alone else "" for both, alone in pairs]
        return table(["perplexity", *self.patterns], [["one calibration for all / one for each", *ratios]])

    def transfer(self) -> str:
        columns = [(p, c) for p in ("50%", "2:4") for c in ("perplexity", "articles", "answers")]
        names = {"perplexity": "WikiText-2", "articles": "articles", "answers": "answers"}
        lines = [["dense", *[number(self.dense[c]) for _, c in columns]]]
        lines += [[METHODS[m], *(number(self.value(m, p, c)) for p, c in columns)] for m in self.methods()]
        return table(["method", *(f"{p}, {names[c]}" for p, c in columns)], lines)

    def whole(self) -> str:
        """Of the rows that have the whole test text, and nothing else."""
        columns = ("full", "perplexity")
        dense = self.rows.get(("dense", "0%"), [])
        lines = [["dense", *(cell for c in columns for cell in (number(row[c]), ""))] for row in dense]
        for pattern in self.patterns if dense else ():
            for method in (m for m in self.methods() if (m, pattern) in self.rows):
                found = [(self.value(method, pattern, c), self.recovered(method, pattern, c)) for c in columns]
                cells = (cell for value, share in found for cell in (number(value), number(share, 2)))
                lines.append([f"{METHODS[method]}, {pattern}", *cells])
        return table(["method", "whole text, samples of 2048", "R", "24 samples of 512", "R"], lines)

    def curves(self, longer: Sequence[dict[str, Any]]) -> Curves:
        """Perplexity and R of the controller by thousands of tokens, and of those that differ; longer: what is no usual row."""
        found: Curves = {}
        for method, pattern in itertools.product(("feedback", "any"), ("2:4", "50%")):
            usual = [row for row in self.rows.get((method, pattern), []) if row["seed"] == 0]
            spec = pattern if ":" in pattern else "0.5"
            points = found[f"{METHODS[method]}, {pattern}"] = {}
            for row in [*usual, *(row for row in longer if (row["method"], row["pattern"], row["seed"]) == (method, spec, 0))]:
                tokens = round(row["tokens"] / 1000)
                fresh = round((row.get("fresh") or row["tokens"]) / 1000)
                points[tokens, fresh] = row["perplexity"], self.gap(self.starts(pattern)[0]["perplexity"], row["perplexity"])
        return found

    def costs(self) -> str:
        """Medians over calibration seeds of ratios to Wanda's row of the same seed; of the rows in their commonest type.
        Rows without seconds were had beside other work on the machine.

        Of the methods that go block by block, whose machine was another than Wanda's, only their ratio to each other.
        """
        starts, lines, by_block = self.starts("2:4"), [], ("refine", "sequential")
        for method in (method for method in self.methods() if method not in by_block):
            if rows := [row for row in self.rows.get((method, "2:4"), []) if row["seed"] in starts and row["seconds"]]:
                dtype = statistics.mode(row["dtype"] for row in rows)
                rows = [row for row in rows if row["dtype"] == dtype]
                ratios = [
                    f"{statistics.median(row[key] / starts[row['seed']][key] for row in rows):.1f}"
                    for key in ("seconds", "peak_bytes")
                ]
                lines.append([METHODS[method], f"{rows[0]['tokens']:,}", dtype, *ratios])
        body = table(["method, 2:4", "tokens", "type", "time / Wanda's", "peak memory / Wanda's"], lines)
        times = [self.value(method, "2:4", "seconds") for method in by_block]
        ratio = f"{times[0] / times[1]:.1f}" if times[0] and times[1] else "not measured"
        return f"{body}\n\nTime of `--refine` / of `--sequential` Wanda, seed 0: {ratio}."

    def seeds(self) -> str:
        lines = []
        for (method, pattern), rows in self.rows.items():
            if len(rows) > 1:
                values = [row["perplexity"] for row in rows]
                mean = math.exp(statistics.fmean(map(math.log, values)))
                starts = self.starts(pattern)
                gaps = [
                    self.gap(starts[row["seed"]]["perplexity"], row["perplexity"])
                    for row in rows
                    if row["seed"] in starts and method != "wanda"
                ]
                spread = f"{min(gaps):.3f} to {max(gaps):.3f}" if gaps else ""
                lines.append(
                    [f"{METHODS[method]}, {pattern}", str(len(rows)), *map(number, (mean, min(values), max(values))), spread]
                )
        return table(["method", "calibration seeds", "geometric mean", "lowest", "highest", "R"], lines)


def curve(columns: Curves) -> str:
    lines = []
    for tokens, fresh in sorted(set().union(*columns.values())):
        cells = (points.get((tokens, fresh)) for points in columns.values())
        name = f"{tokens}k" if fresh == tokens else f"{tokens}k, {fresh}k of them different"
        lines.append([name, *(f"{cell[0]:.1f} ({cell[1]:.2f})" if cell else "" for cell in cells)])
    return table(["tokens", *columns], lines)


def draw(file: Path, curves: Curves) -> None:
    """R against tokens, of which as many differ as C4's sample has; the same numbers give the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": file.name, "font.size": 9}):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, points in curves.items():
            line = {tokens: points[tokens, fresh][1] for tokens, fresh in sorted(points)}  # the most that differ come last
            axes.plot(list(line), list(line.values()), "o-", label=name.replace("*", ""), ms=4)
        axes.set(xscale="log", xlabel="calibration tokens", ylabel="R, share of the gap recovered")
        ticks = sorted({tokens for points in curves.values() for tokens, _ in points})
        axes.set_xticks(ticks, [f"{tick}k" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(file, metadata={"Date": None})


def ablations(results: dict[str, Any]) -> str:
    """In the order of the variants; those whose settings are no more come last."""
    order = {name: place for place, name in enumerate(VARIANTS)}
    rows = sorted(results["rows"], key=lambda row: order.get(row["name"], len(order)))
    lines = [[r["name"], r["pattern"], r["dtype"], number(r["perplexity"]), f"{r['held_out_kl']:.3f}"] for r in rows]
    return table(["variant", "pattern", "type", "perplexity (validation)", "held-out KL, nats a token"], lines)


PAGE = {"dense": "dense", "wanda": "Wanda", "ria": "RIA", "sparsegpt": "SparseGPT (updates weights)", "ours": "**ours**"}
TASKS = {"piqa": "acc_norm", "arc_easy": "acc_norm", "winogrande": "acc", "openbookqa": "acc_norm"}


def page(results: dict[str, Any]) -> str:
    """What each pruned model costs where people look; accuracies that differ from the dense one's (p < 0.01) have a star."""
    lines = []
    for row in sorted(
        results["rows"], key=lambda row: (["0", "0.5", "0.6", "2:4"].index(row["pattern"]), [*PAGE].index(row["method"]))
    ):
        pattern = (
            "" if row["method"] == "dense" else row["pattern"] if ":" in row["pattern"] else f"{float(row['pattern']):.0%}"
        )
        cells = [f"{PAGE[row['method']]}{', ' if pattern else ''}{pattern}", number(row["wikitext2"]), number(row["c4"])]
        near = row.get("closeness")
        cells += [f"{near['kl']:.3f}", f"{near['agreement']:.1%}"] if near else ["0", "100%"]
        for task, metric in TASKS.items():
            facts = row["tasks"][task]
            star = "*" if "against" in facts and facts["against"][metric]["p"] < 0.01 else ""
            cells.append(f"{100 * facts[metric]:.1f} ± {100 * facts[f'{metric}_stderr']:.1f}{star}")
        lines.append(cells)
    how = results["protocol"]
    texts = "; ".join(
        f"{name}: {text['windows']} of {text['available_windows']} samples" for name, text in how["texts"].items()
    )
    asked = ", ".join(f"{name} {count}" for name, count in how["tasks"].items())
    head = ["model", "WikiText-2", "C4", "KL", "agreement", *TASKS]
    return f"{texts}; questions: {asked}.\n\n{table(head, lines)}"


def peer(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        theirs = next(r for r in results["rows"] if r["pattern"] == row["pattern"] and r["system"].startswith("llm-comp"))
        ratios = [f"{row[key] / theirs[key]:.2f}" for key in ("perplexity", "seconds", "peak_bytes")]
        lines.append([f"{row['system']}, {row['pattern']}", f"{row['perplexity']:.2f}", *ratios])
    return table(["run", "perplexity", "perplexity ratio", "wall time ratio", "peak memory ratio"], lines)


def zeroshot(results: dict[str, Any]) -> str:
    def differ(row: dict[str, Any]) -> str:
        return ", ".join(f"{count} ({metric})" for metric, count in row["rows_that_differ"].items())

    lines = [
        [
            row["task"],
            f"{row['acc']:.3f}",
            f"{row['acc_norm']:.3f}" if "acc_norm" in row else "",
            differ(row),
            f"{row['largest_difference_nats']:.0e}",
        ]
        for row in results["rows"]
    ]
    ratio = f"lm-eval's processor time / ours, all four tasks: **{results['harness_seconds'] / results['seconds']:.2f}**"
    if "wall" in results:
        ratio += f"; wall time: **{results['harness_wall'] / results['wall']:.2f}**"
    return table(["task", "acc", "acc_norm", "rows that differ", "largest difference, nats"], lines) + f"\n\n{ratio}"


def tasks(results: dict[str, Any]) -> str:
    """Every task beside the harness's own, on rows made up in its format."""
    lines = []
    for row in results["rows"]:
        marks = [f"{row[f'{metric}_that_differ']} ({metric})" for metric in ("acc", "acc_norm", "flexible") if metric in row]
        marks += [f"{row['texts_that_differ']} (texts)"] if "texts_that_differ" in row else []
        nats = f"{row['largest_difference_nats']:.0e}" if "largest_difference_nats" in row else ""
        lines.append([row["task"], str(row["num_fewshot"]), str(row["requests_that_differ"]), ", ".join(marks), nats])
    judged = ", ".join(f"{one['differ']} of {one['pairs']} {name}" for name, one in results["judged"].items())
    head = ["format", "examples", "prompts that differ", "rows that differ", "largest difference, nats"]
    return table(head, lines) + f"\n\nTexts written by hand that are judged otherwise: {judged}."


def speed(results: dict[str, Any]) -> str:
    lines = [[f"Wanda's calibration, scores and masks, {p} / forward passes", f"{r:.2f}"] for p, r in results["local"].items()]
    for dtype, ratios in results["step"].items():
        lines += [[f"a step of the controller, {p}, {dtype} / bare passes", f"{r:.2f}"] for p, r in ratios.items()]
    lines.append(["bytes per weight that the controller keeps between steps", f"{results['state_bytes_per_weight']:.0f}"])
    lines += [[f"masks of {p} from a scores file, seconds", f"{s:.1f}"] for p, s in results["again_seconds"].items()]
    return table(["what", ""], lines)


def versions(results: dict[str, Any]) -> str:
    """A descent of this version beside the same of another."""
    lines = []
    for row in results["rows"]:
        this, other = row["this"], row["other"]
        quality = [f"{side[what]:{form}}" for what, form in (("kl", ".3f"), ("perplexity", ".1f")) for side in (this, other)]
        what = f"{row['pattern']}, {row['budget']:,} tokens, seed {row['seed']}"
        lines.append([what, row["other_version"], f"{row['seconds_ratio']:.2f}", *quality])
    return table(["descent", "other version", "seconds, this / other", "KL, this", "other", "perplexity, this", "other"], lines)


def defaults(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        start, best = row["held_out_loss"][0], row["best_held_out_loss"]
        takes = [lasting(row["seconds"]), f"{row['peak_bytes'] / 1e9:.1f} GB"]
        lines.append([MODELS[row["model"]], f"{row['prunable'] / 1e6:.0f}M", f"{row['tokens']:,}", *takes])
        lines[-1].append(f"{start:.2f} to {best:.2f}")
        lines[-1].append(f"{row['dense_perplexity']:.1f} to {row['perplexity']:.1f}" if "perplexity" in row else "")
        lines[-1].append(row["cpu"])
    heads = ["model", "prunable weights", "tokens descended on", "time, all in all", "peak memory", "held-out KL", "perplexity"]
    return table([*heads, "two cores of"], lines)


def types(results: dict[str, Any]) -> str:
    """How many types of models can be pruned, in a sentence."""
    planned, tried, whole = Counts.of(results)
    return fill_lines(
        f"Of the {len(results['plan'])} types of models that transformers {results['versions']['transformers']} has a causal "
        f"class or one of images and text for, hybrids and mixtures of experts included, {planned} can be pruned with "
        f"their default configuration, and {whole} of the {tried} that can be made small go through every step, from "
        "calibration to evaluation ([each of them, and why the others do not](docs/families.md))."
    )


def by_default(results: dict[str, Any]) -> str:
    """What default settings give, in a sentence."""
    found = " and ".join(f"{row['perplexity']:.1f} ({MODELS[row['model']]})" for row in reversed(results["rows"]))
    tokens = results["rows"][0]["tokens"]
    return fill_lines(
        f"With all settings at their defaults, {tokens:,} tokens of the builtin text, 2:4 has {found}: give text like what the "
        "model is for (`--text`), and more tokens (`--budget-tokens`)."
    )


def sizes(results: dict[str, Any]) -> str:
    names = {"folder": "bfloat16", "gguf": "GGUF"}
    lines = [
        [f"{names[r['kind']]}, {r['run']}", r["size"], f"{r['level']:.4f}", f"{r['of_size']:.4f}"] for r in results["rows"]
    ]
    return table(["run", "`--size`", "sparsity", "archive / size"], lines)


def choice(results: dict[str, Any]) -> str:
    lines = [[f"{float(level):.0%}", f"{ratio:.3f}"] for level, ratio in results["choice"].items()]
    return table(["sparsity, by row", "weights kept at random / the largest"], lines)


def measured(results: dict[str, Any]) -> str:
    """Peak memory of streamed runs."""
    lines = []
    for row in results["rows"]:
        if row["part"] in ("local", "step", "depth"):
            run = row.get("run", row["part"])
            model = f"{row['blocks']} blocks of width 1024" if "blocks" in row else f"{row['model'].upper()} weights"
            what = "Wanda 2:4" if run == "local" else "2:4, one step of the controller"
            lines.append([f"{model}, {what}", row["limit"], f"{row['peak_bytes'] / 1e9:.2f} GB", f"{row['seconds']:.0f} s"])
    return table(["run", "`--max-memory`", "peak", "time, all in all"], lines)


def ratios(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        if row["part"] == "sweep":
            lines.append(["streamed / resident calibration, SmolLM2, 64 samples", f"{row['ratio']:.2f}"])
            lines.append(["the same, the whole process", f"{row['process_ratio']:.2f}"])
            lines.append(["fraction of 2:4 mask bits that differ", f"{row['differing_bits']:.1e}"])
        elif row["part"] == "apply":
            lines.append(["throughput of `apply` / of `cp -r`, 3B weights", f"{row['ratio']:.2f}"])
        elif row["part"] == "ranks":
            run = "8 steps of the controller" if row["run"] == "feedback" else "Wanda"
            lines.append([f"2 processes of 1 thread / 1 of 2, {run}", f"{row['ratio']:.2f}"])
            lines.append(["fraction of 2:4 mask bits that differ", f"{row['differing_bits']:.1e}"])
        elif row["part"] == "versions":
            start = f"streamed 2:4, one step of 16,384 tokens, {row['model'].upper()} weights, this version / 3cca470"
            named = {"seconds": "whole process", "peak_bytes": "peak memory", "written_bytes": "bytes written, output included"}
            lines += [[f"{start}: {name}", f"{row[f'{key}_ratio']:.2f}"] for key, name in named.items()]
        elif row["part"] == "mask":
            what = f"`mask` of SmolLM2, {row['run']}, start-up included, this version / 3cca470"
            lines.append([what, f"{row['seconds_ratio']:.2f}"])
    return table(["what", ""], lines)


def forecasts(results: dict[str, Any]) -> str:
    def gb(value: float) -> str:
        return f"{value / 1e9:,.0f} GB" if value >= 1e10 else f"{value / 1e9:.1f} GB"

    executions = {"local": ("resident", "streamed"), "step": ("resident", "recomputed", "offloaded", "streamed")}
    runs = {"local": "Wanda", "step": "controller"}
    head = [f"{runs[run]}, {execution}" for run, names in executions.items() for execution in names]
    lines = []
    for row in results["executions"]:
        found = [row[run][execution] for run, names in executions.items() for execution in names]
        lines.append([row["model"], *(gb(one["memory"]) for one in found), gb(found[-2]["host"]), gb(found[-1]["disk"])])
    return table(["Llama of", *head, "offloaded: host", "streamed: disk meanwhile"], lines)


def shared(results: dict[str, Any]) -> str:
    """Processes that divide the controller's state."""
    lines = []
    for row in (row for row in results["rows"] if row["part"] == "shared"):
        lines.append([str(row["processes"]), f"{row['peak_bytes'] / 1e9:.2f} GB"])
    return table(["processes", "peak of each"], lines)


def launches(results: dict[str, Any]) -> str:
    """What one step of the controller has a GPU do."""
    lines = []
    for row in results["rows"]:
        before = f"{row['other']['launches']:,}" if "other" in row else ""
        ratio = f"{row['ratio']:.3f}" if "other" in row else ""
        blocks = f"{row['blocks']} blocks of an 8B" if row["size"] == "8b" else f"{row['blocks']} tiny blocks"
        run = f"{blocks}, {row['target']}, {row['execution']}"
        lines.append([run, f"{row['launches']:,}", before, ratio, f"{row['syncs']:,} ({row['syncs_a_matrix']:.2f} a matrix)"])
    return table(["one step", "kernels launched", "at 3cca470", "ratio", "waits of the host"], lines)


def recomputed(results: dict[str, Any]) -> str:
    """Activations computed again, against activations kept."""
    lines = []
    for row in results["rows"]:
        kept, again = row["resident"], row["recomputed"]
        model = f"{row['parameters'] / 1e9:.2g}B weights in {row['blocks']} blocks, {row['tokens']:,} tokens a step"
        peaks = [f"{side['peak_bytes'] / 1e9:.2f} GB" for side in (kept, again)]
        forecast = [f"{side['resident_bytes'] / side['forecast_bytes']:.2f}" for side in (kept, again)]
        same = "yes" if row["same_masks"] else "no"
        lines.append([model, *peaks, f"{row['memory_ratio']:.2f}", f"{row['time_ratio']:.2f}", same, " / ".join(forecast)])
    head = ["Llama of random weights, bfloat16, CPU", "kept", "computed again", "ratio", "time, ratio", "same masks"]
    return table([*head, "peak / forecast, of each"], lines)


def peaks(results: dict[str, Any]) -> str:
    """What was forecast for architectures, and what was taken."""
    lines = []
    for row in results["rows"]:
        line = [f"{row['kind']}, {row['parameters'] / 1e6:.0f}M weights"]
        for execution in ("resident", "recomputed"):
            peak, forecast = (row[execution][name] for name in ("peak_bytes", "forecast_bytes"))
            line += [f"{peak / 1e9:.2f} GB", f"{peak / forecast:.2f}"]
        lines.append(line)
    head = ["random weights, bfloat16, CPU, 4,096 tokens a step", "resident: peak", "peak / forecast"]
    return table([*head, "recomputed: peak", "peak / forecast"], lines)


def lasting(seconds: float) -> str:
    for unit, size, enough in (("h", 3600, 7200), ("min", 60, 120)):
        if seconds >= enough:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"


def cards(results: dict[str, Any]) -> str:
    """The controller on some GPUs: how it would be run, and what that takes."""
    lines = []
    for row in results["cards"]:
        parts = {name: f"{size / 1e9:.1f}" for name, size in row["parts"].items() if size}
        steps = {tokens: -(-tokens // row["tokens"]) for tokens in (131_072, 2_000_000)}
        times = [lasting(row["seconds"] * count) for count in (1, *steps.values())]
        lines.append(
            [
                f"{row['model']}, {row['card']}",
                row["execution"],
                f"{row['tokens']:,}",
                *(f"{row['memory'] / 1e9:.0f} GB", " + ".join(parts.get(name, "0") for name in PARTS)),
                f"{row['host'] / 1e9:.0f} GB" if row["host"] else "",
                *(f"{row[way] / 1e9:,.0f} GB" if row[way] else "" for way in ("read", "written")),
                *times,
                f"{row['written'] * steps[131_072] / 1e12:.1f} TB" if row["written"] else "",
            ]
        )
    head = [
        "Llama of, GPU",
        "execution",
        "tokens a step",
        "memory",
        "parts of it",
        "host",
        "read a step",
        "written a step",
        "a step",
    ]
    return table([*head, "131k tokens", "2M tokens", "written to SSD, 131k tokens"], lines)


def constraints(results: dict[str, Any]) -> str:
    """What one budget, mixed patterns and permuted channels bring."""
    lines = [[f"{float(row['level']):.0%} by {row['scope']}", f"{row['perplexity']:.1f}"] for row in results.get("scope", [])]
    for row in results.get("mixed", []):
        lines.append([f"{row['masks']}: {row['sparsity']:.1%}, {len(row['dense'])} of 210 dense", f"{row['perplexity']:.1f}"])
    for row in results.get("permutation", []):
        if "model" in row:
            model = {"dense": "channels as they are", "permuted": "channels permuted"}[row["model"]]
            lines += [[f"{name}, {model}", f"{row[key]:.1f}"] for key, name in KINDS.items() if key in row]
    return table(["masks", "perplexity"], lines)


def budgets(results: dict[str, Any]) -> str:
    """What budgets cost."""
    lines = []
    for row in results.get("levels", []):
        lines.append([f"masks of {len(row['levels'])} sparsities from one scores file, seconds", f"{row['seconds']:.0f}"])
    for row in results.get("threshold", []):
        name = f"one threshold over {row['scores']:.0e} scores in a file".replace("e+0", "e")
        lines.append([f"{name} / reading the file once", f"{row['ratio']:.2f}"])
        lines.append([f"{name}, peak memory, imports included", f"{row['peak_bytes'] / 1e6:.0f} MB"])
    for row in results.get("permutation", [])[:1]:
        for kind, kept in row["kept"].items():
            matrices = "other matrices" if kind == "others" else f"`{kind}`"
            lines.append([f"scores that 2:4 keeps in {matrices}, channels permuted", f"{kept:+.2%}"])
        lines.append(["search for the permutation / the calibration for it", f"{row['search'] / row['calibrate']:.1f}"])
    return table(["what", ""], lines)


def archives(results: dict[str, Any]) -> str:
    names = {"0.5": "50 %", "2:4": "2:4"}
    rows = {
        "archive, of the weights file": lambda r: f"{r['of_weights']:.3f}",
        "the same without `scaled` (see below)": lambda r: f"{r['unscaled_of_weights']:.3f}",
        "the same of `zstd -3`, each file by itself": lambda r: f"{r['usual_of_weights']:.3f}",
        "archive, of the folder": lambda r: f"{r['of_folder']:.3f}",
        "prunable matrices, of themselves": lambda r: f"{r['matrices']:.3f}",
        "other tensors (mostly the embedding), of themselves": lambda r: f"{r['other_tensors']:.3f}",
        "speed against copying and `zstd -3` on two cores: seconds, CPU seconds": lambda r: (
            f"{r['speed']:.1f} x, {r['cpu_speed']:.1f} x"
        ),
        "memory on top of the imports, MB: pack, unpack": lambda r: ", ".join(
            f"{r['peak_bytes'][key] / 1e6:.0f}" for key in ("pack", "unpack")
        ),
    }
    found = results["patterns"]
    return table(["", *(names[p] for p in found)], [[name, *(show(r) for r in found.values())] for name, show in rows.items()])


def fuzz(results: dict[str, Any]) -> str:
    """Cases, refusals and failures by reader of files."""
    lines = [
        [r["reader"], f"{r['cases']:,}", f"{r['refused'] / r['cases']:.0%}", str(r["failures"]), f"{r['slowest'] * 1e3:.0f}"]
        for r in results["rows"]
    ]
    lines.append(["all", f"{results['cases']:,}", "", str(sum(r["failures"] for r in results["rows"])), ""])
    seconds = sum(r["seconds"] for r in results["rows"])
    grown = (
        f"Peak memory grew by {results['peak_growth_bytes'] / 1e6:.0f} MB, imports of readers included; {seconds:.0f} s in all."
    )
    return table(["reader", "mutated files", "refused", "failures", "slowest, ms"], lines) + f"\n\n{grown}"


def kills(results: dict[str, Any]) -> str:
    """Kills and ends by command."""
    lines = [[r["command"], r["moments"], str(r["kills"]), str(r["ends"])] for r in results["rows"]]
    lines.append(["all", "", f"{results['kills']:,}", str(sum(r["ends"] for r in results["rows"]))])
    return table(["command", "moments", "kills", "ends, all with the right bytes"], lines)


def examples(results: dict[str, Any]) -> str:
    """How many properties were tried on how many examples."""
    failures = len(results["failures"])
    return f"{results['properties']} properties, up to {results['examples_each']:,} examples each: {failures} failures."


def comparison(results: dict[str, Any]) -> str:
    """What ``compare`` takes beside its parts and after kills, and the table."""
    parts, lines, said = results["seconds_of_parts"], [], []
    runs = {"in one go": "seconds", "its parts": "seconds_of_parts", "killed and resumed": "seconds_killed_and_resumed"}
    for name, key in runs.items():
        if key in results:
            lines.append([name, f"{results[key]:.0f}", f"{results[key] / parts:.2f}"])
    said.append(f"Perplexities that differ from those of the parts: {results['differ_alone']}.")
    if kills := results.get("killed_with_rows"):
        rows = " and ".join(map(str, kills))
        said.append(f"It was killed in the middle of a row when {rows} rows stood; none of these was made again.")
        said.append(f"Perplexities that differ from those of the table in one go: {results['differ_resumed']}.")
    body = table(["run", "seconds", "of its parts"], lines)
    return f"{body}\n\n{' '.join(said)}\n\n{markdown(Comparison(**results['table']))}"


def report(results: dict[str, Any]) -> str:
    """Size and first paint of a page."""
    paints = ", ".join(f"{value:.2f} s at {width}" for width, value in results["first_paint_seconds"].items())
    return (
        f"The page of five methods at two sparsities ([compare.md](compare.md)) has {results['bytes'] / 1e3:.0f} kB; Chromium "
        f"first paints it after {paints} pixels (median of {results['rounds']})."
    )


def decoder(results: dict[str, Any]) -> str:
    """Speeds of whole decoder passes next to those of their products alone."""
    products = {(r["batch"], r["sparsity"]): r for r in results["smollm2"]["results"] if r["kernel"] == "CSR"}
    lines = []
    for row in results["decoder"]:
        alone = products[row["batch"], row["sparsity"]]["speedup"]
        lines.append([f"{row['sparsity']:.0%}, batch {row['batch']}", f"{alone:.2f}", f"{row['speedup']:.2f}"])
    return table(["CSR, float32", "products", "decoder"], lines)


RUNTIME = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}


def accelerated(results: dict[str, Any]) -> str:
    """Speed-ups of `uniprune.accelerate` over the dense model in the same type, with one and two threads."""
    found: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault((row["model"], row["dtype"], row["pattern"]), {})[row["threads"]] = row
    rows = []
    for (model, dtype, pattern), by_threads in found.items():
        sides = [by_threads[threads] for threads in sorted(by_threads)]
        speeds = [" / ".join(f"{side[part]['speedup']:.2f}" for side in sides) for part in ("decode", "products", "prefill")]
        limit = " / ".join(f"{side['limit'] / side['products']['sparse']:.0%}" for side in sides)
        memory = sides[0]["memory"]
        sizes = [f"{memory['matrices']:.2f}", f"{memory['model']:.2f}"]
        rows.append([RUNTIME[model], dtype, label(pattern, None if ":" in pattern else "row"), *speeds, limit, *sizes])
    head = ["model", "type", "mask", "decoding", "products", "prompt", "of the limit", "matrices", "model"]
    return table(head, rows)


def dense_types(results: dict[str, Any]) -> str:
    """Tokens a second of the dense model in each type, and of the best pruned rows."""
    rows = []
    for entry in results["dense"]:
        chosen = [row for row in results["rows"] if (row["model"], row["threads"]) == (entry["model"], entry["threads"])]
        best = {
            pattern: min(row["decode"]["sparse"] for row in chosen if row["pattern"] == pattern) for pattern in ("2:4", "0.7")
        }
        seconds = [*(entry["seconds"][dtype] for dtype in ("float32", "bfloat16", "float16")), *best.values()]
        rows.append([RUNTIME[entry["model"]], str(entry["threads"]), *(f"{1 / value:.0f}" for value in seconds)])
    return table(["tokens a second", "threads", "float32", "bfloat16", "float16", "2:4, best type", "70%, best type"], rows)


def faster(results: dict[str, Any]) -> str:
    """How much faster text is generated at 2:4, in a sentence."""
    rows = [row for row in results["rows"] if row["pattern"] == "2:4"]
    alike = [row["decode"]["speedup"] for row in rows]
    best = []
    for entry in results["dense"]:
        chosen = [row for row in rows if (row["model"], row["threads"]) == (entry["model"], entry["threads"])]
        best.append(min(entry["seconds"].values()) / min(row["decode"]["sparse"] for row in chosen))
    return fill_lines(
        f"Measured on one CPU, a model at 2:4 generates text {min(best):.1f} to {max(best):.1f} times as fast with "
        f"`uniprune.accelerate` as the dense model in its fastest type, and {min(alike):.1f} to {max(alike):.1f} times as fast "
        "as in the same type ([docs/runtime.md](docs/runtime.md))."
    )


def packing(results: dict[str, Any]) -> str:
    rows = [
        [
            RUNTIME[row["model"]],
            f"{row['ratio']:.2f}",
            f"{row['throughput_to_copying']:.2f}",
            f"{row['open_seconds']:.2f} s",
            f"{row['resident']['packed'] / row['resident']['dense']:.2f}",
        ]
        for row in results["packing"]
    ]
    return table(["50 %, bfloat16", "size on disk", "packing, of a copy's speed", "opening", "resident memory"], rows)


def same_words(results: dict[str, Any]) -> str:
    found = [row["words"] for row in results["rows"] if "words" in row]
    same, prompts = (sum(words[part] for words in found) for part in ("same_text", "prompts"))
    error = max(words["largest_error"] for words in found)
    return (
        f"In float32, with SmolLM2, {same} of {prompts} greedy texts are the same token by token; logits are within "
        f"{error:.0e} of the largest."
    )


def adapters(results: dict[str, Any]) -> str:
    """Which adapters keep zeros; those that could not be tried are named below."""

    def share(value: float) -> str:
        return f"{100 * value:.0f}%"

    tried = [row for row in results["rows"] if "error" not in row]
    lines = [
        [row["adapter"], share(row["zeros"]), share(row["lost"]), share(row["lost_masked"])]
        for row in sorted(tried, key=lambda row: (-round(row["zeros"], 2), round(row["lost"], 2)))
    ]
    body = table([f"adapter (PEFT {results['peft']})", "zeros", "lost", "lost, with `KeepZeros`"], lines)
    failed = ", ".join(f"{row['adapter']} ({row['error']})" for row in results["rows"] if "error" in row)
    return body + (f"\n\nCould not be tried: {failed}." if failed else "")


def masks(results: dict[str, Any]) -> str:
    """Masks exchanged with other tools: of how many matrices the masks, and the model that the tool makes, are equal."""

    def of(row: dict[str, Any], what: str) -> str:
        return f"{row[what]} of {row['matrices']}" if what in row else ""

    rows = sorted(results["rows"], key=lambda row: (row["format"], row["tool"], row["direction"] == "export"))
    ways = {"import": "it wrote, read here", "export": "written here, it read"}
    lines = [
        [f"{row['tool']}: `{row['file']}`", ways[row["direction"]], of(row, "masks_equal"), of(row, "models_equal")]
        for row in rows
    ]
    return table(["tool and file", "way", "equal masks", "equal pruned weights"], lines)


TUNED = {
    "dense": "dense",
    "pruned": "2:4 by Wanda",
    "tuned": "all kept weights trained",
    "merged": "LoRA trained and merged",
}


def finetune(results: dict[str, Any]) -> str:
    lines = [[TUNED[row["model"]], number(row["perplexity"]), f"{row['sparsity']:.1%}"] for row in results["rows"]]
    return table(["model", "perplexity", "zeros"], lines)


def share(value: float) -> str:
    """A share in percent; 0 and 100 only if it is exactly that."""
    if 0.9995 <= value < 1:
        return "> 99.9%"
    return "< 0.1%" if 0 < value < 0.0005 else f"{value:.1%}".replace(".0%", "%")


def quantised(results: dict[str, Any]) -> str:
    """What formats leave of a pruned model's zeros, and what they cost it."""
    plain = results["unquantised"]
    lines = [["not quantised", "16", "", "", "", "", *(f"{plain[name]:.1f}" for name in ("dense", "50%", "2of4"))]]
    for row in sorted(results["rows"], key=lambda row: -min(found["zeros_kept"] for found in row["kept"].values())):
        half, two = row["kept"]["50%"], row["kept"]["2of4"]
        facts = [half["zeros_kept"], two["zeros_kept"], two["groups_of_2_in_4"], two["sparsity"]]
        seen = row["perplexity"]
        costs = [f"{seen[name]:.1f}" if seen.get(name) else "NaN" if seen else "" for name in ("dense", "50%", "2of4")]
        library = {"llamacpp": "llama.cpp", "llmcompressor": "LLM Compressor"}.get(row["library"], row["library"])
        lines.append([f"{library}: {row['format']}", f"{row['bits']:.3g}", *map(share, facts), *costs])
    head = ["library: format", "bits a weight", "zeros kept, 50%", "zeros kept, 2:4", "groups still 2:4", "zeros in all, 2:4"]
    return table([*head, "perplexity, dense", "50%", "2:4"], lines)


def readers(results: dict[str, Any]) -> str:
    """Who opens a pruned checkpoint, and whether it computes the same."""
    lines = []
    for row in results["rows"].values():
        if "error" in row:
            lines.append([row["what"], row.get("versions", ""), f"no: {row['error']}", "", ""])
            continue
        versions = ", ".join(f"{name} {version.split('+')[0]}" for name, version in row["versions"].items())
        tokens = {True: "the same", False: "other"}.get(row.get("same_tokens"), "")  # type: ignore[arg-type]
        nats = f"{row['nats_more']:+.0e}" if row.get("nats_more") else "0" if "nats_more" in row else ""
        text = "" if nats else "the same" if row["same_text"] else "other"
        lines.append([row["what"], versions, tokens, nats, text])
    return table(
        ["reader", "versions", "tokens of the prompt", "loss more than transformers', nats", "generated text, without a loss"],
        lines,
    )


def fill(path: Any, sections: dict[str, str]) -> None:
    text = path.read_text()
    for name, body in sections.items():
        start, end = START.format(name), END.format(name)
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.S)
        text = pattern.sub(lambda _, s=start, b=body, e=end: f"{s}\n\n{b}\n\n{e}", text)
    path.write_text(text)


def ties(results: dict[str, Any]) -> str:
    share = results["tied"] / results["groups"]
    return (
        f"In {share:.0%} of the groups of 2:4 the second and the third largest weight are exactly equal, for this model was\n"
        "dequantised from 4 bits (`benchmarks/ties.py`): magnitude cannot tell them apart and keeps the lower index."
    )


SOURCES = {
    "c4": "C4",
    "articles": "articles",
    "code": "code",
    "instructions": "instructions",
    "self": "what the model writes",
    "mixture": "a fifth of each",
    "all": "all five texts",
}


def sources(results: dict[str, Any]) -> str:
    """For each method the perplexity on each text by what it was calibrated on, and how far the mixture is from the best."""
    dense, rows = results["dense"], results.get("rows", [])
    texts = [name for name in SOURCES if name in dense]
    lines = [["dense", "", *(number(dense[text]["perplexity"]) for text in texts)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["calibration"]: row for row in rows if row["method"] == method}
        values = {name: [row["texts"][text]["perplexity"] for text in texts] for name, row in found.items()}
        best = [min(column) for column in zip(*(values[name] for name in texts if name in values), strict=True)]
        for name in (name for name in SOURCES if name in values):
            pairs = zip(values[name], best, strict=True)
            cells = [f"**{number(value)}**" if value == least else number(value) for value, least in pairs]
            tokens = f"{found[name]['tokens']:,} tokens"
            lines.append([f"{METHODS[method].strip('*')}, {tokens}", SOURCES[name], *cells])
        for mixture in ("mixture", "all"):
            if mixture in values and values.keys() >= set(texts):
                lost = (f"{value / least - 1:+.0%}" for value, least in zip(values[mixture], best, strict=True))
                lines.append([METHODS[method].strip("*"), f"{SOURCES[mixture]}, against the best single one", *lost])
    head = ["2:4", "calibrated on", *(SOURCES[text] for text in texts)]
    return table(head, lines)


def main() -> None:
    sections = {}
    if results := load("quality"):
        quality = Quality(results["rows"])
        names = ("perplexities", "gaps", "shared", "transfer", "costs", "seeds")
        sections = {name: getattr(quality, name)() for name in names} | {"whole": Quality(results["whole"]).whole()}
        curves = quality.curves(results["curve"])
        sections["curve"] = curve(curves)
        draw(ROOT / "docs" / "curve.svg", curves)
    if results := load("quality_qwen"):
        second = Quality(results["rows"])
        sections |= {f"qwen-{name}": getattr(second, name)() for name in ("perplexities", "gaps", "costs")}
        sections["qwen-curve"] = curve(second.curves(results["curve"]))
    writers = {"sources": sources, "ties": ties, "page": page, "ablations": ablations, "peer": peer}
    writers |= {"zeroshot": zeroshot, "tasks": tasks, "speed": speed, "versions": versions, "defaults": defaults}
    for name, write in writers.items():
        if results := load(name):
            sections[name] = write(results)
    soak = load("soak")
    for name, part, write in (("fuzz", "files", fuzz), ("kills", "kills", kills), ("examples", "examples", examples)):
        if part in soak:
            sections[name] = write(soak[part])
    if results := load("budget"):
        sections |= {"constraints": constraints(results), "budgets": budgets(results)}
    if results := load("bench"):
        for name in ("smollm2", "wide"):
            head, *rows = bench_rows([Result(**row) for row in results[name]["results"]])
            sections[f"bench-{name}"] = table(head, rows)
        sections["bench-decoder"] = decoder(results)
    if results := load("size"):
        sections |= {"sizes": sizes(results), "choice": choice(results)}
    for name in ("results", "experiments"):
        fill(ROOT / "docs" / f"{name}.md", sections)
    if results := load("peer_masks"):
        fill(ROOT / "docs" / "masks.md", {"masks": masks(results)})
    tuning = {"adapters": adapters, "finetune": finetune}
    fill(ROOT / "docs" / "finetuning.md", {name: write(found) for name, write in tuning.items() if (found := load(name))})
    if results := load("archive"):
        fill(ROOT / "docs" / "archive.md", {"sizes": archives(results)})
    if results := load("comparison"):
        fill(ROOT / "docs" / "compare.md", {"comparison": comparison(results)})
    if results := load("report"):
        fill(ROOT / "docs" / "report.md", {"report": report(results)})
    if results := load("scale"):
        fill(ROOT / "docs" / "scaling.md", {"measured": measured(results), "ratios": ratios(results)})
        fill(ROOT / "docs" / "devices.md", {"shared": shared(results)})
    if results := load("forecasts"):
        fill(ROOT / "docs" / "scaling.md", {"forecasts": forecasts(results)})
        fill(ROOT / "docs" / "devices.md", {"cards": cards(results)})
    if results := load("launches"):
        fill(ROOT / "docs" / "devices.md", {"launches": launches(results)})
    if results := load("peaks"):
        fill(ROOT / "docs" / "scaling.md", {"peaks": peaks(results)})
    if results := load("recompute"):
        fill(ROOT / "docs" / "scaling.md", {"recomputed": recomputed(results)})
    if results := load("runtime"):
        parts = {"accelerated": accelerated(results), "dense-types": dense_types(results), "packing": packing(results)}
        parts["words"] = same_words(results)
        fill(ROOT / "docs" / "runtime.md", parts)
    for name, page_of, write in (("quantise", "quantisation", quantised), ("loads", "runtime", readers)):
        if results := load(name):
            fill(ROOT / "docs" / f"{page_of}.md", {name: write(results)})
    sentences = {
        "types": types(load("families")),
        "by-default": by_default(load("defaults")),
        "faster": faster(load("runtime")),
    }
    fill(ROOT / "README.md", sections | sentences | {"results": sections["perplexities"]})


if __name__ == "__main__":
    main()
