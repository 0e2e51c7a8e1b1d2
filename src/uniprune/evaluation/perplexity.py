"""Perplexity as the pruning papers measure it, next-token loss over windows of the test text; and as lm-evaluation-harness
does, over documents that are read one by one, each of their tokens predicted once (its rolling log-likelihood).

Per token, and per word and byte as lm-evaluation-harness counts them: those compare between tokenizers, too.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uniprune.common import pictures
from uniprune.common.progress import Progress, silent
from uniprune.common.significance import ratio_error
from uniprune.data.bos import Bos
from uniprune.data.documents import JOIN
from uniprune.data.text import Text, TextFacts, open_text
from uniprune.data.windows import Windows, warn_of_skipped
from uniprune.errors import InputError
from uniprune.evaluation.results import PerplexityFacts, TextPerplexity
from uniprune.models.blocks import BATCH_TOKENS, batches, called, device_of, dtype_of
from uniprune.models.loading import dtype_name
from uniprune.models.output_head import at_once, log_probabilities

NOT_FINITE = "the model's loss is not finite: it overflows, or its weights are broken; try --dtype float32 or bfloat16"
POSITIONS = {"1-512": 512, "512-2k": 2048, "2k-8k": 8192, "8k-": 1 << 62}  # tokens that a prediction sees, at most


class Perplexity(PerplexityFacts):
    """A perplexity that was measured, so that it is a number."""

    perplexity: float


@torch.no_grad()
def perplexity(model: nn.Module, windows: Windows, progress: Progress = silent) -> Perplexity:
    """Perplexity of a model: each window is read by itself, its first token is given and the rest predicted.

    Of overlapping windows, each predicts the tokens that the one before does not; if they are only some of a text's windows,
    each its last ``stride`` tokens.
    """
    losses: list[float] = []
    count, length = windows.tokens.shape
    positions = torch.zeros(length - 1, dtype=torch.float64)
    seen = torch.zeros(length - 1, dtype=torch.int64)
    counted = pictures.counted(windows.pictures, windows.tokens)[:, :-1]
    tokens = list[int]()
    done = 0
    todo = batches(windows.tokens)
    for batch in progress(todo, "evaluating", len(todo)):
        for row in token_nats(model, batch):
            first = length - 1 - windows.scored[done]
            counts = counted[done, first:]
            mine = row[first:] if windows.pictures is None else row[first:][counts.to(row.device)]
            losses.append(float(mine.sum()))
            tokens.append(int(counts.sum()))
            positions[first:] += row[first:].cpu() * counts
            seen[first:] += counts
            done += 1
    nats, total = sum(losses), sum(tokens)
    check_finite(nats)
    return Perplexity(
        dtype=dtype_name(dtype_of(model)),
        perplexity=exp(nats / total),
        nats=nats,
        nats_stderr=ratio_error(losses, tokens),
        tokens=total,
        windows=count,
        length=length,
        stride=windows.stride or length,
        text=windows.describe(),
        **by_unit(nats, windows.words, windows.size),
        by_position=_by_position(positions, seen),
        by_text={name: _of_text(losses, tokens, rows.tolist()) for name, rows in windows.by_source.items()} or None,
    )


def _of_text(losses: Sequence[float], tokens: Sequence[int], rows: Sequence[int]) -> TextPerplexity:
    """The perplexity on some of the windows."""
    count = sum(tokens[row] for row in rows)
    return TextPerplexity(
        perplexity=exp(sum(losses[row] for row in rows) / count),
        nats_stderr=ratio_error([losses[row] for row in rows], [tokens[row] for row in rows]),
        tokens=count,
        windows=len(rows),
    )


def token_nats(model: nn.Module, batch: Tensor, predicts_last: bool = True) -> list[Tensor]:
    """Next-token losses in nats, float64 ``[length - 1]``, of each window of ``[windows, length]``.

    predicts_last: whether the model reads the last token, too, whose prediction is not asked for.
    """
    batch = batch.to(device_of(model))
    logits = chain.from_iterable(output.logits for output in called(model, model, batch if predicts_last else batch[:, :-1]))
    return [_losses(row[: batch.shape[1] - 1], target[1:]) for row, target in zip(logits, batch, strict=True)]


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    """The losses of one window, a piece at a time: logits in float32, over a large vocabulary, are large."""
    step = at_once(logits.shape[-1])
    pieces = zip(torch.split(logits, step), torch.split(target, step), strict=True)
    return -torch.cat([log_probabilities(piece, wanted) for piece, wanted in pieces]).double()


def check_finite(nats: float) -> None:
    """Raises InputError for a loss that is no number."""
    if not math.isfinite(nats):
        raise InputError(NOT_FINITE)


def exp(nats: float) -> float:
    """The perplexity of mean nats; infinite where it is beyond all numbers."""
    return math.exp(nats) if nats < 700 else math.inf


def by_unit(nats: float, words: int | None, size: int | None) -> dict[str, Any]:
    """The perplexities per word and per byte, as the harness has them; None where those are not known."""
    if not words or not size:
        return dict.fromkeys(("word_perplexity", "byte_perplexity", "words", "bytes"))
    return {"word_perplexity": exp(nats / words), "byte_perplexity": exp(nats / size), "words": words, "bytes": size}


def _by_position(nats: Tensor, seen: Tensor) -> dict[str, float]:
    perplexities, start = {}, 0
    for name, end in POSITIONS.items():
        if count := int(seen[start:end].sum()):
            perplexities[name] = exp(float(nats[start:end].sum()) / count)
        start = end
    return perplexities


# ------------------------------------------------------------------------------------------------------------- documents


class Piece(NamedTuple):
    """Tokens that are read at once, of which the last ``scored`` are predicted; ``document``: which one they are of."""

    tokens: list[int]
    scored: int
    document: int


@dataclass(frozen=True)
class Documents:
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

    def summed(self, losses: Sequence[float]) -> tuple[list[float], list[int]]:
        """By document, the losses of its pieces and its predicted tokens."""
        totals = [0.0] * self.documents
        tokens = [0] * self.documents
        for loss, piece in zip(losses, self.pieces, strict=True):
            totals[piece.document] += loss
            tokens[piece.document] += piece.scored
        return totals, tokens

    def describe(self) -> TextFacts:
        """The provenance that goes into results."""
        digest = hashlib.sha256(repr([(piece.tokens, piece.scored) for piece in self.pieces]).encode()).hexdigest()
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


def load_documents(text: Text, tokenizer: Any, length: int, count: int | None = None, bos: Bos | None = None) -> Documents:
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
    second = False
    content = hashlib.sha256()
    parts = open_text(text, "evaluation", tokenizer)
    for part in parts:
        for read, counted in part.pages():
            if count is not None and documents == count:
                break
            ids = tokenizer.encode(read, add_special_tokens=bos is None)
            second |= ids[:1] == [first]
            content.update(((JOIN if documents else "") + counted).encode())
            pieces += _pieces(first, ids, length, documents)
            documents += 1
            words += len(re.split(r"\s+", counted))
            size += len(counted.encode())
    if not pieces:
        raise InputError(f"text {text} is empty")
    warn_of_skipped(text, parts)
    return Documents(pieces, documents, words, size, text.source, length, second, content.hexdigest())


def _pieces(first: int, ids: list[int], length: int, document: int) -> list[Piece]:
    """Every token once; what comes before a piece in the document fills it up."""
    pieces = []
    every = [first, *ids]
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        pieces.append(Piece(every[max(0, end - length) : end + 1], end - start, document))
    return pieces


@torch.no_grad()
def rolling(model: nn.Module, documents: Documents, progress: Progress = silent) -> Perplexity:
    """Perplexity of a model over documents that are read by themselves, as lm-evaluation-harness's rolling log-likelihood."""
    todo = _alike(documents.lengths)
    losses = [0.0] * len(documents.pieces)
    for indices in progress(todo, "evaluating", len(todo)):
        # Padding stands on the right, where no other token sees it; the last token predicts nothing that is asked.
        rows = [torch.tensor(documents.pieces[index].tokens) for index in indices]
        nats_by_row = token_nats(model, nn.utils.rnn.pad_sequence(rows, batch_first=True), predicts_last=False)
        for index, row in zip(indices, nats_by_row, strict=True):
            end = len(documents.pieces[index].tokens) - 1
            losses[index] = float(row[end - documents.pieces[index].scored : end].sum())
    nats = math.fsum(losses)
    tokens = sum(piece.scored for piece in documents.pieces)
    check_finite(nats)
    return Perplexity(
        dtype=dtype_name(dtype_of(model)),
        perplexity=exp(nats / tokens),
        nats=nats,
        nats_stderr=ratio_error(*documents.summed(losses)),
        tokens=tokens,
        windows=len(documents.pieces),
        length=documents.length,
        stride=documents.length,
        text=documents.describe(),
        **by_unit(nats, documents.words, documents.bytes),
        by_position=None,
        by_text=None,
    )


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of pieces of about one length, as many as fit into a batch."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(index)
    return groups
