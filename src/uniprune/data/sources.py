"""Several texts at once, each with its share of the tokens; ``self`` is one that the model writes (``job.samples``).

    c4    code=library.txt:0.25    owner/name:config:0.5    self:0.25

A text may have a name before ``=``, under which results show it, and its share after the last ``:``. Shares are of tokens. If
all texts have one, they are normalised; texts without one have the rest in equal parts.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from uniprune.data.formats import recognise
from uniprune.data.text import NAMED, SHARED, Text, TextShare
from uniprune.data.windows import ALL, Windows, token_file_shape
from uniprune.errors import InputError
from uniprune.storage.files import path_of

SELF = "self"
SPELLED = re.compile(r"(?:(?P<name>[A-Za-z][\w.-]*)=)?(?P<text>.+)")


@dataclass(frozen=True)
class TextSource:
    """``text``: what is read, as ``data.text`` knows it, or ``self``. share: as it was given, None if it was not."""

    name: str
    text: str
    share: float | None = None

    @property
    def tokens(self) -> bool:
        """Whether it is a token file."""
        return Text(self.text).is_token_file

    def reading(self, field: str | None, split: str | None, alone: bool) -> Text:
        """What to read. alone: whether it is the only text; of several, field and split are for those that have such."""
        if alone:
            return Text(self.text, field, split)
        if self.text in NAMED or self.tokens:
            return Text(self.text)
        if (path := path_of(self.text)).is_file():
            return Text(self.text, None if field is not None and recognise(path, "text").plain else field)
        return Text(self.text, field, split)


def check_asked(sources: Sequence[TextSource], field: str | None, split: str | None) -> None:
    """Raises InputError for a field or a split that is for none of several texts."""
    for flag, given in (("field", field), ("split", split)):
        if given is not None and not any(getattr(source.reading(field, split, alone=False), flag) for source in sources):
            raise InputError(f"--{flag} {given}: none of the texts has {flag}s; leave it out")


def parse(texts: str | Sequence[str]) -> list[TextSource]:
    """The sources of one text or of several. Raises InputError for shares and names that do not go together.

    One alone has no share: what stands after its last ``:`` is part of its name, as of ``owner/name:config``.
    """
    given = (texts,) if isinstance(texts, str) else tuple(texts)
    if not given or not all(text.strip() for text in given):
        raise InputError("no text was given, or an empty one (a variable that is not set?); give one, e.g. --text c4")
    sources = [_parsed(text, several=len(given) > 1) for text in given]
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two texts are called {twice}; give one of them another name, NAME={twice}")
    shares(sources)
    return sources


def files_of(texts: str | Path | Sequence[str | Path] | None) -> list[Path]:
    """The files and folders among texts: inputs, which no output may replace."""
    given = () if texts is None else (texts,) if isinstance(texts, (str, Path)) else texts
    paths = [path_of(_parsed(str(text), several=len(given) > 1).text) for text in given]
    return [path for path in paths if _there(str(path))]


def _parsed(text: str, several: bool) -> TextSource:
    share = None
    if several and not _there(text) and (match := SHARED.fullmatch(text)):
        text = match["text"]
        share = float(match["share"])
        if not 0 < share < math.inf:
            raise InputError(f"the share of text {text} is not positive; give a part of the tokens, e.g. {text}:0.25")
    match = None if _there(text) else SPELLED.fullmatch(text)
    if match and match["name"]:
        return TextSource(match["name"], match["text"], share)
    return TextSource(Path(text).name or text, text, share)


def _there(text: str) -> bool:
    """Whether a file or folder has this name, whatever its characters could mean otherwise."""
    return os.path.exists(path_of(text))  # pathlib raises for a name that is too long


def shares(sources: Sequence[TextSource]) -> list[float]:
    """Each source's part of the tokens; they sum to 1. Raises InputError if nothing is left for one."""
    given = [source.share for source in sources if source.share is not None]
    without = [source for source in sources if source.share is None]
    if not without:
        return [share / sum(given) for share in given]
    rest = 1 - sum(given)
    if rest <= 1e-9:
        raise InputError(
            f"the shares of texts come to {sum(given):g}, which leaves nothing for {without[0].name}; give it one, too, or "
            "lower the others"
        )
    return [rest / len(without) if source.share is None else source.share for source in sources]


def interleaved(parts: Sequence[float], count: int) -> list[int]:
    """Which of the sources each of ``count`` windows is of, so that any stretch of them has about the parts of all.

    The next window is of the source that lacks most of its part, the first of those that lack as much (as in weighted round
    robin): the first windows make a controller's start, and the last ones judge it.
    """
    taken = [0] * len(parts)
    order = list[int]()
    for number in range(1, count + 1):
        lacking = [round(part * number - had, 9) for part, had in zip(parts, taken, strict=True)]
        order.append(lacking.index(max(lacking)))
        taken[order[-1]] += 1
    return order


def mixed(sources: Sequence[TextSource], count: int, load: Callable[[TextSource, int], Windows]) -> Windows:
    """``count`` windows for calibration, in which each source has its share. load: so many windows of a source.

    Raises InputError if a share is less than a window.
    """
    parts = shares(sources)
    order = interleaved(parts, count)
    for index, source in enumerate(sources):
        if index not in order:
            raise InputError(
                f"text {source.name} has {parts[index]:.2%} of {count} samples, which is less than one; give more samples "
                "(--num-samples), or a larger share"
            )
    return _joined(sources, [load(source, order.count(index)) for index, source in enumerate(sources)], order, parts)


def side_by_side(sources: Sequence[TextSource], load: Callable[[TextSource], Windows]) -> Windows:
    """The windows for evaluation, one source after the other. Raises InputError for shares, which are for calibration."""
    if given := next((source for source in sources if source.share is not None), None):
        raise InputError(
            f"text {given.text} has a share ({given.share:g}), which is for calibration; leave it out: each text is evaluated "
            "by itself"
        )
    loaded = [load(source) for source in sources]
    return _joined(sources, loaded, [index for index, windows in enumerate(loaded) for _ in windows.tokens], None)


def common_shape(
    sources: Sequence[TextSource], count: int | None, length: int | None, default: tuple[int, int]
) -> tuple[int, int]:
    """How many windows are read, and their length: a token file knows its length, and alone it is read whole.

    default: of what nothing is known of.
    """
    shapes = [token_file_shape(path_of(source.text)) for source in sources if source.tokens and None in (count, length)]
    whole = shapes[0][0] if shapes and len(sources) == 1 else default[0]
    return count or whole, length or (shapes[0][1] if shapes else default[1])


def _joined(
    sources: Sequence[TextSource], loaded: Sequence[Windows], order: Sequence[int], parts: Sequence[float] | None
) -> Windows:
    if any(windows.pictures for windows in loaded):
        raise InputError("images with text go with no other text; give one --text, or read the text alone: --field text")
    first = next((windows for windows in loaded if windows.bos_token is not None), loaded[0])  # a token file may have none
    of = torch.tensor(order)
    tokens = first.tokens.new_zeros(len(order), first.tokens.shape[1])
    for index, windows in enumerate(loaded):
        tokens[of == index] = windows.tokens
    facts = {
        source.name: TextShare(
            text=windows.source,
            share=parts[index] if parts else None,
            available_windows=windows.available,
            sample=windows.sample,
        )
        for index, (source, windows) in enumerate(zip(sources, loaded, strict=True))
    }
    return replace(
        first,
        tokens=tokens,
        source=" + ".join(facts),
        available=sum(windows.available for windows in loaded),
        sample=ALL,
        words=_sum([windows.words for windows in loaded]),
        size=_sum([windows.size for windows in loaded]),
        sources=facts,
        of=of,
        tokenizer=next((windows.tokenizer for windows in loaded if windows.tokenizer), None),
    )


def _sum(values: Sequence[int | None]) -> int | None:
    """The sum, if every value is known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
