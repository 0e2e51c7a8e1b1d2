"""Text that a model generates by the caller's settings alone, whatever its own generation configuration says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import GenerationConfig


@contextmanager
def greedy(model: nn.Module) -> Iterator[None]:
    """Inside ``with``, of the model's own generation settings count only the tokens that end a text.

    Published ones sample, search with beams, forbid words and repetitions, or stop after a time; and what ``generate`` is not
    told, it takes from there.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=getattr(own, "eos_token_id", None))  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generation_config = own
