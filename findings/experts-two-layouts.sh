#!/usr/bin/env bash
# transformers 5.23.0: experts.gate_up_proj is [expert, out, in] in Mixtral, Qwen3-MoE, DeepSeek-V3, but [expert, in, out] in
#   GPT-OSS, Llama 4, Aria.
# Guess: one name, one meaning: a pattern along the inputs (2:4) runs over the last dimension in all of them.
# Seen 2026-11-28 (hidden size 48, expert size 80): (4, 160, 48) in the first three, (4, 48, 160) in the others.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 numpy==2.4.6
check <<'PY'
import torch
import transformers

seen = {}
for name in ("Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Llama4Text", "AriaText"):
    config = getattr(transformers, f"{name}Config")(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    config.intermediate_size = config.moe_intermediate_size = 80
    config.first_k_dense_replace = 0
    for setting in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if hasattr(config, setting):
            setattr(config, setting, 4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    seen[name] = next(tuple(p.shape) for key, p in model.named_parameters() if key.endswith("experts.gate_up_proj"))
print(seen)
assert all(seen[name] == (4, 160, 48) for name in ("Mixtral", "Qwen3Moe", "DeepseekV3"))
assert all(seen[name] == (4, 48, 160) for name in ("GptOss", "Llama4Text", "AriaText"))
PY
