#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, CPU: without its kernel a Mamba 2 keeps several times what attention does for the pass backwards.
# Guess: a state-space model has no matrix of all pairs of tokens, so it keeps no more than a Llama of as many weights.
# Seen 2026-11-30, bfloat16, 2 layers of 8.4 (Llama: 11.3) million weights: 318 MB beside 49 at 512 tokens, 633 beside 97 at 1,024.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 numpy==2.4.6
check <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

common = dict(hidden_size=1024, num_hidden_layers=2, vocab_size=64)
kinds = {
    "llama": dict(intermediate_size=2816, num_attention_heads=8, num_key_value_heads=2),
    "mamba2": dict(num_heads=32, head_dim=64, state_size=128, n_groups=8),
}

def kept(kind, tokens):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **kinds[kind]), dtype=torch.bfloat16)
    storages, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.base_model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    sizes = sum(p.numel() for p in model.base_model.layers.parameters()) / 2e6
    return round(sum(size for place, size in storages.items() if place not in weights) / 1e6), round(sizes, 1)

for tokens in (512, 1024):
    seen = {kind: kept(kind, tokens) for kind in kinds}
    print(f"{tokens} tokens, MB kept and million weights a layer:", seen)
    assert seen["mamba2"][0] > 4 * seen["llama"][0]
    assert seen["mamba2"][1] < 1.1 * seen["llama"][1]
PY
