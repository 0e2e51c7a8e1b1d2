#!/usr/bin/env bash
# transformers 5.23.0: a model saved in shards over one saved in a single file loads as the old one.
# Guess: save_pretrained removes weights it does not write (it does so with stale shards), or the index decides what is loaded.
# Seen 2026-11-28: model.safetensors stays beside the shards and the new index, and from_pretrained reads it: the old weights,
#   no warning.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 numpy==2.4.6
check <<'PY'
import os

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
old, new = LlamaForCausalLM(config), LlamaForCausalLM(config)
old.save_pretrained("model")
new.save_pretrained("model", max_shard_size="40KB")
loaded = AutoModelForCausalLM.from_pretrained("model").lm_head.weight
print(sorted(name for name in os.listdir("model") if "safetensors" in name))
print("loaded the old model:", torch.equal(loaded, old.lm_head.weight), "the new one:", torch.equal(loaded, new.lm_head.weight))
assert torch.equal(loaded, old.lm_head.weight)
PY
