"""The most that a calibration of the controller has resident, beside its forecast, for architectures unlike Llama's.

    python benchmarks/peaks.py [KIND ...]

Random models of 20 to 160M weights in bfloat16, two steps of 4,096 tokens (8 windows of 512) at 2:4, each in a process of
its own; the peak is the process's, libraries included. Rewrites those rows of results/peaks.json; eight minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import uniprune
from common import load, peak_memory, save
from uniprune.data.windows import Windows, save_windows

VOCABULARY, WINDOWS, LENGTH = 2048, 16, 512
WIDTH = {"hidden_size": 512, "vocab_size": VOCABULARY}
HEADS = WIDTH | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048}
EIGHT_BLOCKS = HEADS | {"num_hidden_layers": 8, "num_experts_per_tok": 2}
LINEAR = {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
LATENT = {"q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
INDEXED = {"index_n_heads": 4, "index_head_dim": 64, "index_topk": 64, "indexer_types": ["full", "shared"] * 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": HEADS | {"intermediate_size": 1408, "num_hidden_layers": 12},
    "gpt_oss": EIGHT_BLOCKS | {"intermediate_size": 512, "num_local_experts": 8},
    "qwen3_next": EIGHT_BLOCKS
    | LINEAR
    | {"num_experts": 8, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    | {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2},
    "hy_v4": EIGHT_BLOCKS
    | LATENT
    | INDEXED
    | {"n_routed_experts": 8, "moe_intermediate_size": 352, "mlp_layer_types": ["sparse"] * 8}
    | {"layer_types": ["indexed_attention"] * 8},
    "qwen2, a vocabulary of 151,936": HEADS | {"intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 151_936},
    "mamba2": WIDTH | {"num_heads": 16, "head_dim": 64, "state_size": 64, "n_groups": 1, "num_hidden_layers": 12},
}
EXECUTIONS = ("resident", "recomputed")


def make(kind: str, folder: Path) -> uniprune.Recipe:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition(",")[0], **KINDS[kind], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    ids = torch.randint(3, VOCABULARY, (2 * WINDOWS, LENGTH))
    save_windows(Windows(ids, "random", 2 * WINDOWS, "none"), folder / "tokens.safetensors")
    tuning = {"batch_tokens": WINDOWS // 2 * LENGTH, "checks": 1, "held_out": 2}
    text = str(folder / "tokens.safetensors")
    return uniprune.Recipe(sparsity="2:4", text=text, dtype="bfloat16", steps=2, tuning=tuning)


def measure(kind: str) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind}
    with tempfile.TemporaryDirectory() as temporary:
        folder = f"{temporary}/model"
        recipe = make(kind, Path(folder))
        plan = uniprune.plan(folder, recipe)
        row["parameters"] = plan.parameters
        for execution in EXECUTIONS:
            words = [sys.executable, __file__, "--run", folder, recipe.model_dump_json(), execution]
            peak = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
            row[execution] = {"forecast_bytes": plan.executions[execution].memory, "peak_bytes": peak}
    return row


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        folder, recipe, execution = sys.argv[2:]
        scores = Path(folder).with_name(f"{execution}.safetensors")
        uniprune.calibrate(folder, uniprune.Recipe.model_validate_json(recipe), scores, execution=execution)  # type: ignore[arg-type]
        print(peak_memory())
        return
    known = {row["kind"]: row for row in load("peaks").get("rows", [])}
    for kind in sys.argv[1:] or KINDS:
        known[kind] = measure(kind)
        print(known[kind], flush=True)
        save("peaks", {"rows": list(known.values())})


if __name__ == "__main__":
    main()
