"""What models write, greedily: answers to tasks, and continuations of the same prompts side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from uniprune.checkpoints.configuration import check_vocabulary, context
from uniprune.common.progress import Progress, silent
from uniprune.data.windows import Windows
from uniprune.errors import InputError
from uniprune.evaluation.results import Generation
from uniprune.models.blocks import device_of, dtype_of, text_alone
from uniprune.models.generation import greedy
from uniprune.models.output_head import log_probabilities
from uniprune.tasks.question import Prompt, Question
from uniprune.tasks.scoring import ROUNDING, Tokens

logger = logging.getLogger(__name__)

COUNT, BEGIN = 3, 24  # prompts from a text, and tokens in each
BATCH = 8  # answers that are written together


def prompts_of(windows: Windows, tokenizer: Any, context: int) -> list[str]:
    """Prompts from a text: the beginnings of windows spread over it, decoded; a quarter of the context at most."""
    count = min(COUNT, len(windows.tokens))
    rows = torch.arange(count) * (len(windows.tokens) - 1) // max(count - 1, 1)
    decoded = (tokenizer.decode(row, skip_special_tokens=True) for row in windows.tokens[rows, : min(BEGIN, context // 4)])
    return [prompt for prompt in decoded if prompt.strip()]


def check_prompts(prompts: Sequence[str], tokenizer: Any, tokens: int, config: Any) -> None:
    """Raises InputError if a prompt is empty, has tokens that a model lacks, or leaves it no room for ``tokens`` more."""
    if tokens < 0:
        raise InputError(f"--new-tokens {tokens} is negative")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError(f"--prompt {prompt!r:.60} is not UTF-8; set a locale that is, such as LC_ALL=C.UTF-8") from None
        ids, room = tokenizer.encode(prompt), context(config)
        if not ids:
            raise InputError("--prompt is empty; give some text to go on with")
        check_vocabulary(config, max(ids), f"prompt {prompt!r:.60}")
        if len(ids) + tokens > room:
            raise InputError(f"a prompt of {len(ids)} tokens and {tokens} more do not fit the model's context of {room}")


def check_same_prompts(prompts: Sequence[str], ours: Any, theirs: Any, reference: str) -> None:
    """Raises InputError unless two tokenizers read prompts alike: what goes on with them is compared token by token."""
    if any(ours.encode(prompt) != theirs.encode(prompt) for prompt in prompts):
        raise InputError(
            f"--against {reference}: it reads a prompt as other tokens, so what it writes cannot be compared; "
            "give --tasks without --prompt to compare answers alone"
        )


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], tokens: int, progress: Progress = silent
) -> list[list[int]]:
    """The greedy continuation of each prompt, ``tokens`` long at most. One at a time: padding would change the bits."""
    found = []
    for prompt in progress(prompts, "generating", len(prompts)):
        ids = torch.tensor([tokenizer.encode(prompt)], device=device_of(model))
        settings = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": tokens,
            "pad_token_id": tokenizer.pad_token_id or 0,
        }
        with text_alone(model), greedy(model):
            written = model.generate(input_ids=ids, **settings)  # type: ignore[operator]
        found.append(written[0, ids.shape[1] :].tolist())
    return found


@torch.no_grad()
def write(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Question | Prompt],
    tokens: Sequence[Sequence[Tokens]],
    progress: Progress = silent,
) -> list[str]:
    """The answer to each prompt, up to one of its stop texts, or as long as it asks. tokens: of each prompt, all that it has.

    Prompts of about one length are answered together, padded on the left; those of one length, where a model does not leave
    padding out.
    """
    ids = [given.ids for (given,) in tokens]
    order = sorted(range(len(prompts)), key=lambda index: -len(ids[index]))
    batches = _batches([order])
    padding = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
    uneven = max(batches, key=lambda batch: len(ids[batch[0]]) - len(ids[batch[-1]]))
    if not _leaves_padding_out(model, [ids[index] for index in uneven], padding):
        logger.info("%s does not leave padding out: only prompts of one length are answered together", type(model).__name__)
        batches = _batches([list(alike) for _, alike in groupby(order, key=lambda index: len(ids[index]))])
    found = [""] * len(prompts)
    for batch in progress(batches, "answering", len(batches)):
        written = _together(model, tokenizer, [prompts[index] for index in batch], [ids[index] for index in batch], padding)
        for index, text in zip(batch, written, strict=True):
            found[index] = text
    return found


def _batches(parts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """At most BATCH of a part."""
    return [part[start : start + BATCH] for part in parts for start in range(0, len(part), BATCH)]


def _padded(model: nn.Module, ids: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Prompts as ``generate`` takes them, padded on the left to the length of the longest."""
    length = max(map(len, ids))
    rows = {
        "input_ids": [[padding] * (length - len(one)) + list(one) for one in ids],
        "attention_mask": [[0] * (length - len(one)) + [1] * len(one) for one in ids],
    }
    return {name: torch.tensor(values, device=device_of(model)) for name, values in rows.items()}


def _leaves_padding_out(model: nn.Module, ids: Sequence[Sequence[int]], padding: int) -> bool:
    """Whether the last of some prompts, the shortest, is to a model the same with padding before it.

    To recurrent ones it may not be (RecurrentGemma), nor where positions are counted whatever the mask says (BART).
    """
    if len(ids[0]) == len(ids[-1]):
        return True
    options = {"max_new_tokens": 1, "pad_token_id": padding, "output_logits": True, "return_dict_in_generate": True}
    with text_alone(model), greedy(model):
        padded, alone = (
            log_probabilities(model.generate(**_padded(model, some, padding), **options).logits[0][-1])  # type: ignore[operator]
            for some in (ids, ids[-1:])
        )
    return bool((padded - alone).abs().mean() <= ROUNDING[dtype_of(model) == torch.float32])


def _together(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Question | Prompt], ids: Sequence[Sequence[int]], padding: int
) -> list[str]:
    """The answers to prompts of one task, whose stop texts and lengths are the same."""
    first = prompts[0]
    assert isinstance(first, Prompt)
    given, length = _padded(model, ids, padding), max(map(len, ids))
    ends = tokenizer.decode([tokenizer.eos_token_id]) if tokenizer.eos_token_id is not None else ""
    stop = [text for text in (*first.stop, ends) if text]

    tail = 4 + max((len(text.encode()) for text in stop), default=0)  # tokens that hold a stop text that just came to its end

    def stopped(written: Tensor, _: Any, **options: Any) -> Tensor:
        texts = tokenizer.batch_decode(written[:, max(length, written.shape[1] - tail) :], skip_special_tokens=False)
        return torch.tensor([any(text in so_far for text in stop) for so_far in texts], device=written.device)

    with text_alone(model), greedy(model):
        written = model.generate(  # type: ignore[operator]
            **given,
            max_new_tokens=first.tokens,
            pad_token_id=padding,
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
    answers = tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
    return [_before(answer, stop) for answer in answers]


def _before(text: str, stop: Sequence[str]) -> str:
    for end in stop:
        text = text.partition(end)[0]
    return text


def side_by_side(
    prompts: Sequence[str], ours: Sequence[list[int]], theirs: Sequence[list[int]], tokenizer: Any
) -> list[Generation]:
    """For each prompt both continuations, and how many tokens they have in common before they part."""
    rows = []
    for prompt, mine, other in zip(prompts, ours, theirs, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
        rows.append(
            Generation(
                prompt=prompt,
                model=tokenizer.decode(mine),
                against=tokenizer.decode(other),
                same_tokens=same,
                tokens=max(len(mine), len(other)),
            )
        )
    return rows
