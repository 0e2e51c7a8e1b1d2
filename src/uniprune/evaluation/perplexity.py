"""Perplexity as the pruning papers measure it: next-token loss over windows of the test text.

Per token, and per word and byte as lm-evaluation-harness counts them: those compare between tokenizers, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.common.progress import Progress, silent
from uniprune.common.significance import standard_error
from uniprune.data.text import TextFacts
from uniprune.data.windows import Windows
from uniprune.errors import InputError
from uniprune.models.blocks import batches, device_of
from uniprune.models.loading import dtype_name

NOT_FINITE = "the model's loss is not finite: it overflows, or its weights are broken; try --dtype float32 or bfloat16"
POSITIONS = {"1-512": 512, "512-2k": 2048, "2k-8k": 8192, "8k-": 1 << 62}  # tokens that a prediction sees, at most


@dataclass(frozen=True)
class Perplexity:
    """``perplexity`` = exp(total nats / predicted tokens); everything that is needed to get the number again.

    ``nats_stderr``: standard error of the mean nats per token, by how windows differ: what other windows of such text would
    have changed. About the relative error of the perplexity; two models read on the same windows differ by less.
    ``stride``: tokens from one window to the next; fewer than ``length`` if they overlap.
    ``word_perplexity``, ``byte_perplexity``: exp(nats / words), / bytes, of the text that is predicted, if that is known.
    ``by_position``: the token perplexity by how many tokens of its window a prediction saw.
    """

    perplexity: float
    nats: float
    nats_stderr: float | None
    tokens: int
    windows: int
    length: int
    stride: int
    dtype: str
    text: TextFacts
    word_perplexity: float | None = None
    byte_perplexity: float | None = None
    words: int | None = None
    bytes: int | None = None
    by_position: dict[str, float] | None = None


@torch.no_grad()
def perplexity(model: nn.Module, windows: Windows, progress: Progress = silent) -> Perplexity:
    """Perplexity of a model: each window is read by itself, its first token is given and the rest predicted.

    Of overlapping windows the tokens are predicted that no window before had.
    """
    losses: list[float] = []
    count, length = windows.tokens.shape
    positions, seen = torch.zeros(length - 1, dtype=torch.float64), torch.zeros(length - 1, dtype=torch.int64)
    scored, done = windows.scored, 0
    todo = batches(windows.tokens)
    for batch in progress(todo, "evaluating", len(todo)):
        for row in token_nats(model, batch):
            first = length - 1 - scored[done]
            losses.append(float(row[first:].sum()))
            positions[first:] += row[first:].cpu()
            seen[first:] += 1
            done += 1
    nats, tokens = sum(losses), sum(scored)
    check_finite(nats)
    error = standard_error([loss / number for loss, number in zip(losses, scored, strict=True)])
    facts = by_unit(nats, windows.words, windows.size) | {"by_position": _by_position(positions, seen)}
    dtype, stride = dtype_name(next(model.parameters()).dtype), windows.stride or length
    return Perplexity(exp(nats / tokens), nats, error, tokens, count, length, stride, dtype, windows.describe(), **facts)


def token_nats(model: nn.Module, batch: Tensor, predicts_last: bool = True) -> list[Tensor]:
    """Next-token losses in nats, float64 ``[length - 1]``, of each window of ``[windows, length]``.

    predicts_last: whether the model reads the last token, too, whose prediction is not asked for.
    """
    batch = batch.to(device_of(model))
    logits = model(input_ids=batch if predicts_last else batch[:, :-1], use_cache=False).logits
    return [
        functional.cross_entropy(one[: batch.shape[1] - 1].float(), target[1:], reduction="none").double()
        for one, target in zip(logits, batch, strict=True)  # one window at a time: float32 logits are large
    ]


def check_finite(nats: float) -> None:
    """Raises InputError for a loss that is no number."""
    if not math.isfinite(nats):
        raise InputError(NOT_FINITE)


def exp(nats: float) -> float:
    """The perplexity of mean nats; infinite where it is beyond all numbers."""
    return math.exp(nats) if nats < 700 else math.inf


def by_unit(nats: float, words: int | None, size: int | None) -> dict[str, Any]:
    """The perplexities per word and per byte, as the harness has them, where those are known."""
    if not words or not size:
        return {}
    return {"word_perplexity": exp(nats / words), "byte_perplexity": exp(nats / size), "words": words, "bytes": size}


def _by_position(nats: Tensor, seen: Tensor) -> dict[str, float]:
    found, start = {}, 0
    for name, end in POSITIONS.items():
        if count := int(seen[start:end].sum()):
            found[name] = exp(float(nats[start:end].sum()) / count)
        start = end
    return found
