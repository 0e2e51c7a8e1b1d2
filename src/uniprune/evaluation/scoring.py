"""Log-likelihoods of continuations after contexts, many at once.

The choices of a batch of questions are laid out in one row as a trie of tokens: what several begin with is read once, nothing
is padded, and an attention mask lets every token see those before it in its own choice, as if that stood alone. This shares all
prefixes that a cache could, in one forward pass. A model that does not heed such a mask (a recurrent one, say) reads every
choice whole.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uniprune.common.progress import Progress, silent
from uniprune.errors import InputError
from uniprune.models.blocks import device_of, text_alone

logger = logging.getLogger(__name__)

BATCH_TOKENS = 1024


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


def encode(tokenizer: Any, before: str, after: str, limit: int) -> Tokens:
    """The tokens of a context and its continuation, as lm-evaluation-harness makes them; a model reads the last ``limit``.

    Both are tokenised as one text and split after the context's own tokens; spaces at the context's end belong to the
    continuation. An empty context is the BOS token, or EOS where there is none.
    Raises InputError if the continuation has no token of its own, or more than ``limit``.
    """
    context = before.rstrip()
    text = before + after
    if context:
        ids, start = tokenizer.encode(text), len(tokenizer.encode(context))
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

    The longest question is read both ways: the trie is for models that give the same then.
    """
    first, *rest = _batches(questions)
    longest = [questions[index] for index in first]
    found = _as_checked_trie(model, longest)
    read = _as_trie if found else _whole
    scores = dict(zip(first, found or _whole(model, longest), strict=True))
    for batch in progress(rest, "answering", len(rest)):
        scores |= zip(batch, read(model, [questions[index] for index in batch]), strict=True)
    return [scores[index] for index in range(len(questions))]


def _batches(questions: Sequence[Sequence[Tokens]]) -> list[list[int]]:
    """Indices of questions of like length: about ``BATCH_TOKENS`` tokens if every choice is read whole, but two questions.

    The longest ones come in the first batch, and the longest one last in it: it would see the others but for the mask.
    """
    batches: list[list[int]] = []
    left = 0
    for index in sorted(range(len(questions)), key=lambda index: -max(len(choice.ids) for choice in questions[index])):
        tokens = sum(len(choice.ids) - 1 for choice in questions[index])
        if not batches or (len(batches[-1]) > 1 and tokens > left):
            batches.append([])
            left = BATCH_TOKENS
        batches[-1].insert(0, index)
        left -= tokens
    return batches


def _as_checked_trie(model: nn.Module, questions: Sequence[Sequence[Tokens]]) -> list[list[Score]] | None:
    """The scores from a trie, or None if a model does not heed its mask: if the last question has others when read whole."""
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.05
    try:
        found = _as_trie(model, questions)
        trie, whole = ([one.nats for one in scores] for scores in (found[-1], _whole(model, questions[-1:])[0]))
        same = torch.allclose(torch.tensor(trie), torch.tensor(whole), rtol=tolerance, atol=tolerance)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # its forward pass has no place for the mask
        logger.debug("%s refuses a trie: %s", type(model).__name__, error)
        same = False
    if same:
        return found
    logger.info("%s does not heed masks: every choice is read whole", type(model).__name__)
    return None


# --------------------------------------------------------------------------------------------------------- two ways


class _Trie:
    """Token sequences with what they begin with in common stored once: node -> token, parent, depth."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self._parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def insert(self, ids: Sequence[int]) -> list[int]:
        """The nodes of a sequence, made where there are none yet; a node's parent has a lower index."""
        node, path = -1, []
        for depth, token in enumerate(ids):
            parent, node = node, self._children.setdefault((node, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.depths.append(depth)
                self._parents.append(parent)
            path.append(node)
        return path

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to attention scores, ``[1, 1, nodes, nodes]``: 0 where a node sees itself or an ancestor."""
        sees = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[None, None]


def _as_trie(model: nn.Module, questions: Sequence[Sequence[Tokens]]) -> list[list[Score]]:
    """The scores of all choices from one pass over the trie of all of them."""
    trie, device = _Trie(), device_of(model)
    # The last token of a choice predicts nothing that is asked.
    paths = [[trie.insert(choice.ids[:-1])[-choice.scored :] for choice in question] for question in questions]
    asked = sorted({node for question in paths for path in question for node in path})
    logits = model(
        input_ids=torch.tensor([trie.tokens], device=device),
        position_ids=torch.tensor([trie.depths], device=device),
        attention_mask=trie.mask(next(model.parameters()).dtype).to(device),
        logits_to_keep=torch.tensor(asked, device=device),
        use_cache=False,
    ).logits[0]
    if len(logits) != len(asked):
        raise ValueError("logits_to_keep is not heeded")
    row = {node: index for index, node in enumerate(asked)}
    return [_of_question(logits, row, *pair) for pair in zip(paths, questions, strict=True)]


def _of_question(logits: Tensor, row: dict[int, int], paths: list[list[int]], question: Sequence[Tokens]) -> list[Score]:
    """The scores of one question's choices; log-probabilities of all would take more memory than the pass had taken."""
    nodes = sorted({node for path in paths for node in path})
    place = {node: index for index, node in enumerate(nodes)}
    predicted = logits[[row[node] for node in nodes]].float().log_softmax(-1)
    likeliest = predicted.argmax(-1).tolist()
    pairs = zip(paths, question, strict=True)
    return [_judge(predicted, likeliest, [place[node] for node in path], choice) for path, choice in pairs]


def _whole(model: nn.Module, questions: Sequence[Sequence[Tokens]]) -> list[list[Score]]:
    """The same, every choice in a row of its own. Padding stands on the right, where no other token sees it."""
    device = device_of(model)
    rows = [torch.tensor(choice.ids[:-1], device=device) for question in questions for choice in question]
    with text_alone(model):
        batch = iter(model(input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False).logits)

    def alone(choice: Tokens, logits: Tensor) -> Score:
        end = len(choice.ids) - 1
        predicted = logits[end - choice.scored : end].float().log_softmax(-1)
        return _judge(predicted, predicted.argmax(-1).tolist(), range(choice.scored), choice)

    return [[alone(choice, next(batch)) for choice in question] for question in questions]


def _judge(predicted: Tensor, likeliest: Sequence[int], rows: Sequence[int], choice: Tokens) -> Score:
    """The score of a choice; rows: those of log-probabilities ``[positions, vocabulary]`` that predict its tokens, in order."""
    wanted = choice.ids[-choice.scored :]
    nats = predicted[list(rows), wanted].double().sum()
    return Score(float(nats), [likeliest[row] for row in rows] == wanted)
