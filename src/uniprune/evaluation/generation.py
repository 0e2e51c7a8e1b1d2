"""What models write, greedily: answers to tasks, and continuations of the same prompts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from uniprune.checkpoints.configuration import check_vocabulary, context
from uniprune.common.progress import Progress, silent
from uniprune.data.windows import Windows
from uniprune.errors import InputError
from uniprune.evaluation.results import Generation
from uniprune.models.blocks import device_of, text_alone
from uniprune.models.generation import greedy
from uniprune.tasks.question import Prompt, Question
from uniprune.tasks.scoring import Tokens

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

    Prompts of about one length are answered together, padded on the left.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(tokens[index][0].ids))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    found = [""] * len(prompts)
    for batch in progress(batches, "answering", len(batches)):
        written = _together(model, tokenizer, [prompts[index] for index in batch], [tokens[index][0].ids for index in batch])
        for index, text in zip(batch, written, strict=True):
            found[index] = text
    return found


def _together(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Question | Prompt], ids: Sequence[Sequence[int]]
) -> list[str]:
    """The answers to prompts of one task, whose stop texts and lengths are the same."""
    first = prompts[0]
    assert isinstance(first, Prompt)
    device, length = device_of(model), max(map(len, ids))
    padding = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
    given = torch.tensor([[padding] * (length - len(one)) + list(one) for one in ids], device=device)
    mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in ids], device=device)
    ends = tokenizer.decode([tokenizer.eos_token_id]) if tokenizer.eos_token_id is not None else ""
    stop = [text for text in (*first.stop, ends) if text]

    tail = 4 + max((len(text.encode()) for text in stop), default=0)  # tokens that hold a stop text that just came to its end

    def stopped(written: Tensor, _: Any, **options: Any) -> Tensor:
        texts = tokenizer.batch_decode(written[:, max(length, written.shape[1] - tail) :], skip_special_tokens=False)
        return torch.tensor([any(text in so_far for text in stop) for so_far in texts], device=written.device)

    with text_alone(model), greedy(model):
        written = model.generate(  # type: ignore[operator]
            input_ids=given,
            attention_mask=mask,
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
