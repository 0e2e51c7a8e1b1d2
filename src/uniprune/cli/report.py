"""The verb that puts results on a page: ``uniprune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from uniprune.cli.options import AsJson, Overwrite
from uniprune.cli.terminal import show


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Output folders of prune or apply; JSON of evaluate --json or of sweep."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, an .html file.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Put results on one HTML page: figures, plots, tables and how they were had."""
    from uniprune.cli import tables
    from uniprune.entrypoints import report as entry_report

    found, summary = entry_report.write(sources, output, overwrite=overwrite)
    result = {"output": str(output), **entry_report.facts(found, summary)}
    show(result, as_json, *tables.report_tables(summary), *tables.report_lines(summary), f"{output} written")
