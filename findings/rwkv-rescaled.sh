#!/usr/bin/env bash
# transformers 5.23.0: a forward pass in evaluation mode, and save_pretrained afterwards, of an RWKV model.
# Guess: a forward pass reads the weights; what is saved is what was loaded.
# Seen 2026-11-29: the first pass in evaluation mode divides output projections by powers of 2 in place (rescale_every, 6 by default:
#   from the seventh block on), and save_pretrained writes them so: loaded again, they are divided again, and logits differ.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
check <<'PY'
import torch
from transformers import AutoModelForCausalLM, RwkvConfig

torch.manual_seed(0)
config = RwkvConfig(vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=8, context_length=64)
model = AutoModelForCausalLM.from_config(config).eval()
before = {name: parameter.clone() for name, parameter in model.named_parameters()}
ids = torch.arange(16)[None]
with torch.no_grad():
    first = model(ids).logits
changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
print("changed by a forward pass:", changed)
assert changed == [f"rwkv.blocks.{block}.{part}.weight" for block in (6, 7) for part in ("attention.output", "feed_forward.value")]
assert all(torch.equal(2 * dict(model.named_parameters())[name], before[name]) for name in changed)
model.save_pretrained("saved")
with torch.no_grad():
    again = AutoModelForCausalLM.from_pretrained("saved").eval()(ids).logits
print("logits differ by", float((first - again).abs().max()), "of", float(first.abs().max()))
assert (first - again).abs().max() > 1e-3
PY
