"""The command ``report``: results as one HTML page that needs nothing but itself.

Everything that comes from a source is escaped by the template engine, and a policy in the page's head lets no script run but
the page's own, and nothing be fetched. The same sources give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from uniprune.common.formatting import NOTE
from uniprune.common.provenance import versions
from uniprune.reporting.headline import figures, sentences, verdict
from uniprune.reporting.summary import Summary
from uniprune.reporting.tables import Grid, as_csv

if TYPE_CHECKING:
    from uniprune.reporting.sections import Section

LONG = 12  # rows of a table that can be filtered


def render(sections: Sequence[Section], summary: Summary) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("uniprune.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (Markup(_part(environment, name)) for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        summary=summary,
        verdict=verdict(summary),
        sentences=[sentence for sentence in sentences(summary) if sentence != NOTE],
        figures=figures(summary),
        sections=sections,
        note=NOTE,
        version=versions()["uniprune"],
        style=style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        markup=Markup,
        download=_download,
        long=LONG,
    )


def _download(grid: Grid) -> str:
    """The address of a table as a CSV file, which is in the address itself."""
    return f"data:text/csv;charset=utf-8,{quote(as_csv(grid), errors='replace')}"


def _part(environment: Environment, name: str) -> str:
    """A file that goes into the page as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
