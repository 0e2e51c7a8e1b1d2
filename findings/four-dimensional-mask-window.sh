#!/usr/bin/env bash
# transformers 5.23.0: a 4-D attention mask, as for packed samples, given to a model whose layers have a sliding window.
# Guess: the mask says which tokens may be seen, and the layers' window still holds.
# Seen 2026-11-29: Mistral, Gemma 2 and Qwen2 take such a mask as it is, in every layer: a causal 4-D mask gives other logits than no
#   mask, those of the same model without a window. GPT-Neo's local layers keep theirs. Nothing is said.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 numpy==2.4.6
check <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
             vocab_size=64, max_position_embeddings=64, pad_token_id=0)
NEO = dict(hidden_size=32, num_layers=2, num_heads=4, vocab_size=64, max_position_embeddings=64)
WINDOW = 8
FAMILIES = {
    "mistral": (SIZES | {"sliding_window": WINDOW}, SIZES | {"sliding_window": None}),
    "gemma2": (SIZES | {"sliding_window": WINDOW}, SIZES | {"sliding_window": 64}),
    "qwen2": (SIZES | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}, SIZES),
    "gpt_neo": (NEO | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}, None),
}


def logits(family, settings, mask):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 6  # so that attention matters
    with torch.no_grad():
        return model(torch.arange(1, 33)[None], attention_mask=mask).logits


causal = torch.zeros(1, 1, 32, 32).masked_fill_(~torch.ones(32, 32).tril().bool(), torch.finfo(torch.float32).min)
for family, (windowed, wide) in FAMILIES.items():
    alone, masked = logits(family, windowed, None), logits(family, windowed, causal)
    differ = float((alone - masked).abs().max())
    print(family, "a causal 4-D mask instead of none: logits differ by", differ)
    if wide is None:
        assert differ < 1e-3
    else:
        assert differ > 0.1
        torch.testing.assert_close(masked, logits(family, wide, None), rtol=1e-3, atol=1e-3)
PY
