"""How close a model's predictions are to another's, token by token: perplexity can hide what this shows.

Both read the same windows. What is kept of each is its final hidden states and its output head, not its logits: those take
vocabulary / width times the memory, and two models need not be in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.common import pictures
from uniprune.common.significance import ratio_error
from uniprune.data.windows import Windows
from uniprune.errors import InputError
from uniprune.evaluation.results import Closeness
from uniprune.models.blocks import device_of, text_alone
from uniprune.models.output_head import Head, at_once, log_probabilities, output_embeddings

PROBE = 16  # tokens on which a head is tried


class Recording:
    """While it is entered, what the output head is given in every pass of a model, in the order of its windows.

    Raises InputError for a model whose logits are not that times its output head.
    """

    def __init__(self, model: nn.Module, windows: Windows) -> None:
        probe = windows.tokens[:1, :PROBE].to(device_of(model))
        self._output = output_embeddings(model)
        self.hidden: list[Tensor] = []  # of each window, [length, width], on the CPU
        with self, text_alone(model), torch.no_grad():
            run = model(input_ids=probe, use_cache=False)
        self.head = Head(model).fit(model, lambda: run, self.hidden.pop()[None].to(device_of(model)))

    def __enter__(self) -> Recording:
        self._hook = self._output.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()

    def _keep(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.hidden += given[0].detach().cpu()

    @property
    def vocabulary(self) -> int:
        return self.head.vocabulary


def check_same_tokens(ours: Windows, theirs: Windows, reference: str) -> None:
    """Raises InputError if two models do not read a text as the same tokens."""
    if ours.sha256 != theirs.sha256:
        raise InputError(
            f"--against {reference}: it reads the text as other tokens, so predictions cannot be compared; "
            "give --tasks without --text to compare answers alone"
        )


@torch.no_grad()
def closeness(ours: Recording, theirs: Recording, windows: Windows) -> Closeness:
    """Compares what two models predicted for the same windows; ``theirs`` is the reference.

    The predictions are those that perplexity counts: a window's last token predicts none, and of overlapping windows
    ``Windows.scored`` says which. Raises InputError if the vocabularies differ.
    """
    if ours.vocabulary != theirs.vocabulary:
        raise InputError(
            f"the model has {ours.vocabulary} tokens and the reference {theirs.vocabulary}; they cannot be compared"
        )
    seen: list[_Seen] = []
    step = at_once(ours.vocabulary)
    counted = pictures.counted(windows.pictures, windows.tokens)[:, :-1]
    for mine, other, counts, scored in zip(ours.hidden, theirs.hidden, counted, windows.scored, strict=True):
        kl, same, length = 0.0, 0, len(mine) - 1
        for start in range(length - scored, length, step):
            piece = slice(start, min(start + step, length))
            a, b = (log_probabilities(one) for one in _logits(ours, mine, theirs, other, piece))
            here = counts[start : start + len(a)].to(a.device)
            kl += float((functional.kl_div(a, b, log_target=True, reduction="none").sum(-1) * here).double().sum())
            same += int(((a.argmax(-1) == b.argmax(-1)) & here).sum())
        seen.append(_Seen(kl, same, int(counts[length - scored :].sum())))
    by_text = {name: Closeness(**_mean([seen[row] for row in rows.tolist()])) for name, rows in windows.by_source.items()}
    found = Closeness(**_mean(seen), length=windows.tokens.shape[1], text=windows.describe())
    return found.model_copy(update={"by_text": by_text}) if by_text else found


class _Seen(NamedTuple):
    """What two models predicted for one window: the sum of the divergences, how many tokens they agree on, and of how many."""

    kl: float
    same: int
    tokens: int


def _mean(seen: Sequence[_Seen]) -> dict[str, Any]:
    """Of :class:`Closeness` what is measured."""
    divergences, same, tokens = zip(*seen, strict=True)
    return {
        "kl": max(0.0, math.fsum(divergences) / sum(tokens)),  # of a model and itself rounding may make a little less
        "kl_stderr": ratio_error(divergences, tokens),
        "agreement": sum(same) / sum(tokens),
        "agreement_stderr": ratio_error(same, tokens),
        "tokens": sum(tokens),
        "windows": len(seen),
    }


def _logits(ours: Recording, mine: Tensor, theirs: Recording, other: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
    return ours.head(mine[piece].to(ours.head.device)), theirs.head(other[piece].to(theirs.head.device))
