"""What uniprune expects that large Llama models take, bfloat16, from their shapes alone: nothing is run.

    python benchmarks/forecasts.py

- executions: 7e9, 70e9 and 405e9 weights on a GPU, by each way to run them.
- cards: the controller on 8e9 and 70e9 weights on some GPUs: the fastest way that fits, memory by part, bytes and seconds of a
  step. What is assumed stands in each row; transfers do not overlap with computing.

Rewrites results/forecasts.json.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import save
from uniprune.common import distributed
from uniprune.job.forecast.estimate import BUS, DISK, flop, seconds_moving
from uniprune.job.forecast.memory import LARGE_STEP, Work, needs
from uniprune.job.recipe import Recipe
from uniprune.models.matrices import find_matrices

GQA = {"num_key_value_heads": 8, "vocab_size": 128256}
LLAMAS: dict[str, dict[str, int]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, **GQA},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, **GQA},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128, **GQA},
}
RUNS = {
    "local": Recipe(sparsity="2:4", controller="none"),
    "step": Recipe(sparsity="2:4", tuning={"batch_tokens": LARGE_STEP}),
}
LENGTH, SMALL_STEP = 2048, 4096  # tokens of a sample, and of a step whose cost is its tokens'
LINK = 2e11  # bytes a second between GPUs
GPU = torch.device("cuda")

Row = dict[str, Any]


class Card(NamedTuple):
    """How many there are, bytes of each that are free, and its floating-point operations a second."""

    count: int
    free: int
    flops: float


CARDS = {
    "24 GB": Card(1, 25_200_000_000, 120e12),
    "48 GB": Card(1, 50_400_000_000, 180e12),
    "80 GB": Card(1, 84_500_000_000, 400e12),
    "8 x 80 GB": Card(8, 84_500_000_000, 400e12),
}
# Tokens of a step: more of them where states come and go, which takes as long for one as for many.
STEPS = {LARGE_STEP: ("offloaded", "sharded", "streamed"), SMALL_STEP: ("resident", "recomputed", "offloaded")}


def work_on(shape: Mapping[str, int], recipe: Recipe) -> Work:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    return Work(model, find_matrices(model), recipe, torch.bfloat16, torch.bfloat16, LENGTH, GPU)


def executions(name: str) -> Row:
    row: Row = {"model": name}
    for run, recipe in RUNS.items():
        work = work_on(LLAMAS[name], recipe)
        row |= {"parameters": work.parameters, run: {way: asdict(found) for way, found in needs(work).items()}}
    return row


def on_cards(name: str, card: str) -> Row:
    """The fastest way that fits, with the larger step where both do."""
    count, free, flops = CARDS[card]
    fitting = []
    for tokens, ways in STEPS.items():
        work = work_on(LLAMAS[name], Recipe(sparsity="2:4", tuning={"batch_tokens": tokens}))
        with mock.patch.object(distributed, "count", return_value=count):
            found = needs(work)
        for order, (way, needed) in enumerate(found.items()):
            if way in ways and needed.memory <= free:
                fitting.append((order, tokens, way, needed, work))
    _, tokens, way, needed, work = min(fitting, key=lambda one: one[0])
    # Gradients to their owners; and where blocks are gathered, weights for both models and for the pass backwards.
    between = 0 if count == 1 else 4 * work.prunable + (3 * 2 * work.parameters if way == "sharded" else 0)
    return {
        "model": name,
        "card": card,
        "execution": way,
        "tokens": tokens,
        "memory": needed.memory,
        "parts": dict(needed.parts),
        "host": needed.host,
        "read": count * needed.read,
        "written": count * needed.written,
        "between": between,
        "seconds": flop(work, way) * tokens / count / flops + seconds_moving(work, way, needed) + between / LINK,
        "assumed": {"free": free, "flops": flops, "disk": DISK, "bus": BUS, "link": LINK},
    }


def main() -> None:
    def shown(rows: Iterator[Row]) -> list[Row]:
        return [row for row in rows if not print(json.dumps(row), flush=True)]

    models = [name for name in LLAMAS if name != "8B"]
    save(
        "forecasts",
        {
            "executions": shown(executions(name) for name in models),
            "cards": shown(on_cards(*pair) for pair in itertools.product(("8B", "70B"), CARDS)),
        },
    )


if __name__ == "__main__":
    main()
