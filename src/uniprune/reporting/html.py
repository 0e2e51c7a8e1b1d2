"""The command ``report``: results as one HTML page that needs nothing but itself.

Everything that comes from a source is escaped by the template engine, and a policy in the page's head lets no script run but
the page's own, and nothing be fetched. The same sources give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from uniprune.common.formatting import NOTE
from uniprune.errors import InputError
from uniprune.reporting.headline import figures, sentences
from uniprune.reporting.results import Source
from uniprune.reporting.summary import Summary


def render(sources: Sequence[Source], summary: Summary) -> str:
    """The page."""
    try:
        from uniprune.reporting.sections import sections
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise InputError("a report draws its plots with matplotlib; pip install 'uniprune[report]'") from None
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
