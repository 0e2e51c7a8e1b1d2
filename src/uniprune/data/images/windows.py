"""Images with text -> windows of tokens, by the model's own processor: one image in each, and text after it to the end.

A window has one length like any other. What a sample's own text leaves of it is filled with the texts of the samples after it;
where it is longer, its text is cut, never its image.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from uniprune.common.pictures import Given, Pictures, key
from uniprune.data.bos import Bos
from uniprune.data.documents import JOIN, undated
from uniprune.data.images.rows import Pair, opened, pairs
from uniprune.data.text import Sample, Text, Use
from uniprune.data.windows import Windows
from uniprune.errors import InputError, first_line

logger = logging.getLogger(__name__)

ROUND = 64  # tokens: the default length is a multiple
DIFFER = "give rows whose texts differ, such as a question with its answer"
SPARE = 4  # as many samples again are drawn, for those that do not fit


@dataclass(frozen=True)
class Encoded:
    """A sample as a model is given it: ids ``[tokens]``, and what goes with them. end: behind the last token of its image."""

    ids: Tensor
    given: Given
    end: int


@dataclass(frozen=True)
class ImageProcessing:
    """A model's processor and configuration."""

    processor: Any
    config: Any


def load(
    text: Text, processing: ImageProcessing, use: Use, length: int | None, count: int | None, seed: int = 0, most: int = 1 << 30
) -> Windows:
    """``count`` windows of a data set of images and text, drawn by ``seed``; of all rows in order to evaluate, if that is None.

    length: of a window; by default that of the longest sample, and ``most`` at most.
    Of samples with the same tokens only the first is taken, whatever their images, since a window's image is found by its
    tokens (``common.pictures``); a warning says how many are left out.
    Raises InputError for a sample that cannot be read, and if too few fit.
    """
    drawn = _drawn(pairs(text, use), use, count, seed)
    if not drawn:
        raise InputError(f"text {text} has no row with an image and a text")
    wanted = count or len(drawn)
    reader = _Reader(processing.processor, processing.config, text)
    samples = [reader.encode(pair) for pair in drawn[:wanted]]
    size = length or min(most, -(-max(len(sample.ids) for sample in samples) // ROUND) * ROUND)
    texts = cycle([pair.text for pair in drawn])
    given: dict[bytes, Given] = {}
    windows: list[Tensor] = []
    alike = 0  # samples that have the tokens of another, so that their images could not be told apart
    for sample in chain(samples, (reader.encode(pair) for pair in drawn[wanted:])):
        if sample.end > size:
            continue
        ids, along = reader.finished(sample, size, texts)
        if key(ids) in given:
            alike += 1
        else:
            given[key(ids)] = along
            windows.append(ids)
        if len(windows) == wanted:
            break  # images are slow to read, and one that nobody needs may not be readable
    if len(windows) < (count or 1):
        need = min(sample.end for sample in samples)
        reason = f"an image takes {need} tokens or more: raise --length, or lower --num-samples"
        if alike:
            reason = f"{alike} more have the same tokens as another: {DIFFER}, or lower --num-samples"
        raise InputError(
            f"text {text}: {len(windows)} images with text fit into {size} tokens, {count or 1} were asked for; {reason}"
        )
    if alike:
        logger.warning(
            "text %s: %d images with text are left out, which have the same tokens as another, and %d are taken: %s",
            text,
            alike,
            len(windows),
            DIFFER,
        )
    tokens = torch.stack(windows)
    start = reader.bos
    bos: Bos = "each" if start is not None and bool((tokens[:, 0] == start).all()) else "none"
    read = Sample(whole=len(windows) == len(drawn), documents=len(drawn))
    return Windows(tokens, text.source, len(drawn), bos, start, sample=read, pictures=Pictures(given, reader.tokens))


def _drawn(rows: Iterator[Pair], use: Use, count: int | None, seed: int) -> list[Pair]:
    """Some of the rows, each with the same chance, in random order; to evaluate the first ones. Some are to spare."""
    wanted = None if count is None else count * SPARE
    if use == "evaluation" or wanted is None:
        return list(islice(rows, wanted))
    rng = random.Random(seed)
    kept: list[Pair] = []
    for number, row in enumerate(rows):
        if number < wanted:
            kept.append(row)
        elif (place := rng.randrange(number + 1)) < wanted:
            kept[place] = row
    rng.shuffle(kept)
    return kept


class _Reader:
    """Encodes samples as a processor does. tokens: the ids that stand for an image; bos: that of BOS."""

    def __init__(self, processor: Any, config: Any, text: Text) -> None:
        self._processor = processor
        ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        self.tokens = tuple(token for token in ids if isinstance(token, int))
        if not self.tokens:
            raise InputError(
                f"text {text} has images, but the configuration of a {config.model_type} names no token that stands for one "
                "(image_token_id); take the text alone: --field text"
            )
        self.bos: int | None = processor.tokenizer.bos_token_id

    def encode(self, pair: Pair) -> Encoded:
        try:
            made = dict(self._run(opened(pair), pair.text))
        except InputError:
            raise
        except Exception as error:  # processors fail in their own ways
            raise InputError(f"{pair.where}: {type(self._processor).__name__} refuses it: {first_line(error)}") from error
        ids = made.pop("input_ids")[0].to(torch.int64)
        made.pop("attention_mask", None)  # all ones: there is no padding
        places = torch.isin(ids, torch.tensor(self.tokens)).nonzero()
        if not len(places):
            raise InputError(f"{pair.where}: {type(self._processor).__name__} made no token of its image")
        return Encoded(ids, made, int(places[-1]) + 1)

    def _run(self, image: Any, text: str) -> Any:
        processor = self._processor
        options = {"return_tensors": "pt"}
        marker = getattr(processor, "image_token", None) or ""
        if getattr(processor, "chat_template", None) and not (marker and marker in text):
            content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
            turns = [{"role": "user", "content": content}]
            return processor.apply_chat_template(turns, tokenize=True, return_dict=True, **options, **undated(processor))
        return processor(images=[image], text=text if marker in text else f"{marker}{text}", **options)

    def finished(self, sample: Encoded, length: int, texts: Iterator[str]) -> tuple[Tensor, Given]:
        """A sample as a window: cut, or filled with more text; what has a value for each of its tokens goes along."""
        ids = sample.ids
        own = len(ids)
        while len(ids) < length:
            ids = torch.cat([ids, self._plain(JOIN + next(texts))])
        along = {name: value for name, value in sample.given.items() if tuple(value.shape[:2]) == (1, own) and value.ndim == 2}
        padded = {name: functional.pad(value, (0, max(0, length - own)))[:, :length] for name, value in along.items()}
        return ids[:length], sample.given | padded

    def _plain(self, text: str) -> Tensor:
        ids = self._processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
