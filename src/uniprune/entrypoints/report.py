"""The command ``report``: results as one self-contained HTML page, as Markdown, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from uniprune.errors import InputError
from uniprune.reporting.headline import sentences, verdict
from uniprune.reporting.html import render
from uniprune.reporting.markdown import markdown
from uniprune.reporting.results import ResultFile, read_all
from uniprune.reporting.summary import Change, ReportedModel, Summary, Tradeoff, summarise
from uniprune.storage.files import REPORT, check_output_file, path_of, replacing
from uniprune.storage.record import Facts, Record

if TYPE_CHECKING:
    from uniprune.reporting.sections import Section

Format = Literal["html", "md", "json"]


class ModelRow(Facts):
    """A model of a report. accuracy_change: against the dense model, the mean over tasks. kl: nats per token from it."""

    label: str
    base: str | None
    pattern: str | None
    sparsity: float | None
    perplexity: float | None
    dense_perplexity: float | None
    accuracy_change: Change | None
    kl: float | None


class SourceFacts(Facts):
    """A source of a report; ``result``: its content, as it was read."""

    path: str
    kind: str
    result: dict[str, Any]


class Report(Record):
    """What ``report`` returns: the page's findings (``verdict``, ``summary``), then each source as it was read."""

    kind: Literal["report"] = "report"
    title: str
    verdict: str | None
    summary: list[str]
    models: list[ModelRow]
    tradeoffs: list[Tradeoff]
    sources: list[SourceFacts]


def report(
    paths: str | Path | Sequence[str | Path], output: str | Path, *, format: Format | None = None, overwrite: bool = False
) -> Report:
    """Writes a page of what the sources say, and returns the same as data.

    paths: output folders of ``prune``, ``apply``, ``compare`` and ``pack --runtime``, JSON files of ``evaluate --json``,
    ``sweep`` and ``bench --json``; one, or any number. format: ``html``, ``md`` (the verdict and the tables) or ``json``
    (what is returned); by default as the output's name ends.
    Raises InputError if a source is none of these, naming it, if the output exists and is not to be replaced, and if there is
    no matplotlib.
    """
    several = [paths] if isinstance(paths, (str, Path)) else paths
    return facts(*write(list(map(path_of, several)), path_of(output), format=format, overwrite=overwrite))


def write(
    paths: Sequence[Path], output: Path, *, format: Format | None = None, overwrite: bool = False
) -> tuple[list[ResultFile], Summary]:
    """As :func:`report`; returns what it read, and that put together."""
    folders = [path for path in paths if path.is_dir()]
    read = [*filter(Path.is_file, paths), *(folder / "README.md" for folder in folders if (folder / REPORT).is_file())]
    formats = get_args(Format)
    by_name: Format = next((known for known in formats if output.suffix == f".{known}"), "html")
    chosen = by_name if format is None else format
    if chosen not in formats:
        raise InputError(f"format {format!r} is unknown; use one of {', '.join(formats)}")
    check_output_file(output, overwrite, *read, suffix=f".{chosen}")
    if chosen == "json":
        Report.check_keeps_inputs(output, folders)
    sources = read_all(paths)
    summary = summarise(sources)
    content = _content(sources, summary, chosen)
    with replacing(output) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="replace")  # half a surrogate pair is no text
    return sources, summary


def _content(sources: Sequence[ResultFile], summary: Summary, format: Format) -> str:
    if format == "json":
        return json.dumps(facts(sources, summary).record(), indent=1) + "\n"
    return (render if format == "html" else markdown)(_sections(sources, summary), summary)


def _sections(sources: Sequence[ResultFile], summary: Summary) -> list[Section]:
    try:
        from uniprune.reporting.sections import sections
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise InputError("a report draws its plots with matplotlib; pip install matplotlib") from None
    return sections(sources, summary)


def facts(sources: Sequence[ResultFile], summary: Summary) -> Report:
    """A report as data."""
    return Report(
        title=summary.title,
        verdict=verdict(summary),
        summary=sentences(summary),
        models=[_row(subject, summary) for subject in summary.subjects],
        tradeoffs=summary.tradeoffs,
        sources=[SourceFacts(path=str(source.path), kind=source.kind, result=source.data) for source in sources],
    )


def _row(subject: ReportedModel, summary: Summary) -> ModelRow:
    return ModelRow(
        label=subject.label,
        base=subject.base,
        pattern=subject.pruning.pattern if subject.pruning else None,
        sparsity=subject.sparsity,
        perplexity=subject.reading.perplexity if subject.reading else None,
        dense_perplexity=summary.dense_perplexity(subject),
        accuracy_change=subject.change,
        kl=subject.closeness.kl if subject.closeness else None,
    )
