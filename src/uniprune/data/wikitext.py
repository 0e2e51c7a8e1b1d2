"""WikiText as it is read: the rows that ``datasets`` makes of its files, and the pages of lm-evaluation-harness."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# How the tokenised text spells, and what lm-evaluation-harness (its task wikitext 2.0) makes of it, in its order.
_SPELLING: tuple[tuple[str, str], ...] = (
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_BRACKETS = (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}")
_QUOTES = (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'")
_REST = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "))


def rows(lines: Iterable[str]) -> Iterator[str]:
    """The rows of a file's lines: blank ones are empty. The papers' text joins those rows."""
    return (line if line.strip() else "" for line in lines)


def pages(lines: Iterable[str]) -> Iterator[str]:
    """The articles, each from its heading (``= Title =``) on; lines may be rows."""
    page: list[str] = []
    for line in lines:
        line = (line or " \n").removesuffix("\n")
        if _is_title(line):
            if "".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    if "".join(page).strip():
        yield "\n".join(page)


def _is_title(line: str) -> bool:
    bare = line.replace("= = =", "===").replace("= =", "==").strip()
    return bare.startswith("= ") and bare.endswith(" =")


def detokenised(page: str) -> str:
    """A page in ordinary spelling, letter by letter as the harness gives it to a model."""
    page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page.replace("s '", "s'"))
    for spelled, plain in _SPELLING:
        page = page.replace(spelled, plain)
    for pattern, plain in (*_BRACKETS, *_QUOTES):
        page = re.sub(pattern, plain, page)
    for spelled, plain in _REST:
        page = page.replace(spelled, plain)
    return page.replace(" 's", "'s")
