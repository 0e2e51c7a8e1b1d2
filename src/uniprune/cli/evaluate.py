"""The commands that measure and show: ``evaluate``, ``sweep``, ``bench`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import click
from pydantic import Field

from uniprune.cli.groups import ModelArgument, Overwrite, Printed, Revision, Target, at
from uniprune.cli.options import Only
from uniprune.cli.terminal import Bars, quiet, show
from uniprune.common.options import Commas, Flag, Options, Positional
from uniprune.errors import InputError
from uniprune.evaluation.request import EvaluationRequest
from uniprune.job.options import RunOptions, TableRunOptions
from uniprune.job.settings import Settings
from uniprune.speed.settings import Measurement


class Evaluated(Options):
    model: Annotated[str | None, Positional("[MODEL]")] = Field(
        default=None, description="Model or output folder: a folder, a .gguf file, or a Hub name (owner/name)."
    )
    revision: str | None = Revision

    @property
    def name(self) -> str | None:
        """The model, with its revision."""
        if self.model is None and self.revision is not None:
            raise InputError("--revision is of MODEL, which is missing; give it, or leave --revision out")
        return None if self.model is None else at(self.model, self.revision)


class Comparison(Options):
    heading: ClassVar[str] = "Comparison"

    against: Annotated[str | None, Flag(metavar="MODEL")] = Field(
        default=None, description="Compare predictions and answers with this model's, usually the dense one's."
    )
    check: Annotated[Path | None, Flag(metavar="RESULT")] = Field(
        default=None, description="Re-run the evaluation recorded in RESULT and compare; exit code 1 on mismatch."
    )


class ResultFile(Options):
    output: Annotated[Path | None, Flag(("-o",))] = Field(default=None, description="Also write the result to this JSON file.")


class Sweep(Options):
    scores: Annotated[Path, Positional()] = Field(description="Scores file, as calibrate writes it.")
    sparsities: Annotated[tuple[str, ...], Flag(("-s", "--sparsity")), Commas] = Field(
        default=("0.3", "0.4", "0.5", "0.6", "0.7", "2:4", "4:8"),
        description="Sparsities and N:M patterns, separated by commas.",
    )


class Report(Options):
    sources: Annotated[tuple[Path, ...], Positional("SOURCE...")] = Field(
        description="Output folders of prune, apply, compare or pack --runtime; JSON files of evaluate, sweep or bench."
    )
    output: Annotated[Path, Flag(("-o",))] = Field(description="The report; its name ends in the format.")
    format: Literal["html", "md", "json"] | None = Field(
        default=None,
        description="A page, the verdict and the tables as Markdown, or all as JSON; by default as the output's name ends.",
    )


def evaluate(
    source: Evaluated,
    request: EvaluationRequest,
    comparison: Comparison,
    target: ResultFile,
    run: Annotated[RunOptions, Only("device overwrite")],
    printed: Printed,
) -> None:
    quiet()
    from uniprune.cli import tables
    from uniprune.data.sources import files_of
    from uniprune.entrypoints.evaluate import check, evaluate
    from uniprune.evaluation.results import Check, Evaluation
    from uniprune.storage.files import check_output_file, path_of
    from uniprune.tasks.catalogue import listed

    result_file = comparison.check
    if result_file and request.given():
        raise InputError(
            "--check re-runs the evaluation that RESULT records; give no more than MODEL, --against and --device with it"
        )
    name = source.name
    if name is None and not result_file:
        raise InputError("the argument MODEL is missing; it can be left out with --check only, whose RESULT names it")
    if target.output:
        others = [path_of(each) for each in (*request.tasks, request.masks) if each and not listed(each)]
        inputs = [result_file] if result_file else [*files_of(request.text_source), *filter(Path.exists, others)]
        check_output_file(target.output, run.overwrite, *inputs, suffix=".json")
        folders = [path_of(each) for each in (name, comparison.against) if each]
        (Check if result_file else Evaluation).check_keeps_inputs(target.output, folders)
    models: dict[str, Any] = {"against": comparison.against, "device": run.device}
    if result_file:
        with Bars() as progress:
            found = check(result_file, name, **models, progress=progress)
        if target.output:
            found.write(target.output)
        show(found, printed.as_json, *tables.check_lines(found))
        if not found.reproduced:
            raise click.exceptions.Exit(1)
        return
    assert name is not None
    with Bars() as progress:
        result = evaluate(name, **models, progress=progress, **request.given())
    if target.output:
        result.write(target.output)
    show(result, printed.as_json, *tables.evaluation_tables(result))


def sweep(
    source: ModelArgument,
    sparsities: Sweep,
    target: Target,
    scope: Annotated[Settings, Only("scope")],
    request: Annotated[EvaluationRequest, Only("text_source field split windows length stride bos dtype")],
    run: Annotated[TableRunOptions, Only("device resume overwrite")],
    printed: Printed,
) -> None:
    quiet()
    from uniprune.cli.tables import sweep_tables
    from uniprune.entrypoints.sweep import sweep

    options = {**scope.given(), **request.given(), **run.given()}
    with Bars() as progress:
        result = sweep(source.name, sparsities.scores, target.output, sparsities.sparsities, **options, progress=progress)
    show(result, printed.as_json, *sweep_tables(result))


def bench(source: ModelArgument, measurement: Measurement, printed: Printed) -> None:
    quiet()
    from uniprune.cli.tables import bench_table
    from uniprune.entrypoints.bench import bench

    with Bars() as progress:
        result = bench(source.name, **measurement.given(), progress=progress)
    show(result, printed.as_json, bench_table(result), *result.verdicts, *result.notes)


def report(asked: Report, over: Overwrite, printed: Printed) -> None:
    from uniprune.cli.tables import report_lines, report_tables
    from uniprune.entrypoints.report import facts, write

    found, summary = write(asked.sources, asked.output, format=asked.format, **over.given())
    result = {"output": str(asked.output), **facts(found, summary).record()}
    show(result, printed.as_json, *report_tables(summary), *report_lines(summary), f"{asked.output} written")
