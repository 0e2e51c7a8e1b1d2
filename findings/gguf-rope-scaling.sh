#!/usr/bin/env bash
# transformers 5.24.0: how a GGUF file scales its positions is lost for a Llama: linear, YaRN, and the tensor of factors of Llama 3.1 and later.
# Guess: what the file says of its positions goes into the configuration, or is refused, or at least warned of.
# Seen 2026-12-01: rope_type is "default" each time, no key is missing or unexpected, and far positions have other logits than the scaled model.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
check <<'PY'
import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

width, hidden, vocabulary = 32, 64, 64


def written(name, scale):
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(name, "llama")
    for add, value in (
        (writer.add_block_count, 2), (writer.add_context_length, 4096), (writer.add_embedding_length, width),
        (writer.add_feed_forward_length, hidden), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, vocabulary), (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2), (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, [str(i) for i in range(vocabulary)]),
    ):
        add(value)
    scale(writer)
    shapes = {"token_embd": (vocabulary, width)}
    for block in range(2):
        shapes |= {f"blk.{block}.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{name}": (hidden, width) for name in ("gate", "up")} | {f"blk.{block}.ffn_down": (width, hidden)}
        shapes |= {f"blk.{block}.{name}_norm": (width,) for name in ("attn", "ffn")}
    shapes |= {"output_norm": (width,), "output": (vocabulary, width)}
    for key, shape in shapes.items():
        writer.add_tensor(f"{key}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    written(f"{scale.__name__}.gguf", scale)
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
