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
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def label(pattern: str, scope: str | None) -> str:
    return pattern if scope is None else f"{float(pattern):.0%} by {scope}"


def local(results: dict[str, Any]) -> str:
    rows = [row for row in results["rows"] if row["method"] != "dense"]
    dense = results["rows"][0]["perplexity"]
    columns = list(dict.fromkeys((row["pattern"], row["scope"]) for row in rows))
    found = {(row["method"], row["pattern"], row["scope"]): row["perplexity"] for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [[method, *(number(found.get((method, *column))) for column in columns)] for method in methods]
    lines.insert(0, ["dense", *[number(dense)] * len(columns)])
    return table(["method", *(label(*column) for column in columns)], lines)


def controller(results: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Recovered gap R = (ln ppl_Wanda - ln ppl) / (ln ppl_Wanda - ln ppl_dense), by row where Wanda has the choice."""
    dense = baseline["rows"][0]["perplexity"]
    wanda = {(r["pattern"], r["scope"]): r["perplexity"] for r in baseline["rows"] if r["method"] == "wanda"}
    lines = []
    for row in results["rows"]:
        start = wanda[row["pattern"], None if ":" in row["pattern"] else "row"]
        recovered = math.log(start / row["perplexity"]) / math.log(start / dense)
        name = label(row["pattern"], row["scope"])
        lines.append([name, number(start), number(row["perplexity"]), f"{recovered:.2f}", str(row["tokens"]), row["targets"]])
    return table(["pattern", "Wanda", "controller", "R", "tokens", "calibrated for"], lines)


def full(results: dict[str, Any]) -> str:
    lines = [
        [r["method"], label(r["pattern"], r["scope"]) if r["pattern"] else "", number(r["perplexity"])] for r in results["rows"]
    ]
    return table(["method", "pattern", "perplexity"], lines)


def peer(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        theirs = next(r for r in results["rows"] if r["pattern"] == row["pattern"] and r["system"].startswith("llm-comp"))
        ratios = [f"{row[key] / theirs[key]:.2f}" for key in ("perplexity", "seconds", "peak_bytes")]
        lines.append([f"{row['system']}, {row['pattern']}", f"{row['perplexity']:.2f}", *ratios])
    return table(["run", "perplexity", "perplexity ratio", "wall time ratio", "peak memory ratio"], lines)


def speed(results: dict[str, Any]) -> str:
    lines = [[spec, f"{ratio:.2f}"] for spec, ratio in results["median_ratio"].items()]
    return table(["pattern", "calibration + scores + masks / bare forward passes"], lines)


def fill(path: Any, sections: dict[str, str]) -> None:
    text = path.read_text()
    for name, body in sections.items():
        start, end = START.format(name), END.format(name)
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.S)
        text = pattern.sub(lambda _, s=start, b=body, e=end: f"{s}\n\n{b}\n\n{e}", text)
    path.write_text(text)


def main() -> None:
    sections = {}
    baseline = load("local")
    if baseline:
        sections["local"] = local(baseline)
        if results := load("controller"):
            sections["controller"] = controller(results, baseline)
    for name, write in {"full": full, "peer": peer, "speed": speed}.items():
        if results := load(name):
            sections[name] = write(results)
    fill(ROOT / "docs" / "results.md", sections)
    fill(ROOT / "README.md", {"results": "\n\n".join(sections[name] for name in ("controller", "local") if name in sections)})


if __name__ == "__main__":
    main()
