"""Documents that are read one by one, each of their tokens predicted once: lm-evaluation-harness's rolling log-likelihood."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from uniprune.common.progress import Progress, silent
from uniprune.common.significance import standard_error
from uniprune.data.bos import Bos
from uniprune.data.documents import JOIN
from uniprune.data.text import Text, TextFacts, open_text
from uniprune.errors import InputError
from uniprune.evaluation.perplexity import Perplexity, by_unit, check_finite, exp, token_nats
from uniprune.models.blocks import BATCH_TOKENS
from uniprune.models.loading import dtype_name


class Piece(NamedTuple):
    """Tokens that are read at once, of which the last ``scored`` are predicted."""

    tokens: list[int]
    scored: int


@dataclass(frozen=True)
class Pages:
    """``pieces``: of all documents. ``words``, ``bytes``: of the documents, as lm-evaluation-harness counts them.

    second_bos: whether BOS is predicted after BOS: a document gets one from lm-evaluation-harness, and one from the tokenizer.
    in_context: whether pieces are as long as the model's context.
    """

    pieces: list[Piece]
    documents: int
    words: int
    bytes: int
    source: str
    length: int
    second_bos: bool
    text_sha256: str
    in_context: bool = True

    @property
    def lengths(self) -> list[int]:
        return [len(piece.tokens) for piece in self.pieces]

    def describe(self) -> TextFacts:
        """The provenance that goes into results."""
        digest = hashlib.sha256(repr([tuple(piece) for piece in self.pieces]).encode()).hexdigest()
        return TextFacts(
            text=self.source,
            length=self.length,
            bos="each",
            rolling=True,
            documents=self.documents,
            pieces=len(self.pieces),
            in_context=self.in_context,
            second_bos=self.second_bos,
            text_sha256=self.text_sha256,
            sha256=digest,
        )


def load_pages(text: Text, tokenizer: Any, length: int, count: int | None = None, bos: Bos | None = None) -> Pages:
    """The documents of a text's evaluation part, the first ``count``, in pieces of at most ``length`` predicted tokens.

    A document begins after BOS, or EOS where there is none. A tokenizer that adds BOS itself gives a second one, as in
    lm-evaluation-harness; ``bos="each"`` leaves that out. WikiText is read page by page, detokenised, as its task ``wikitext``.
    Raises InputError if there is no document, or no tokenizer.
    """
    if tokenizer is None:
        raise InputError(f"the model has no tokenizer, so text {text} cannot be read")
    if bos == "none" or bos == "first":
        raise InputError(
            f"--bos {bos}: with --rolling every document begins with BOS; leave it out, or --bos each for no second one"
        )
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise InputError("the tokenizer has neither BOS nor EOS, one of which begins every document of --rolling")
    pieces: list[Piece] = []
    documents = words = size = 0
    second, content = False, hashlib.sha256()
    for part in open_text(text, "evaluation", tokenizer):
        for read, counted in part.pages():
            if count is not None and documents == count:
                break
            ids = tokenizer.encode(read, add_special_tokens=bos is None)
            second |= ids[:1] == [first]
            content.update(((JOIN if documents else "") + counted).encode())
            pieces += _pieces(first, ids, length)
            documents, words = documents + 1, words + len(re.split(r"\s+", counted))
            size += len(counted.encode())
    if not pieces:
        raise InputError(f"text {text} is empty")
    return Pages(pieces, documents, words, size, text.source, length, second, content.hexdigest())


def _pieces(first: int, ids: list[int], length: int) -> list[Piece]:
    """Every token once; what comes before a piece in the document fills it up."""
    found, every = [], [first, *ids]
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        found.append(Piece(every[max(0, end - length) : end + 1], end - start))
    return found


@torch.no_grad()
def rolling(model: nn.Module, pages: Pages, progress: Progress = silent) -> Perplexity:
    """Perplexity of a model over documents that are read by themselves, as lm-evaluation-harness's rolling log-likelihood."""
    todo = _alike(pages.lengths)
    losses = [0.0] * len(pages.pieces)
    for indices in progress(todo, "evaluating", len(todo)):
        # Padding stands on the right, where no other token sees it; the last token predicts nothing that is asked.
        rows = [torch.tensor(pages.pieces[index].tokens) for index in indices]
        found = token_nats(model, nn.utils.rnn.pad_sequence(rows, batch_first=True), predicts_last=False)
        for index, row in zip(indices, found, strict=True):
            end = len(pages.pieces[index].tokens) - 1
            losses[index] = float(row[end - pages.pieces[index].scored : end].sum())
    nats, tokens = math.fsum(losses), sum(piece.scored for piece in pages.pieces)
    check_finite(nats)
    error = standard_error([loss / piece.scored for loss, piece in zip(losses, pages.pieces, strict=True)])
    dtype, count = dtype_name(next(model.parameters()).dtype), len(pages.pieces)
    facts = by_unit(nats, pages.words, pages.bytes)
    length = pages.length
    return Perplexity(exp(nats / tokens), nats, error, tokens, count, length, length, dtype, pages.describe(), **facts)


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of pieces of about one length, as many as fit into a batch."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not found or (len(found[-1]) + 1) * lengths[found[-1][0]] > BATCH_TOKENS:
            found.append([])
        found[-1].append(index)
    return found
