"""Text -> windows of tokens: all of a text, windows spread over it, or a sample from all over a large one.

A text is tokenised as one and cut into windows of one length. Of one that is too large for that, passages from all over it
are drawn and only they are tokenised; each file of a folder gives as many windows as any other, as far as it can.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from uniprune.common import formatting
from uniprune.common.pictures import Pictures
from uniprune.data import mixture
from uniprune.data.bos import Bos, Encoder, tokenizer_of
from uniprune.data.documents import JOIN
from uniprune.data.mixture import Wanted
from uniprune.data.parts import File, HubShard, Part
from uniprune.data.text import Sample, Text, TextFacts, TextShare, Use, open_text, texts
from uniprune.errors import InputError
from uniprune.storage.files import path_of
from uniprune.storage.record import Count
from uniprune.storage.tensor_file import Metadata, open_tensors, write_tensors

logger = logging.getLogger(__name__)

ALL = Sample()


@dataclass(frozen=True)
class Windows:
    """Token windows ``tokens`` (int64, ``[windows, length]``) and where they come from.

    available: how many there are, about if the text was sampled. bos: which windows were to begin with BOS. stride: tokens from
    one window to the next if they overlap. sample: what was read of the source. words, size: words and
    bytes of the text that is predicted. pictures: images that go with the windows. sources: if they are of several texts, each
    by its name (``data.sources``); of: which of them each window is of, int64 ``[windows]``. prompts: by the number
    of each window that the model is yet to write (``job.samples``), and that is zeros until then, the tokens it goes on from.
    tokenizer: the ``Encoder.fingerprint`` of the one that made the tokens, if that is known.
    """

    tokens: Tensor
    source: str
    available: int
    bos: Bos
    bos_token: int | None = None
    stride: int | None = None
    join: str = JOIN
    sample: Sample = ALL
    words: int | None = None
    size: int | None = None
    pictures: Pictures | None = None
    sources: Mapping[str, TextShare] | None = None
    of: Tensor | None = None
    prompts: Mapping[int, Tensor] | None = None
    tokenizer: str | None = None

    @property
    def by_source(self) -> dict[str, Tensor]:
        """Of each of several texts the numbers of its windows; empty for one text."""
        if self.sources is None or self.of is None:
            return {}
        found = {name: (self.of == index).nonzero().flatten() for index, name in enumerate(self.sources)}
        return {name: numbers for name, numbers in found.items() if len(numbers)}

    @cached_property
    def sha256(self) -> str:
        """Hash of the token ids, their shape and images: equal hashes mean equal windows, whatever the source was called."""
        data = self.tokens.to(torch.int64).contiguous()
        digest = hashlib.sha256(repr(tuple(data.shape)).encode() + data.numpy().tobytes())
        if self.pictures is not None:
            self.pictures.add_to(digest, data)
        return digest.hexdigest()

    @property
    def with_bos(self) -> int:
        """How many windows really begin with BOS."""
        return 0 if self.bos_token is None else int((self.tokens[:, 0] == self.bos_token).sum())

    @property
    def scored(self) -> list[int]:
        """Of each window, how many tokens are predicted: its last ones.

        Of all windows of a text, those that the window before does not predict; of some of them, as many of each.
        """
        count, length = self.tokens.shape
        scored = [min(self.stride or length, length - 1)] * count
        return [length - 1, *scored[1:]] if count == self.available else scored

    def describe(self) -> TextFacts:
        """The provenance that goes into reports and artefacts."""
        count, length = self.tokens.shape
        return TextFacts(
            text=self.source,
            windows=count,
            length=length,
            available_windows=self.available,
            join=self.join,
            bos=self.bos,
            windows_with_bos=self.with_bos,
            sample=self.sample,
            images=len(self.pictures.given) if self.pictures else None,
            sources=self._shares(),
            sha256=self.sha256,
        )

    def _shares(self) -> dict[str, TextShare] | None:
        """The facts of several texts, with the windows that are here."""
        counts = {name: len(numbers) for name, numbers in self.by_source.items()}
        shares = {name: (self.sources or {})[name].model_copy(update={"windows": count}) for name, count in counts.items()}
        return shares or None


class TokenFacts(Metadata):
    """The metadata of a saved token file. bos: whether some window begins with BOS; which: those that were to.

    sources: if the windows are of several texts, each by its name; of: which of them each window is of. tokenizer: as in
    :class:`Windows`.
    """

    kind: Literal["tokens"] = "tokens"
    source: str
    available: Count
    bos: bool
    which: Bos | None = None
    bos_token: Count | None = None
    join: str = JOIN
    sample: Sample = Sample()
    sources: dict[str, TextShare] | None = None
    of: list[str] | None = None
    tokenizer: str | None = None


def load_windows(
    source: str | Path | Text,
    tokenizer: Any,
    *,
    use: Use,
    length: int,
    count: int | None = None,
    seed: int = 0,
    bos: Bos | None = None,
    stride: int | None = None,
) -> Windows:
    """Windows of ``length`` tokens from a text source.

    use: named sources have a part for each use, disjoint from the other. For ``calibration``, ``count`` windows are drawn
    without replacement by ``seed``; for ``evaluation`` they are spread evenly over the text, or all of them taken if ``count``
    is None. bos: which windows begin with BOS, by default the first if the tokenizer adds it. stride: tokens from one window
    to the next; by default they do not overlap.
    Raises InputError if the source is missing, empty, or holds fewer windows than asked for.
    """
    text, tokenizer = source if isinstance(source, Text) else Text(str(source)), tokenizer_of(tokenizer)
    if length < 2:
        raise InputError(f"window length {length} is too short: predicting a token needs at least 2")
    if count is not None and count < 1:
        raise InputError(f"number of windows {count} is not positive")
    if text.is_token_file:
        return _of_token_file(text, tokenizer, length, count, {"bos": bos, "stride": stride})
    encoder = Encoder(tokenizer, bos, text)
    wanted = Wanted(use, count, length, encoder.room(length), seed)
    if stride is not None and not 0 < stride <= wanted.room:
        raise InputError(f"--stride {stride} is not within 1 and {wanted.room}, the tokens of text in a window")
    parts = open_text(text, use, tokenizer)
    beginning, whole = mixture.beginning(texts(parts), wanted.whole)
    if whole and not beginning.strip():
        raise InputError(f"text {text} is empty")
    if count is not None and stride is None and (not whole or (use == "calibration" and len(parts) > 1)):
        drawn = mixture.draw(parts, encoder, wanted)
        available, sample = max(drawn.available, len(drawn.windows)), drawn.sample
        _checked(text, len(drawn.windows), len(drawn.windows) * wanted.room + drawn.rest, wanted)
        tokens = encoder.finished(drawn.windows)
    else:
        ids = encoder.whole(beginning) if whole else _streamed(parts, encoder)
        tokens, available = _cut(text, ids, wanted, stride)
        tokens = encoder.finished(tokens)
        content = hashlib.sha256(beginning.encode()).hexdigest() if whole else None
        sample = Sample(whole=True, files=len(parts), documents=sum(part.seen for part in parts), text_sha256=content)
    if isinstance(parts[0], HubShard) and parts[0].commit:
        sample = sample.model_copy(update={"commit": parts[0].commit})
    _say(text, parts, encoder, len(tokens), sample)
    found = Windows(tokens, text.source, available, encoder.bos, encoder.token, stride, parts[0].join, sample)
    found = replace(found, tokenizer=encoder.fingerprint())
    if use == "evaluation" and hasattr(tokenizer, "decode"):
        words, size = _units(found, tokenizer)
        found = replace(found, words=words, size=size)
    return found


def _cut(text: Text, ids: Tensor, wanted: Wanted, stride: int | None) -> tuple[Tensor, int]:
    """Windows of a text's tokens, as many as are wanted, and how many there are."""
    step, room = stride or wanted.room, wanted.room
    available = (len(ids) - room) // step + 1 if len(ids) >= room else 0
    count = _checked(text, available, len(ids), wanted)
    if wanted.use == "calibration":
        index = torch.randperm(available, generator=torch.Generator().manual_seed(wanted.seed))[:count]
    else:  # evenly, from the first window to the last
        index = torch.arange(count) * (available - 1) // max(count - 1, 1)
    return ids.unfold(0, room, step)[index].clone(), available


def _checked(text: Text, available: int, tokens: int, wanted: Wanted) -> int:
    """How many windows to take. Raises InputError if there are fewer than are wanted."""
    if available == 0:
        raise InputError(f"text {text} has {tokens} tokens, less than one window of {wanted.length}; lower --length")
    if wanted.count is not None and wanted.count > available:
        raise InputError(
            f"text {text} has {available} windows of {wanted.length} tokens, {wanted.count} were asked for; "
            f"lower --windows or --length, or give more text"
        )
    return wanted.count or available


def _streamed(parts: Sequence[Part], encoder: Encoder) -> Tensor:
    """The tokens of a long text, which is never in memory as a whole."""
    found = [torch.tensor(ids, dtype=torch.int32) for ids in encoder.pieces(texts(parts))]
    return encoder.begun(torch.cat(found).to(torch.int64))


def _units(windows: Windows, tokenizer: Any) -> tuple[int, int]:
    """Words and bytes of the text that is predicted, counted in each window as lm-evaluation-harness does in a document."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    words = size = 0
    for row, scored in zip(windows.tokens, windows.scored, strict=True):
        given = len(tokenizer.decode(row[: len(row) - scored], **options))
        predicted = tokenizer.decode(row, **options)[given:]
        words, size = words + len(re.split(r"\s+", predicted)), size + len(predicted.encode())
    return words, size


def warn_of_skipped(text: Text, parts: Sequence[Part]) -> None:
    """Says how many rows that were read have no text."""
    readers = [part.reader for part in parts if isinstance(part, File | HubShard)]
    refused = sum(reader.refused for reader in readers)
    if skipped := sum(reader.skipped for reader in readers) - refused:
        logger.warning("text %s: %d rows have no text (null) and are left out", text, skipped)
    if refused:
        logger.warning("text %s: %d conversations are left out, which the chat template refuses", text, refused)


def _say(text: Text, parts: Sequence[Part], encoder: Encoder, count: int, sample: Sample) -> None:
    """Warns of a text that was sampled, rows without text, and windows without BOS."""
    if not sample.whole:
        size = sum(part.path.stat().st_size for part in parts if isinstance(part, File))
        logger.warning(
            "text %s%s is more than %d windows need: they come from %d places all over it (%d characters), no more is read",
            text,
            f", {formatting.size(size)}," if size else "",
            count,
            sample.passages,
            sample.characters,
        )
    warn_of_skipped(text, parts)
    if encoder.added and encoder.bos == "first" and count > 1:
        logger.warning(
            "the tokenizer begins a text with BOS: as in papers, at most one window of text %s has it (--bos each: all have)",
            text,
        )


# ---------------------------------------------------------------------------------------------------------- token files


def check_savable(windows: Windows, path: Path, again: bool = False) -> None:
    """Raises InputError for windows of images, which a token file has no place for, and for a file with other tokens.

    again: as for :func:`save_windows`.
    """
    if windows.pictures:
        raise InputError("--save-tokens has no place for images; leave it out, or take the text alone: --field text")
    if again and path.exists() and not torch.equal(_read(path)[0], windows.tokens):
        raise InputError(f"output {path} exists, and has other tokens; give another name, or --overwrite")


def save_windows(windows: Windows, path: Path, again: bool = False) -> None:
    """Writes the token ids as safetensors (``tokens``: int32 ``[windows, length]``), for runs on the very same tokens.

    again: whether an earlier try of the same run may have written the file, which then stays.
    Raises InputError as :func:`check_savable`.
    """
    check_savable(windows, path, again)
    if again and path.exists():
        return
    facts = TokenFacts(
        source=windows.source,
        available=windows.available,
        bos=windows.with_bos > 0,
        which=windows.bos,
        bos_token=windows.bos_token,
        join=windows.join,
        sample=windows.sample,
        sources=None if windows.sources is None else dict(windows.sources),
        of=None if windows.of is None else [list(windows.sources or ())[index] for index in windows.of.tolist()],
        tokenizer=windows.tokenizer,
    )
    write_tensors(path, {"tokens": windows.tokens.to(torch.int32)}, facts)


def _of_token_file(text: Text, tokenizer: Any, length: int, count: int | None, others: dict[str, object]) -> Windows:
    """tokenizer: the model's. others: the settings of other texts, which a token file does not take."""
    path = path_of(text.source)
    tokens, facts = _read(path)
    given = {"field": text.field, "split": text.split} | others
    if useless := [f"--{name}" for name, value in given.items() if value is not None]:
        raise InputError(f"token file {path} has its tokens; leave out {', '.join(useless)}")
    own = Encoder(tokenizer, None, path).fingerprint() if facts.tokenizer and tokenizer is not None else None
    if own is not None and own != facts.tokenizer:
        raise InputError(f"token file {path} was made with another tokenizer than the model's; give the text itself")
    if tokens.shape[1] != length:
        raise InputError(f"token file {path} has windows of {tokens.shape[1]} tokens, not {length}; leave --length out")
    if count is not None and count > len(tokens):
        raise InputError(f"token file {path} has {len(tokens)} windows, {count} were asked for; lower --windows")
    which = facts.which or ("first" if facts.bos else "none")
    found = Windows(tokens[:count], facts.source, facts.available, which, facts.bos_token, None, facts.join, facts.sample)
    found = replace(found, tokenizer=facts.tokenizer)
    if facts.of is None or facts.sources is None:
        return found
    names = list(facts.sources)
    return replace(found, sources=facts.sources, of=torch.tensor([names.index(name) for name in facts.of[:count]]))


def _read(path: Path) -> tuple[Tensor, TokenFacts]:
    """The windows of a token file (int64), and where they come from; InputError unless they could be windows."""
    with open_tensors(path, TokenFacts) as (file, facts):
        try:
            if list(file.keys()) != ["tokens"]:
                raise ValueError("it must hold one tensor, named tokens")
            tokens = file.get_tensor("tokens")
            if tokens.dtype != torch.int32 or tokens.ndim != 2 or not tokens.numel():
                raise ValueError(f"its tokens are {tokens.dtype} {list(tokens.shape)}, not int32 [windows, length]")
            if int(tokens.min()) < 0:
                raise ValueError(f"{int(tokens.min())} is no token")
            if facts.of is not None and (len(facts.of) != len(tokens) or not set(facts.of) <= (facts.sources or {}).keys()):
                raise ValueError("it does not say of each window which of its texts it is of")
        except ValueError as error:
            raise TokenFacts.damaged(path, error) from None
    return tokens.to(torch.int64), facts


def token_file_shape(path: Path) -> tuple[int, int]:
    """(windows, length) of a saved token file."""
    count, length = _read(path)[0].shape
    return count, length
