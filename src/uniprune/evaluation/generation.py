"""What two models write, side by side: greedy continuations of the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from uniprune.common.progress import Progress, silent
from uniprune.data.windows import Windows
from uniprune.errors import InputError
from uniprune.evaluation.results import Generation
from uniprune.models.blocks import device_of

COUNT, BEGIN = 3, 24  # prompts from a text, and tokens in each


def prompts_of(windows: Windows, tokenizer: Any) -> list[str]:
    """Prompts from a text: the beginnings of windows spread over it, decoded."""
    count = min(COUNT, len(windows.tokens))
    rows = torch.arange(count) * (len(windows.tokens) - 1) // max(count - 1, 1)
    decoded = (tokenizer.decode(row, skip_special_tokens=True) for row in windows.tokens[rows, :BEGIN])
    return [prompt for prompt in decoded if prompt.strip()]


def check_prompts(prompts: Sequence[str], tokenizer: Any, tokens: int, context: int) -> None:
    """Raises InputError if a prompt is empty, or leaves a model no room for ``tokens`` more."""
    if tokens < 0:
        raise InputError(f"--new-tokens {tokens} is negative")
    for prompt in prompts:
        length = len(tokenizer.encode(prompt))
        if not length:
            raise InputError("--prompt is empty; give some text to go on with")
        if length + tokens > context:
            raise InputError(f"a prompt of {length} tokens and {tokens} more do not fit the model's context of {context}")


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], tokens: int, progress: Progress = silent
) -> list[list[int]]:
    """The greedy continuation of each prompt, ``tokens`` long at most. One at a time: padding would change the bits."""
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1, "repetition_penalty": None}
    found = []
    for prompt in progress(prompts, "generating", len(prompts)):
        ids = torch.tensor([tokenizer.encode(prompt)], device=device_of(model))
        written = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id or 0, **plain
        )
        found.append(written[0, ids.shape[1] :].tolist())
    return found


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
