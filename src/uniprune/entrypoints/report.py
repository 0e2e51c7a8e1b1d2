"""The command ``report``: results as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uniprune.reporting.headline import sentences
from uniprune.reporting.html import render
from uniprune.reporting.results import Source, read_all
from uniprune.reporting.summary import Summary, summarise
from uniprune.storage.files import check_output_file, replacing


def report(paths: Sequence[str | Path], output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes a page of what the sources say, and returns the same as data.

    paths: output folders of ``prune`` and ``apply``, JSON files of ``evaluate --json`` and of ``sweep``; any number.
    Raises InputError if a source is none of these, naming it, if the output exists and is not to be replaced, and if there is
    no matplotlib.
    """
    return facts(*write([Path(path) for path in paths], output, overwrite=overwrite))


def write(paths: Sequence[Path], output: Path, *, overwrite: bool = False) -> tuple[list[Source], Summary]:
    """As :func:`report`; returns what it read, and that put together."""
    check_output_file(output, overwrite, suffix=".html")
    sources = read_all(paths)
    summary = summarise(sources)
    page = render(sources, summary)
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair is no text
    return sources, summary


def facts(sources: Sequence[Source], summary: Summary) -> dict[str, Any]:
    """A report as data: its findings, then each source as it was read."""
    return {
        "title": summary.title,
        "summary": sentences(summary),
        "models": [
            {
                "label": subject.label,
                "base": subject.base,
                "pattern": subject.pruning.pattern if subject.pruning else None,
                "sparsity": subject.sparsity,
                "perplexity": subject.reading.perplexity if subject.reading else None,
                "dense_perplexity": summary.dense_perplexity(subject),
                "accuracy_change": asdict(subject.change) if subject.change else None,
                "kl": subject.closeness.kl if subject.closeness else None,
            }
            for subject in summary.subjects
        ],
        "tradeoffs": [asdict(tradeoff) for tradeoff in summary.tradeoffs],
        "sources": [{"path": str(source.path), "kind": source.kind, "result": source.data} for source in sources],
    }
