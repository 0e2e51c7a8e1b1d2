"""How long it takes until a run computes, in this version and in another one; writes results/preparing.json.

    git worktree add ../before COMMIT
    python benchmarks/preparing.py ../before/src [--times 3] [--small]

finding: processor time to find the 45,032 matrices of DeepSeek-V3 (default configuration, meta device), and to make that model.
preparing: wall and processor time from the start of Python to the first calibration batch, of a random Llama of 3 B weights in
bfloat16 whose files are in the page cache (8 GB of memory, 7 GB of disk). Versions take turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

FINDING = """
import time
import torch
from transformers import AutoConfig, AutoModelForCausalLM
try:
    from uniprune.models.matrices import find_matrices
except ImportError:
    from uniprune.matrices import find_matrices

config = AutoConfig.for_model("deepseek_v3")
AutoModelForCausalLM._model_mapping[type(config)]
start = time.process_time()
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
made = time.process_time()
count = len(find_matrices(model))
print({"matrices": count, "found": time.process_time() - made, "made": made - start})
"""

PREPARING = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import sys
from pathlib import Path

class Reached(BaseException):
    pass

def progress(items, what, total=None):
    raise Reached

import uniprune

recipe = uniprune.Recipe(sparsity="2:4", controller="none", text="builtin", windows=16, length=512, dtype="bfloat16")
try:
    uniprune.prune(sys.argv[1], recipe, Path(sys.argv[2]), progress=progress)
except Reached:
    print({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
"""


def make(folder: Path, small: bool) -> None:
    """A random model that has the shapes of Llama 3.2 3B, and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import train_tokenizer

    layers = 2 if small else 28
    config = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.save_pretrained(folder, max_shard_size="2GB")
    train_tokenizer().save_pretrained(folder)


def run(source: Path, program: str, *words: object) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(source.resolve()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1].replace("'", '"'))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("before", type=Path, help="The other version's src folder.")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="A model of two layers, to try this program; writes nothing.")
    chosen = parser.parse_args()
    versions = {"before": chosen.before, "after": ROOT / "src"}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        make(model, chosen.small)
        rows: dict[str, dict[str, list[dict[str, float]]]] = {"finding": {}, "preparing": {}}
        for number in range(chosen.times):
            for name, source in versions.items():
                rows["finding"].setdefault(name, []).append(run(source, FINDING))
                out = Path(place) / f"{name}-{number}"
                rows["preparing"].setdefault(name, []).append(run(source, PREPARING, model, out))
                print(name, rows["finding"][name][-1], rows["preparing"][name][-1], flush=True)
    results: dict[str, Any] = {"rows": rows, "ratios": {}}
    for what, by_version in rows.items():
        for key in by_version["after"][0]:
            before, after = (statistics.median(row[key] for row in by_version[name]) for name in versions)
            results["ratios"][f"{what}: {key}"] = round(after / before, 3)
    print(results["ratios"])
    if not chosen.small:
        from common import save

        save("preparing", results)


if __name__ == "__main__":
    main()
