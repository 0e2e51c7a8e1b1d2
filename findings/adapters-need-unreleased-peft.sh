#!/usr/bin/env bash
# transformers 5.24.0, peft 0.21.2 (the newest when 5.24.0 came): an adapter's folder is loaded; to add an adapter, or switch it off, is refused.
# Guess: a release of transformers works with the newest release of PEFT, or does not take it at all.
# Seen 2026-11-30: from_pretrained gives the tuned model; add_adapter and disable_adapters raise ValueError, they ask for peft 0.22.0.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
check <<'PY'
import tempfile
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
base, ids = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval(), torch.arange(8)[None]
lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
with tempfile.TemporaryDirectory() as folder:
    base.save_pretrained(f"{folder}/base")
    tuned = get_peft_model(base, lora).eval()
    tuned.peft_config["default"].base_model_name_or_path = f"{folder}/base"
    tuned.save_pretrained(f"{folder}/adapter")
    loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/adapter").eval()
    assert torch.equal(loaded(ids).logits, tuned(ids).logits)
    print("from_pretrained: the tuned model")
    plain = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
for name, call in {"disable_adapters": loaded.disable_adapters, "add_adapter": lambda: plain.add_adapter(lora)}.items():
    try:
        call()
    except ValueError as error:
        print(f"{name}: {error}")
        assert "0.22.0" in str(error)
    else:
        raise AssertionError(f"{name} works")
PY
