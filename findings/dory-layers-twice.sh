#!/usr/bin/env bash
# transformers 5.24.0: the config.json of a Dory model has twice the layers that its config has; a pass has yet another number of states.
# Guess: num_hidden_layers is one number, in the object, in the file and in what output_hidden_states gives.
# Seen 2026-11-30: of 4 layers, 2 of them run twice, the object says 4, the file 8, and there are 7 hidden states; 36 and 72 by default.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.24.0 numpy==2.4.6
check <<'PY'
import json, tempfile
import torch
from transformers import AutoConfig, AutoModelForCausalLM

default = AutoConfig.for_model("dory")
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
layers = dict(num_hidden_layers=4, n_input_layers=1, n_recurrent_layers=2, n_output_layers=1)
kinds = ["sliding_attention", "full_attention"] * 2
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("dory", layer_types=kinds, sliding_window=8, **layers, **sizes))
states = model(torch.arange(8)[None], output_hidden_states=True).hidden_states
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    with open(f"{folder}/config.json") as file:
        saved = json.load(file)["num_hidden_layers"]
seen = (model.config.num_hidden_layers, len(model.model.layers), saved, len(states))
print("the object says, there are, the file says, hidden states of a pass:", seen)
print("by default:", default.num_hidden_layers, default.to_dict()["num_hidden_layers"])
assert seen == (4, 4, 8, 7)
assert (default.num_hidden_layers, default.to_dict()["num_hidden_layers"]) == (36, 72)
PY
