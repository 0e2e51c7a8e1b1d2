"""What `uniprune bench` says of SmolLM2-135M on this machine, and how far that goes.

    OMP_NUM_THREADS=1 python benchmarks/bench.py [smollm2] [wide] [decoder]

`smollm2` is the verb's own record. `wide`: the same for the shapes of a 7B Llama, one token at a time. `decoder`
is the check of the method: all decoder blocks of a Llama of SmolLM2's shapes (random weights, no cache, no output head) with
each matrix's module swapped for one that multiplies by CSR; dense and sparse passes alternate.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from common import load, relative, save, smollm2
from uniprune import bench
from uniprune.entrypoints.bench import DEFAULTS, verdicts
from uniprune.models.matrices import Matrices, find_matrices
from uniprune.speed import timing
from uniprune.speed.kernels import CSR, check_product

WIDE = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}
WIDE_LEVELS = (0.5, 0.7, 0.8, 0.9)
LEVELS = (0.5, 0.7, 0.9)
SHAPES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
WARM_UP, ROUNDS = 2, {1: 20, 128: 6}


class Sparse(nn.Module):
    """A Linear without bias, by CSR."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.kernel = CSR()
        self.weight = self.kernel.compress(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self.kernel.multiply(self.weight, hidden.reshape(-1, hidden.shape[-1]))
        return rows.reshape(*hidden.shape[:-1], -1)


def main() -> None:
    parts = {"smollm2": small, "wide": wide, "decoder": lambda: [row for level in LEVELS for row in decoder(level)]}
    for name in sys.argv[1:] or parts:
        earlier = {part: result for part, result in load("bench").items() if part in parts}
        save("bench", earlier | {name: parts[name]()})


def small() -> dict[str, Any]:
    model = Path(smollm2())
    return bench(model, device="cpu").record() | {"model": relative(model)}


def wide() -> dict[str, Any]:
    results, missing = timing.measure(WIDE, timing.Conditions(torch.device("cpu"), [torch.float32], [1], WIDE_LEVELS, [CSR()]))
    return {"results": [result.model_dump() for result in results], "verdicts": verdicts(results, missing)}


@torch.inference_mode()
def decoder(level: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES, **HEADS)).eval().requires_grad_(False)
    matrices = find_matrices(model)
    pattern = CSR().patterns([level])[0]
    for name, mask in pattern({name: torch.rand(matrix.shape) for name, matrix in matrices.items()}):
        matrices[name].weight.mul_(mask)
    sides = {name: matrix.module for name, matrix in matrices.items()}, {n: Sparse(m.weight) for n, m in matrices.items()}
    rows = []
    for batch in DEFAULTS.batches:
        tokens = torch.randint(0, HEADS["vocab_size"], (1, batch))
        check_product(*(run(model, matrices, side, tokens)[1] for side in sides))
        times = [[run(model, matrices, side, tokens)[0] for side in sides] for _ in range(WARM_UP + ROUNDS[batch])]
        ratios = [dense / sparse for dense, sparse in times[WARM_UP:]]
        low, middle, high = statistics.quantiles(ratios, method="inclusive")
        rows.append({"batch": batch, "sparsity": level, "speedup": middle, "low": low, "high": high})
    return rows


def run(model: nn.Module, matrices: Matrices, modules: dict[str, nn.Module], tokens: Tensor) -> tuple[float, Tensor]:
    """Seconds and hidden states of a pass through the decoder blocks with these modules in the matrices' places."""
    for name in matrices:
        model.set_submodule(name, modules[name])
    start = time.perf_counter()
    hidden = model.model(input_ids=tokens, use_cache=False)[0]
    return time.perf_counter() - start, hidden


if __name__ == "__main__":
    main()
