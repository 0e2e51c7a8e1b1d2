"""Perplexity as the pruning papers measure it: next-token loss over non-overlapping windows of the test text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.common.progress import Progress, silent
from uniprune.common.significance import standard_error
from uniprune.data.text import TextFacts, Windows
from uniprune.errors import InputError
from uniprune.models.blocks import batches, device_of
from uniprune.models.loading import dtype_name

NOT_FINITE = "the model's loss is not finite: it overflows, or its weights are broken; try --dtype float32 or bfloat16"


@dataclass(frozen=True)
class Perplexity:
    """``perplexity`` = exp(total nats / predicted tokens); everything that is needed to get the number again.

    ``nats_stderr``: standard error of the mean nats per token, by how windows differ: what other windows of such text would
    have changed. About the relative error of the perplexity; two models read on the same windows differ by less.
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


@torch.no_grad()
def perplexity(model: nn.Module, windows: Windows, progress: Progress = silent) -> Perplexity:
    """Token perplexity of a model: each window is read by itself, its first token is given and the rest predicted."""
    losses: list[float] = []
    todo = batches(windows.tokens)
    for batch in progress(todo, "evaluating", len(todo)):
        losses += window_nats(model, batch).tolist()
    count, length = windows.tokens.shape
    nats, tokens = sum(losses), count * (length - 1)
    dtype = dtype_name(next(model.parameters()).dtype)
    if not math.isfinite(nats):
        raise InputError(NOT_FINITE)
    error = standard_error([loss / (length - 1) for loss in losses])
    value = math.exp(nats / tokens) if nats / tokens < 700 else math.inf
    return Perplexity(value, nats, error, tokens, count, length, length, dtype, windows.describe())


def window_nats(model: nn.Module, batch: Tensor) -> Tensor:
    """Total next-token loss in nats, float64 ``[windows]``, of token windows ``[windows, length]``."""
    batch = batch.to(device_of(model))
    logits = model(input_ids=batch, use_cache=False).logits
    losses = [
        functional.cross_entropy(one[:-1].float(), target[1:], reduction="none").double().sum()
        for one, target in zip(logits, batch, strict=True)  # one window at a time: float32 logits are large
    ]
    return torch.stack(losses)
