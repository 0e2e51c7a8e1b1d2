#!/usr/bin/env bash
# peft 0.21.2: attaching a PiSSA adapter changes the base model for good: neither unload() nor disable_adapter() gives the
#   original back.
# Guess: an adapter lies beside the base weights; without it the model is the model.
# Seen 2026-11-28: base weights are replaced by their residual; after unload() half-zero weights have no zeros left; with the
#   adapter disabled outputs are off by 64 %.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy==2.4.6
check <<'PY'
import torch
from peft import LoraConfig, get_peft_model

def attached(start):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    weight = model[0].weight.data
    weight[weight.abs() <= weight.abs().median()] = 0
    original, inputs = weight.clone(), torch.randn(8, 64)
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], r=8, init_lora_weights=start))
    with torch.no_grad(), adapted.disable_adapter():
        disabled = adapted(inputs)
    expected = inputs @ original.T
    left = adapted.unload()[0].weight
    return float((disabled - expected).norm() / expected.norm()), float((left == 0).float().mean())

seen = {str(start): attached(start) for start in (True, "pissa", "olora")}
print("outputs with the adapter disabled off by, share of zeros after unload:", seen)
assert seen["True"] == (0, 0.5) and seen["pissa"][0] > 0.1 and seen["pissa"][1] < 0.01
PY
