#!/usr/bin/env bash
# transformers 5.24.0: how a GGUF file scales its positions is lost for a Llama: linear, YaRN, and the tensor of factors of Llama 3.1 and later.
# Guess: what the file says of its positions goes into the configuration, or is refused, or at least warned of.
# Seen 2026-12-01: rope_type is "default" each time, no key is missing or unexpected, and far positions have other logits than the scaled model.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
check <<'PY'
import gguf
import numpy as np
import tiny_gguf
import torch
from transformers import AutoModelForCausalLM


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(1024)


def factors(writer):  # as llama.cpp's converter writes Llama 3.1: what each frequency is divided by
    writer.add_tensor("rope_freqs.weight", np.array([1, 1, 8, 8], dtype=np.float32))


for scale in (linear, yarn, factors):
    tiny_gguf.write(f"{scale.__name__}.gguf", scale)
    model, about = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{scale.__name__}.gguf", output_loading_info=True)
    print(scale.__name__, model.config.rope_parameters, {key: sorted(keys) for key, keys in about.items() if "keys" in key})
    assert model.config.rope_parameters["rope_type"] == "default"
    assert not about["missing_keys"] and not about["unexpected_keys"]
ids, places = torch.arange(64)[None], 50 * torch.arange(64)[None]
scaled = AutoModelForCausalLM.from_config(model.config.__class__(**model.config.to_dict() | {
    "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": model.config.rope_parameters["rope_theta"]}
})).eval()
scaled.load_state_dict(model.state_dict())
with torch.no_grad():
    away = (model.eval()(ids, position_ids=places).logits - scaled(ids, position_ids=places).logits).abs().max()
print("logits differ from the linearly scaled model's by", float(away))
assert away > 0.1
PY
