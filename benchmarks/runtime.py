"""What `uniprune.accelerate` makes of a pruned model on this machine: speed, memory, size, and whether it says the same.

    python benchmarks/runtime.py [smollm2] [qwen] [--threads 1,2] [--dtypes float32,bfloat16] [--rounds 9] [--cpu-time]

Each model is pruned by magnitude (which weights go does not change the speed) at 50 %, 2:4 and 70 % and compared with itself,
dense, in the same type:

- decode: one token at a time with a key-value cache, by transformers. prefill: one forward pass over 128 tokens.
- products: one token through every pruned matrix, and nothing else. `kernel_dense` is this kernel on the dense matrices: what
  it gains over PyTorch before any weight is pruned.
- limit: the bytes of the packed matrices over the bandwidth that one pass over 512 MB reaches: no product can take less.
- memory: bytes of the weights, of the whole model and of the pruned matrices; and resident after some tokens, each in a process
  of its own, opened from the runtime folder and by transformers.
- packing against copying the same file; opening; logits and greedy text against the dense model with its zeros.

Sides take turns; the median of the rounds' ratios counts. `--cpu-time` counts the processor's time instead of the clock's: on a
busy machine, with one thread. The best dense type of the machine is in `dense`: seconds a token in each type.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import uniprune
from common import load, processor, qwen, save, smollm2
from uniprune.models.matrices import find_matrices
from uniprune.runtime import layout
from uniprune.runtime.linear import BitmaskLinear
from uniprune.runtime.native import dense_handle, library
from uniprune.sparsity.patterns.spelling import parse

MODELS = {"smollm2": smollm2, "qwen": qwen}
PATTERNS = ("0.5", "2:4", "0.7")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPT, DECODED, PREFILL = 16, 16, 128
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was",
    "The three laws of thermodynamics state",
    "To make a good cup of coffee,",
    "import numpy as np\n\n",
    "In 1969, the first humans",
    "Dear Sir or Madam,",
    "The derivative of x squared",
    "My favourite season is",
    "SELECT name FROM users WHERE",
    "Photosynthesis is the process",
    "A prime number is",
    "The recipe needs two eggs,",
    "Shakespeare wrote",
    "for i in range(10):",
    "The moon orbits the",
    "Water boils at",
    "If it rains tomorrow,",
    "The president announced that",
)
CONTINUED = 16  # tokens of greedy text


class Sides:
    """Two or more ways to do the same, timed in turns."""

    def __init__(self, rounds: int, clock: Callable[[], float]) -> None:
        self._rounds, self._clock = rounds, clock

    def seconds(self, **work: Callable[[], object]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(self._rounds + 1):
            for name in list(work)[:: 1 if turn % 2 else -1]:
                start = self._clock()
                work[name]()
                found[name].append(self._clock() - start)
        return {name: seconds[1:] for name, seconds in found.items()}


def compared(dense: Sequence[float], sparse: Sequence[float], items: int = 1) -> dict[str, float]:
    """The speed-up, with its quartiles, and the best seconds of each side for one of ``items``."""
    low, middle, high = quantiles([one / other for one, other in zip(dense, sparse, strict=True)], method="inclusive")
    return {"speedup": middle, "low": low, "high": high, "dense": min(dense) / items, "sparse": min(sparse) / items}


def prune(model: nn.Module, pattern: str) -> None:
    for matrix in find_matrices(model).values():
        mask = dict(parse(pattern)({"": matrix.weight.float().abs()}))[""]
        matrix.parameter.masked_fill_(~(mask.T if matrix.transposed else mask), 0.0)


class Decoding:
    """A model that has read a prompt, and goes on token by token."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.token = self._next(torch.arange(100, 100 + PROMPT)[None])

    def _next(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1:].argmax(-1)

    def __call__(self) -> None:
        for _ in range(DECODED):
            self.token = self._next(self.token)
        self.cache.crop(-DECODED)


def products(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> list[tuple[nn.Module, Tensor]]:
    modules = [model.get_submodule(name) for name in names]
    return [(module, torch.randn(1, module.in_features).to(dtype)) for module in modules]


@torch.inference_mode()
def speeds(dense: Any, sparse: Any, sides: Sides, dtype: torch.dtype) -> dict[str, Any]:
    decoding = sides.seconds(dense=Decoding(dense), sparse=Decoding(sparse))
    tokens = torch.arange(PREFILL)[None]
    prefill = sides.seconds(dense=lambda: dense(input_ids=tokens), sparse=lambda: sparse(input_ids=tokens))
    names = [name for name, module in sparse.named_modules() if isinstance(module, BitmaskLinear)]
    pruned, whole = products(sparse, names, dtype), products(dense, names, dtype)
    kernel = [(dense_handle(module.weight), x) for module, x in whole]
    alone = sides.seconds(
        dense=lambda: [module(x) for module, x in whole],
        kernel_dense=lambda: [handle.multiply(x) for handle, x in kernel],
        sparse=lambda: [module(x) for module, x in pruned],
    )
    return {
        "decode": compared(decoding["dense"], decoding["sparse"], DECODED),
        "prefill": compared(prefill["dense"], prefill["sparse"], PREFILL),
        "products": compared(alone["dense"], alone["sparse"])
        | {"kernel_dense": median(a / b for a, b in zip(alone["dense"], alone["kernel_dense"], strict=True))},
    }


def weight_bytes(model: nn.Module, inside: str = "") -> int:
    tensors = {id(one): one for name, one in [*model.named_parameters(), *model.named_buffers()] if inside in name}
    return sum(tensor.nbytes for tensor in tensors.values())


def bandwidth(sides: Sides) -> float:
    """Bytes a second that a pass over memory reads, at best."""
    memory = torch.ones(1 << 27)
    return memory.nbytes / min(sides.seconds(read=memory.sum)["read"])


def same_words(dense: nn.Module, sparse: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """How far logits are apart, of the largest; how many prompts have the same greedy continuation."""
    error, same = 0.0, 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            expected, found = (model(input_ids=ids).logits for model in (dense, sparse))
            error = max(error, float((expected - found).abs().max() / expected.abs().max()))
            texts = [model.generate(ids, max_new_tokens=CONTINUED, do_sample=False) for model in (dense, sparse)]
        same += int(torch.equal(*texts))
    return {"prompts": len(PROMPTS), "same_text": same, "largest_error": error}


def measure(name: str, dtype: str, threads: Sequence[int], sides: Sides) -> Iterator[dict[str, Any]]:
    """A row for each pattern and number of threads."""
    loaded = uniprune.load(MODELS[name](), dtype=dtype, device="cpu")
    for pattern in PATTERNS:
        sparse = copy.deepcopy(loaded.model)
        prune(sparse, pattern)
        words = {}
        if dtype == "float32" and name == "smollm2":
            zeros = copy.deepcopy(sparse)
            words = same_words(zeros, uniprune.accelerate(sparse), loaded.tokenizer)
            del zeros
        else:
            uniprune.accelerate(sparse)
        packed = [module for module in sparse.modules() if isinstance(module, BitmaskLinear)]
        size, dense_size = sum(one.packed.nbytes for one in packed), sum(one.weight.nbytes for one in packed)
        for number in threads:
            torch.set_num_threads(number)
            row = {"model": name, "dtype": dtype, "pattern": pattern, "threads": number}
            row |= speeds(loaded.model, sparse, sides, TYPES[dtype])
            row["limit"] = size / bandwidth(sides)
            row["memory"] = {
                "matrices": size / dense_size,
                "model": weight_bytes(sparse) / weight_bytes(loaded.model),
                "dense_bytes": weight_bytes(loaded.model),
            }
            yield row | ({"words": words} if words else {})
        del sparse, packed
        gc.collect()


def packing(name: str, pattern: str, rounds: int) -> dict[str, Any]:
    """Packing and opening a checkpoint in bfloat16, and what is resident after a few tokens."""
    with tempfile.TemporaryDirectory() as folder:
        pruned, packed = Path(folder) / "pruned", Path(folder) / "packed"
        model = uniprune.load(MODELS[name](), dtype="bfloat16", device="cpu").model
        prune(model, pattern)
        model.save_pretrained(pruned)  # type: ignore[operator]
        del model
        (file,) = pruned.glob("*.safetensors")
        copied, taken, opened = [], [], []
        for _ in range(rounds):
            start = time.perf_counter()
            shutil.copyfile(file, Path(folder) / "copy")
            os.sync()
            copied.append(time.perf_counter() - start)
            start = time.perf_counter()
            report = layout.pack(pruned, packed, overwrite=True)
            taken.append(time.perf_counter() - start)
            start = time.perf_counter()
            uniprune.accelerate(packed)
            opened.append(time.perf_counter() - start)
        return {
            "model": name,
            "pattern": pattern,
            "ratio": report.ratio,
            "ratio_of_packed": report.ratio_of_packed,
            "copy_seconds": min(copied),
            "pack_seconds": min(taken),
            "throughput_to_copying": median(one / other for one, other in zip(copied, taken, strict=True)),
            "open_seconds": min(opened),
            "resident": {kind: resident(kind, path) for kind, path in (("dense", pruned), ("packed", packed))},
        }


def resident(kind: str, folder: Path) -> int:
    """Bytes that a model adds to a process that has computed with it."""
    command = [sys.executable, __file__, "--resident", kind, str(folder)]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))


@torch.inference_mode()
def report_resident(kind: str, folder: str) -> None:
    library()
    before = psutil.Process().memory_info().rss
    if kind == "packed":
        model: Any = uniprune.accelerate(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    Decoding(model)()
    gc.collect()
    print(psutil.Process().memory_info().rss - before)


@torch.inference_mode()
def dense_types(name: str, threads: Sequence[int], sides: Sides) -> list[dict[str, Any]]:
    """Seconds a token of the dense model in every type: the pruned one has to beat the best of them, too."""
    found: dict[int, dict[str, float]] = {number: {} for number in threads}
    for dtype in TYPES:
        model = Decoding(uniprune.load(MODELS[name](), dtype=dtype, device="cpu").model)
        for number in threads:
            torch.set_num_threads(number)
            found[number][dtype] = min(sides.seconds(dense=model)["dense"]) / DECODED
        del model
        gc.collect()
    return [{"model": name, "threads": number, "seconds": seconds} for number, seconds in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--resident", nargs=2)
    chosen = parser.parse_args()
    if chosen.rounds < 2:
        parser.error("--rounds: quartiles take two or more")
    if chosen.resident:
        report_resident(*chosen.resident)
        return
    sides = Sides(chosen.rounds, time.process_time if chosen.cpu_time else time.perf_counter)
    threads = [int(one) for one in chosen.threads.split(",")]
    results = {key: value for key, value in load("runtime").items() if key not in ("versions", "machine")}
    results |= {
        "cpu": processor() | {"path": library().paths[-1]},
        "clock": "processor time" if chosen.cpu_time else "wall clock",
    }
    for name in chosen.models:
        for key in ("rows", "packing", "dense"):
            results[key] = [row for row in results.get(key, []) if row["model"] != name]
        results["dense"] += dense_types(name, threads, sides)
        results["packing"].append(packing(name, "0.5", min(chosen.rounds, 5)))
        for dtype in chosen.dtypes.split(","):
            for row in measure(name, dtype, threads, sides):
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
                save("runtime", results)


if __name__ == "__main__":
    main()
