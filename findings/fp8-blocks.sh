#!/usr/bin/env bash
# transformers 5.23.0: FP8 weights dequantised at load (on a CPU, or asked for) with blocks that are not those of the checkpoint.
# Guess: weight_block_size in config.json says how many rows and inputs share a scale.
# Seen 2026-11-28: rows / scales are taken for the block's height. 192 rows in blocks of 128 have two scales, and each is used for 96
#   rows: 32 rows of 192 are multiplied by another block's scale, without a word. 576 rows (kv_a_proj_with_mqa of DeepSeek-V3) have
#   five scales, and the model is not loaded: "not divisible by scale grid". The backward pass in the same file uses the right blocks.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
check <<'PY'
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight


def load(rows):
    """A model whose up_proj has so many rows; the weights of that as loaded, and as its blocks say."""
    folder, key = Path(f"model-{rows}"), "model.layers.0.mlp.up_proj.weight"
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, intermediate_size=rows, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    scales = torch.arange(1, 1 - -rows // 128).float()[:, None]  # one for each 128 rows
    tensors |= {key: tensors[key].to(torch.float8_e4m3fn), f"{key}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(content))
    right = _dequantize_fp8_weight(tensors[key], scales, [128, 128], torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").model.layers[0].mlp.up_proj.weight, right


loaded, right = load(256)
assert torch.equal(loaded, right)
loaded, right = load(192)
wrong = (loaded != right).any(1)
print("192 rows, blocks of 128: wrong are", int(wrong.sum()), "rows, from", int(wrong.nonzero()[0]), "to", int(wrong.nonzero()[-1]))
assert wrong.nonzero().ravel().tolist() == list(range(96, 128))
try:
    load(576)
except Exception as error:
    print("576 rows:", type(error).__name__)
else:
    raise SystemExit(1)
PY
