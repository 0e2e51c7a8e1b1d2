#!/usr/bin/env bash
# transformers 5.23.0: with longrope or dynamic rotary scaling, what a causal model says of the first tokens depends on how much
#   text follows.
# Guess: a causal model's logits at a position depend on what stands before it alone, so a longer window only adds positions.
# Seen 2026-11-28: 16 tokens alone, or followed by 80 more: the logits of the 16 differ with longrope and dynamic, agree with
#   default, yarn, llama3.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 numpy==2.4.6
check <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
short = {"original_max_position_embeddings": 32, "factor": 4.0}
kinds = {
    "default": {},
    "yarn": short,
    "llama3": {**short, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {**short, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    "dynamic": {"factor": 4.0},
}
torch.manual_seed(0)
tokens = torch.randint(64, (1, 96))
changed = {}
for kind, settings in kinds.items():
    rotary = {"rope_type": kind, "rope_theta": 10000.0, **settings}
    longest = 32 if kind == "dynamic" else 128
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=longest, rope_parameters=rotary)).eval()
    with torch.no_grad():
        changed[kind] = float((model(tokens[:, :16]).logits - model(tokens).logits[:, :16]).abs().max())
print("largest change of the first 16 tokens' logits:", changed)
assert min(changed["longrope"], changed["dynamic"]) > 1e-5 > max(changed["default"], changed["yarn"], changed["llama3"])
PY
