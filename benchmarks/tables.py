"""Writes the tables of docs/results.md and of the README from benchmarks/results/*.json.

python benchmarks/tables.py
"""

from __future__ import annotations

import math
import re
from typing import Any

from common import ROOT, load

START, END = "<!-- {}: written by benchmarks/tables.py -->", "<!-- /{} -->"


def table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "Not run yet."
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def label(pattern: str, scope: str | None) -> str:
    return pattern if scope is None else f"{float(pattern):.0%} by {scope}"


PATTERNS = ("50%", "60%", "70%", "2:4", "4:8")
METHODS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "ria": "RIA",
    "stochria": "stochRIA",
    "fisher": "Fisher, one budget for the model",
    "owl": "OWL",
    "sparsegpt": "SparseGPT (updates weights)",
    "sequential": "Wanda, `--sequential`",
    "refine": "ours, `--refine`",
    "paper": "published controller (`paper`)",
    "any": "**ours, one calibration for all**",
    "feedback": "**ours, calibrated for each**",
}


class Quality:
    """The rows of results/quality.json by method and pattern, each a mean over seeds."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in results["rows"]:
            pattern = row["pattern"] if ":" in row["pattern"] else f"{float(row['pattern']):.0%}"
            self.rows.setdefault((row["method"], pattern), []).append(row)

    def mean(self, method: str, pattern: str, column: str = "perplexity") -> float | None:
        """Geometric over seeds; None where nothing was measured."""
        values = [row[column] for row in self.rows.get((method, pattern), []) if column in row]
        return math.exp(sum(map(math.log, values)) / len(values)) if values else None

    @property
    def dense(self) -> dict[str, float]:
        return self.rows["dense", "0%"][0]

    def recovered(self, method: str, pattern: str) -> float | None:
        """R = (ln ppl_Wanda - ln ppl) / (ln ppl_Wanda - ln ppl_dense)."""
        start, found = self.mean("wanda", pattern), self.mean(method, pattern)
        return math.log(start / found) / math.log(start / self.dense["perplexity"]) if start and found else None

    def methods(self) -> list[str]:
        return [method for method in METHODS if any(key[0] == method for key in self.rows)]

    def perplexities(self) -> str:
        lines = [["dense", *[number(self.dense["perplexity"])] * len(PATTERNS)]]
        lines += [[METHODS[m], *(number(self.mean(m, p)) for p in PATTERNS)] for m in self.methods()]
        return table(["method", *PATTERNS], lines)

    def gaps(self) -> str:
        def share(value: float | None) -> str:
            return "" if value is None else f"{value:.2f}"

        shown = [m for m in self.methods() if m not in ("magnitude", "wanda")]
        return table(["R", *PATTERNS], [[METHODS[m], *(share(self.recovered(m, p)) for p in PATTERNS)] for m in shown])

    def transfer(self) -> str:
        columns = [(p, c) for p in ("50%", "2:4") for c in ("perplexity", "articles", "answers")]
        names = {"perplexity": "WikiText-2", "articles": "articles", "answers": "answers"}
        lines = [["dense", *[number(self.dense[c]) for _, c in columns]]]
        lines += [[METHODS[m], *(number(self.mean(m, p, c)) for p, c in columns)] for m in self.methods()]
        return table(["method", *(f"{p}, {names[c]}" for p, c in columns)], lines)

    def whole(self) -> str:
        lines = [["dense", number(self.dense["full"]), number(self.dense["perplexity"])]] if "full" in self.dense else []
        for method in self.methods():
            for pattern in PATTERNS:
                if value := self.mean(method, pattern, "full"):
                    lines.append([f"{METHODS[method]}, {pattern}", number(value), number(self.mean(method, pattern))])
        return table(["method", "whole text, windows of 2048", "24 windows of 512"], lines)

    def costs(self) -> str:
        lines = []
        for (method, pattern), rows in self.rows.items():
            if method in METHODS and pattern == "2:4":
                start = self.rows["wanda", "2:4"][0]
                ratios = [f"{rows[0][key] / start[key]:.1f}" for key in ("seconds", "peak_bytes")]
                lines.append([METHODS[method], f"{rows[0]['tokens']:,}", *ratios])
        return table(["method, 2:4", "tokens", "time / Wanda's", "peak memory / Wanda's"], lines)

    def seeds(self) -> str:
        lines = []
        for (method, pattern), rows in self.rows.items():
            if len(rows) > 1:
                values = [row["perplexity"] for row in rows]
                lines.append([f"{METHODS[method]}, {pattern}", str(len(rows)), number(min(values)), number(max(values))])
        return table(["method", "calibration seeds", "lowest", "highest"], lines)


def ablations(results: dict[str, Any]) -> str:
    lines = [[r["name"], r["pattern"], number(r["perplexity"]), f"{r['held_out_kl']:.3f}"] for r in results["rows"]]
    return table(["variant", "pattern", "perplexity (validation)", "held-out KL, nats a token"], lines)


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
    ratio = f"lm-eval's time / ours, all four tasks: **{results['harness_seconds'] / results['seconds']:.2f}**"
    return table(["task", "acc", "acc_norm", "rows that differ", "largest difference, nats"], lines) + f"\n\n{ratio}"


def speed(results: dict[str, Any]) -> str:
    lines = [[f"Wanda's calibration, scores and masks, {p} / forward passes", f"{r:.2f}"] for p, r in results["local"].items()]
    for dtype, ratios in results["step"].items():
        lines += [[f"a step of the controller, {p}, {dtype} / bare passes", f"{r:.2f}"] for p, r in ratios.items()]
    lines.append(["bytes per weight that the controller keeps between steps", f"{results['state_bytes_per_weight']:.0f}"])
    lines += [[f"masks of {p} from a scores file, seconds", f"{s:.1f}"] for p, s in results["again_seconds"].items()]
    return table(["what", ""], lines)


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
            lines.append(["streamed / resident calibration, SmolLM2, 64 windows", f"{row['ratio']:.2f}"])
            lines.append(["the same, the whole process", f"{row['process_ratio']:.2f}"])
            lines.append(["fraction of 2:4 mask bits that differ", f"{row['differing_bits']:.1e}"])
        elif row["part"] == "apply":
            lines.append(["throughput of `apply` / of `cp -r`, 3B weights", f"{row['ratio']:.2f}"])
        elif row["part"] == "ranks":
            run = "8 steps of the controller" if row["run"] == "feedback" else "Wanda"
            lines.append([f"2 processes of 1 thread / 1 of 2, {run}", f"{row['ratio']:.2f}"])
            lines.append(["fraction of 2:4 mask bits that differ", f"{row['differing_bits']:.1e}"])
    return table(["what", ""], lines)


def forecasts(results: dict[str, Any]) -> str:
    def gb(value: float) -> str:
        return f"{value / 1e9:,.0f} GB" if value >= 1e10 else f"{value / 1e9:.1f} GB"

    names = ("local_resident", "local_streamed", "step_resident", "step_streamed", "step_scratch")
    rows = [row for row in results["rows"] if row["part"] == "forecast"]
    head = ["Llama of", "Wanda, whole", "Wanda, streamed", "controller, whole", "controller, streamed", "its disk meanwhile"]
    return table(head, [[row["model"], *(gb(row[name]) for name in names)] for row in rows])


def fill(path: Any, sections: dict[str, str]) -> None:
    text = path.read_text()
    for name, body in sections.items():
        start, end = START.format(name), END.format(name)
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.S)
        text = pattern.sub(lambda _, s=start, b=body, e=end: f"{s}\n\n{b}\n\n{e}", text)
    path.write_text(text)


def main() -> None:
    sections = {}
    if results := load("quality"):
        quality = Quality(results)
        names = ("perplexities", "gaps", "whole", "transfer", "costs", "seeds")
        sections = {name: getattr(quality, name)() for name in names}
    for name, write in {"ablations": ablations, "peer": peer, "zeroshot": zeroshot, "speed": speed}.items():
        if results := load(name):
            sections[name] = write(results)
    fill(ROOT / "docs" / "results.md", sections)
    if results := load("scale"):
        parts = {"measured": measured(results), "ratios": ratios(results), "forecasts": forecasts(results)}
        fill(ROOT / "docs" / "scaling.md", parts)
    fill(ROOT / "README.md", {"results": sections["perplexities"]})


if __name__ == "__main__":
    main()
