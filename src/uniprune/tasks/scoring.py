"""Log-likelihoods of continuations after contexts, many at once.

The choices of questions are laid out in a row as a trie of tokens: what several begin with is read once, and an attention mask
lets every token see those before it in its own choice, as if that stood alone. This shares all prefixes that a cache could, in
one forward pass. Attention costs the square of a row's length, so a batch is several rows, filled to about the same length; the
output head reads only those tokens whose predictions are asked for. A model that does not heed such a mask (a recurrent one,
say) reads every choice whole, and one whose layers see the last few tokens alone does where there are more of them.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from uniprune.checkpoints.configuration import UNBOUNDED, setting
from uniprune.common.progress import Progress, silent
from uniprune.errors import InputError
from uniprune.models.blocks import device_of, dtype_of, text_alone
from uniprune.models.output_head import at_once

logger = logging.getLogger(__name__)

BATCH_TOKENS = 1024
ROW_TOKENS = 192  # rows are at least as long: shorter ones would be padded more
CACHED = 16  # positions whose log-probabilities stay in a processor's cache
JOINED_TOKENS = 2048  # questions of one beginning share a row up to this length
ROUNDING = {True: 1e-3, False: 0.35}  # nats a token in float32, and in bfloat16, where half of that was seen
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # what configurations call how far some layers see


class Tokens(NamedTuple):
    """A context and its continuation as token ids, of which the last ``scored`` are the continuation.

    ``cut``: how many tokens of the context are left out at its beginning, since the model cannot read as many.
    """

    ids: list[int]
    scored: int
    cut: int = 0


class Score(NamedTuple):
    """Of a continuation: its log-likelihood in nats, and whether every token of it is the likeliest (greedy decoding)."""

    nats: float
    greedy: bool


def encode(tokenizer: Any, before: str, after: str, limit: int, known: dict[str, int] | None = None) -> Tokens:
    """The tokens of a context and its continuation, as lm-evaluation-harness makes them; a model reads the last ``limit``.

    Both are tokenised as one text and split after the context's own tokens; spaces at the context's end belong to the
    continuation. An empty context is the BOS token, or EOS where there is none. known: lengths of contexts, kept for others.
    Raises InputError if the continuation has no token of its own, or more than ``limit``.
    """
    context = before.rstrip()
    text = before + after
    if context:
        known = {} if known is None else known
        if context not in known:
            known[context] = len(tokenizer.encode(context))
        ids, start = tokenizer.encode(text), known[context]
    else:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids, start = tokenizer.encode(text, add_special_tokens=False), 1
        ids = ids if ids[:1] == [first] else [first, *ids]
    scored = len(ids) - start
    if not 0 < scored <= limit:
        raise InputError(f"the answer {after!r} has {scored} tokens of its own; this model can score 1 to {limit}")
    return Tokens(ids[-(limit + 1) :], scored, max(0, len(ids) - limit - 1))


@torch.no_grad()
def score(model: nn.Module, questions: Sequence[Sequence[Tokens]], progress: Progress = silent) -> list[list[Score]]:
    """The score of every choice of every question. Softmax in float32, whatever the model computes in.

    The longest questions are read both ways: the trie is for models that give the same then.
    """
    if not questions:
        return []
    batches = _batches(questions, _reach(model))
    shared = next((batch.rows for batch in batches if batch.fits), None)
    heeds = shared is not None and _heeds_masks(model, questions, shared)
    if not heeds:
        logger.info("%s does not heed masks: every choice is read whole", type(model).__name__)
    scores: Scores = {}
    for batch in progress(batches, "answering", len(batches)):
        scores |= (_as_trie if heeds and batch.fits else _whole)(model, questions, batch.rows)
    return [scores[index] for index in range(len(questions))]


# -------------------------------------------------------------------------------------------------------------- batches

Rows = list[list[int]]
"""The questions (their indices) of each row."""


class _Batch(NamedTuple):
    """Rows that are read together, and whether the model sees all of each."""

    rows: Rows
    fits: bool


class _Unit(NamedTuple):
    """Questions that stand together since they begin alike, and how many tokens they have."""

    questions: list[int]
    size: int


def _batches(questions: Sequence[Sequence[Tokens]], reach: int = UNBOUNDED) -> list[_Batch]:
    """Rows of about one length, ``BATCH_TOKENS`` tokens a batch, but one row at least.

    The longest question comes in the first batch, at the end of a row with another: it would see that one but for the mask.
    reach: how many tokens of a row a model sees; questions that are longer come before all others, each in a batch of its own.
    """
    units = sorted(_units(questions, min(JOINED_TOKENS, reach)), key=lambda unit: unit.size)
    batches = [_Batch([unit.questions], fits=False) for unit in units if unit.size > reach]
    left = [unit for unit in units if unit.size <= reach]
    sizes = [unit.size for unit in left]
    begun = False
    while left:
        length = min(reach, max(ROW_TOKENS, sizes[-1] + (sizes[0] if not begun and len(sizes) > 1 else 0)))
        rows: Rows = []
        while left and (not rows or (len(rows) + 1) * length <= BATCH_TOKENS):
            rows.append([])
            room = length
            while place := bisect_right(sizes, room):  # the largest that fits
                room -= sizes.pop(place - 1)
                rows[-1][:0] = left.pop(place - 1).questions
        batches.append(_Batch(rows, fits=True))
        begun = True
    return batches


def _units(questions: Sequence[Sequence[Tokens]], most: int) -> Iterator[_Unit]:
    """Questions in the order of their tokens, those together of which each shares half of it with the one before (few-shot).

    most: tokens of several that stand together.
    """
    indices: list[int] = []
    last = None
    size = 0
    for index in sorted(range(len(questions)), key=lambda index: questions[index][0].ids):
        ids = questions[index][0].ids
        whole = _size(questions[index])
        shared = _common(last, ids) if last is not None else 0
        if indices and (2 * shared < whole or size + whole - shared > most):
            yield _Unit(indices, size)
            indices = []
            size = 0
            shared = 0
        indices.append(index)
        size, last = size + whole - shared, ids
    yield _Unit(indices, size)


def _size(question: Sequence[Tokens]) -> int:
    """How many tokens of a question are read."""
    return len(_laid_out([question])[0].tokens)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


# --------------------------------------------------------------------------------------------------------- two ways

Scores = dict[int, list[Score]]


def _heeds_masks(model: nn.Module, questions: Sequence[Sequence[Tokens]], batch: Rows) -> bool:
    """Whether questions of the first row, and that with the longest choice, are the same when every choice is read whole.

    Choices that lie apart in their row tell: where positions are counted along it (ALiBi), the others are right anyway.
    """
    deepest = max(chain(*batch), key=lambda index: max(len(choice.ids) for choice in questions[index]))
    rows = [batch[0], *([] if deepest in batch[0] else [[deepest]])]
    try:
        by_trie = _as_trie(model, questions, rows)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # its forward pass has no place for the mask
        logger.debug("%s refuses a trie: %s", type(model).__name__, error)
        return False
    whole = _whole(model, questions, [list({*_telling(questions, batch[0]), deepest})])
    return all(
        _agree(model, *three) for index in whole for three in zip(by_trie[index], whole[index], questions[index], strict=True)
    )


def _telling(questions: Sequence[Sequence[Tokens]], row: Sequence[int]) -> list[int]:
    """Questions of a row whose choices have most of others' tokens in between: one at least, about a batch to read."""
    trie = _Trie()
    gaps = dict[int, int]()
    for index in row:
        paths = [trie.insert(choice.ids[:-1]) for choice in questions[index]]
        gaps[index] = max((after - before for path in paths for before, after in pairwise(path)), default=0)
    chosen = list[int]()
    tokens = 0
    for index in sorted(row, key=lambda index: -gaps[index]):
        if not chosen or tokens < BATCH_TOKENS:
            chosen.append(index)
            tokens += sum(len(choice.ids) for choice in questions[index])
    return chosen


def _agree(model: nn.Module, first: Score, second: Score, choice: Tokens) -> bool:
    """Whether two log-likelihoods differ by no more than rounding makes them, which tokens do independently."""
    tolerance = ROUNDING[dtype_of(model) == torch.float32] * math.sqrt(choice.scored)
    return first.nats == second.nats or abs(first.nats - second.nats) <= tolerance


def _reach(model: nn.Module) -> int:
    """How long a row of tries may be: layers that see the last few tokens alone count them along the row, or not at all."""
    sizes = [setting(model.config, name) for name in WINDOWS]
    return min([UNBOUNDED, *(size for size in sizes if isinstance(size, int) and size > 0)])


class _Trie:
    """Token sequences with what they begin with in common stored once: node -> token, parent, depth."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self._parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def insert(self, ids: Sequence[int]) -> list[int]:
        """The nodes of a sequence, made where there are none yet; a node's parent has a lower index."""
        node = -1
        path = []
        for depth, token in enumerate(ids):
            parent, node = node, self._children.setdefault((node, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.depths.append(depth)
                self._parents.append(parent)
            path.append(node)
        return path

    def sees(self) -> np.ndarray:
        """Whether a node sees another, ``[nodes, nodes]``: itself and its ancestors."""
        visible = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                visible[node] |= visible[parent]
        return visible


def _as_trie(model: nn.Module, questions: Sequence[Sequence[Tokens]], batch: Rows) -> Scores:
    """The scores of all choices from one pass over the tries of a batch."""
    device = device_of(model)
    dtype = dtype_of(model)
    tries, paths = zip(*(_laid_out([questions[index] for index in row]) for row in batch), strict=True)
    length = max(len(trie.tokens) for trie in tries)
    tokens, depths = (torch.zeros(len(tries), length, dtype=torch.int64) for _ in range(2))
    sees = torch.eye(length, dtype=torch.bool).repeat(len(tries), 1, 1)  # padding sees itself: no row of the mask is empty
    for number, trie in enumerate(tries):
        size = len(trie.tokens)
        tokens[number, :size], depths[number, :size] = torch.tensor(trie.tokens), torch.tensor(trie.depths)
        sees[number, :size, :size] = torch.from_numpy(trie.sees())
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    places = [number * length + node for number, row in enumerate(paths) for path in row for node in chain(*path)]
    asked = sorted(set(places))
    with _predicting(model, torch.tensor(asked, device=device), tokens.shape):
        logits = model(
            input_ids=tokens.to(device),
            position_ids=depths.to(device),
            attention_mask=mask[:, None].to(device),
            use_cache=False,
        ).logits[0]
    judge = _Judge(logits)
    rows = {place: row for row, place in enumerate(asked)}
    return {
        index: [
            judge([rows[number * length + node] for node in path], choice)
            for path, choice in zip(found, questions[index], strict=True)
        ]
        for number, (indices, row) in enumerate(zip(batch, paths, strict=True))
        for index, found in zip(indices, row, strict=True)
    }


def _laid_out(questions: Sequence[Sequence[Tokens]]) -> tuple[_Trie, list[list[list[int]]]]:
    """The trie of the questions of a row, and for each choice the nodes that predict its scored tokens."""
    trie = _Trie()
    # The last token of a choice predicts nothing that is asked.
    return trie, [[trie.insert(choice.ids[:-1])[-choice.scored :] for choice in question] for question in questions]


@contextmanager
def _predicting(model: nn.Module, places: Tensor, shape: torch.Size) -> Iterator[None]:
    """Inside ``with``, the output head reads the hidden states of these places alone, of a batch ``[rows, length]``.

    Raises ValueError for a model whose head is not there, or given anything else.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ValueError("no output head")

    def select(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not given or given[0].shape[:2] != shape:
            raise ValueError("the output head is given something else than all hidden states")
        return given[0].flatten(0, 1)[places][None], *given[1:]

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _whole(model: nn.Module, questions: Sequence[Sequence[Tokens]], batch: Rows) -> Scores:
    """The same, every choice in a row of its own. Padding stands on the right, where no other token sees it."""
    device = device_of(model)
    choices = [(index, number) for row in batch for index in row for number in range(len(questions[index]))]
    choices.sort(key=lambda place: -len(questions[place[0]][place[1]].ids))
    scores: Scores = {index: [Score(0.0, False)] * len(questions[index]) for index, _ in choices}
    while choices:
        count = max(1, BATCH_TOKENS // len(questions[choices[0][0]][choices[0][1]].ids))
        together, choices = choices[:count], choices[count:]
        rows = [torch.tensor(questions[index][number].ids[:-1], device=device) for index, number in together]
        with text_alone(model):
            logits = model(input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False).logits
        for (index, number), predicted in zip(together, logits, strict=True):
            choice = questions[index][number]
            end = len(choice.ids) - 1
            scores[index][number] = _Judge(predicted[end - choice.scored : end])(range(choice.scored), choice)
    return scores


class _Judge:
    """Scores from logits ``[positions, vocabulary]``, a piece at a time: log-probabilities of all would take as much again."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        size = CACHED if logits.device.type == "cpu" else at_once(logits.shape[-1])
        pieces = [(piece.float().logsumexp(-1), piece.argmax(-1)) for piece in torch.split(logits, size)]
        total, likeliest = zip(*pieces, strict=True)
        self._total, self._likeliest = torch.cat(total), torch.cat(likeliest).tolist()

    def __call__(self, rows: Sequence[int], choice: Tokens) -> Score:
        """rows: the positions that predict the tokens of a choice, in order."""
        wanted = choice.ids[-choice.scored :]
        places = list(rows)
        nats = (self._logits[places, wanted].float() - self._total[places]).double().sum()
        return Score(float(nats), [self._likeliest[place] for place in places] == wanted)
