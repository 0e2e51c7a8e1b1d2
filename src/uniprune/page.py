"""The verb ``report``: results as one HTML page that needs nothing but itself.

Everything that comes from a source is escaped by the template engine, and a policy in the page's head lets no script run but
the page's own, and nothing be fetched. The same sources give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from uniprune.artefacts import check_output_file, replacing
from uniprune.errors import InputError
from uniprune.findings import figures, sentences
from uniprune.results import Source, read_all
from uniprune.summary import Summary, summarise
from uniprune.words import NOTE


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


def render(sources: Sequence[Source], summary: Summary) -> str:
    """The page."""
    try:
        from uniprune.sections import sections
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise InputError("a report draws its plots with matplotlib; pip install 'uniprune[report]'") from None
    environment = Environment(
        loader=PackageLoader("uniprune"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (Markup(_part(environment, name)) for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        summary=summary,
        sentences=[sentence for sentence in sentences(summary) if sentence != NOTE],
        figures=figures(summary),
        sections=sections(sources, summary),
        note=NOTE,
        version=importlib.metadata.version("uniprune"),
        style=style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        markup=Markup,
    )


def _part(environment: Environment, name: str) -> str:
    """A file that goes into the page as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
