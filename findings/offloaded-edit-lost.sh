#!/usr/bin/env bash
# accelerate 1.15.0 with transformers 5.23.0: weights zeroed inside align_module_device are there again afterwards if the layer
#   lies on disk.
# Guess: what the context manager shows is the weight; an edit either stays, as it does for a layer in memory, or is refused.
# Seen 2026-11-28: inside the block the weight is zero, after it the old one; the logits and save_pretrained have the old one
#   too. No warning.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
check <<'PY'
import torch
from accelerate.utils import align_module_device
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
LlamaForCausalLM(config).save_pretrained("model")

def zeroed(place):
    rest = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    where = {"model.layers.0": place, **dict.fromkeys(rest, "cpu")}
    model = AutoModelForCausalLM.from_pretrained("model", device_map=where, offload_folder="offload")
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad(), align_module_device(layer):
        layer.weight.zero_()
        inside = float(layer.weight.abs().sum())
    with align_module_device(layer):
        after = float(layer.weight.abs().sum())
    model.save_pretrained(f"saved-{place}")
    saved = float(load_file(f"saved-{place}/model.safetensors")["model.layers.0.mlp.up_proj.weight"].abs().sum())
    return inside, after, saved

seen = {place: zeroed(place) for place in ("cpu", "disk")}
print("sum of magnitudes inside, after, saved:", seen)
assert seen["cpu"] == (0, 0, 0) and seen["disk"][0] == 0 and min(seen["disk"][1:]) > 0
PY
