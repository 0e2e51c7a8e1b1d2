#!/usr/bin/env bash
# transformers 5.23.0 with mlx-lm 0.32.2: a Llama saved by the one is opened by the other with another rotary base, without a word.
# Guess: what transformers saves, readers of its checkpoints read; one that does not understand config.json refuses it.
# Seen 2026-11-28: version 5 saves `rope_parameters` alone; mlx-lm looks for `rope_theta`, finds none and takes 10,000 for 1,000,000
#   (as transformers 4 does): logits off by 81 %. With the key added they are transformers'.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2 numpy==2.4.6
check <<'PY'
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
rotary = {"rope_type": "default", "rope_theta": 1e6}
model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rotary, initializer_range=0.2)).eval()
model.save_pretrained("saved")
ids = torch.randint(64, (1, 48))
with torch.no_grad():
    wanted = model(ids).logits.numpy()

def error():
    theirs = np.array(load_model(Path("saved"))[0](mx.array(ids.numpy())))
    return float(np.linalg.norm(theirs - wanted) / np.linalg.norm(wanted))

saved = Path("saved/config.json")
config = json.loads(saved.read_text())
as_saved = error()
saved.write_text(json.dumps(config | {"rope_theta": 1e6}))
with_key = error()
print(f"rope_theta in config.json: {'rope_theta' in config}; MLX's logits off by {as_saved:.1%}, with it by {with_key:.1e}")
assert "rope_theta" not in config and as_saved > 0.01 and with_key < 1e-3
PY
