#!/usr/bin/env bash
# transformers 5.23.0: an FP8 checkpoint loaded with dtype=torch.float32 and dequantised (on a CPU).
# Guess: a float32 model, as of any other checkpoint.
# Seen 2026-11-28: what was quantised is float32, all else (embeddings, norms, head) stays bfloat16, and the model cannot run.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
check <<'PY'
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

folder = Path("model")
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
tensors = {}
for key, weight in load_file(folder / "model.safetensors").items():
    tensors[key] = weight
    if re.search(r"layers.*_proj\.weight$", key):
        tensors |= {key: weight.to(torch.float8_e4m3fn), f"{key}_scale_inv": torch.ones(1, 1)}
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
content = json.loads((folder / "config.json").read_text())
content["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
(folder / "config.json").write_text(json.dumps(content))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
print({str(parameter.dtype) for parameter in model.parameters()}, model.config.dtype)
assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.bfloat16}
try:
    model(torch.arange(8)[None])
except RuntimeError as error:
    print(error)
else:
    raise SystemExit(1)
PY
