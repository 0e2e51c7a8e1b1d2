"""The page of the table of methods: its size, and when a browser first paints it. Needs Chromium.

    python benchmarks/report.py [report.html]

Sources are results/comparison.json and results/bench.json. The page is kept if it is given a name, for ``make screenshots``.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from playwright.sync_api import sync_playwright

import uniprune
from common import load, save
from uniprune.comparison.results import COMPARISON

ROUNDS = 5
WIDTHS = (390, 1200, 1920)
PAINT = """new Promise(done => new PerformanceObserver(list => {
  const found = list.getEntriesByName("first-contentful-paint")[0];
  if (found) done(found.startTime);
}).observe({ type: "paint", buffered: true }))"""


def make(page: Path, folder: Path) -> None:
    (folder / "table").mkdir()
    (folder / "table" / COMPARISON).write_text(json.dumps(load("comparison")["table"]))
    bench = folder / "bench.json"
    bench.write_text(json.dumps({"kind": "bench", "format": 1, **load("bench")["smollm2"]}))
    print(uniprune.report([folder / "table", bench], page, overwrite=True).verdict)


def first_paints(page: Path, width: int) -> list[float]:
    """Seconds from the beginning of the navigation, each in a fresh context."""
    found = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(ROUNDS):
            context = browser.new_context(viewport={"width": width, "height": 900})
            tab = context.new_page()
            tab.goto(page.resolve().as_uri())
            found.append(tab.evaluate(PAINT) / 1000)
            context.close()
        browser.close()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "report.html"
        make(page, Path(folder))
        paints = {str(width): median(first_paints(page, width)) for width in WIDTHS}
        results = {"bytes": page.stat().st_size, "first_paint_seconds": paints, "rounds": ROUNDS}
    save("report", results)
    print(results)


if __name__ == "__main__":
    main()
