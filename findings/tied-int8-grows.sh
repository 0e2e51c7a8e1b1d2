#!/usr/bin/env bash
# transformers 5.23.0 with torchao 0.18.0: quantising a model with tied embeddings to int8 makes it larger.
# Guess: int8 is a quarter of float32, the tied matrix is quantised once or left alone; the model shrinks.
# Seen 2026-11-28 (4,096 tokens, hidden size 64): 1,344,768 bytes before, 1,406,208 after: the output layer gets an int8 copy of
#   its own,
# the embeddings stay float32.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 torchao==0.18.0 numpy==2.4.6
check <<'PY'
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

def size(model):
    parts = [p.tensor_data_names if hasattr(p, "tensor_data_names") else () for p in model.parameters()]
    return sum(sum(getattr(p, part).nbytes for part in names) or p.nbytes for p, names in zip(model.parameters(), parts))

shape = dict(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
before = size(model)
quantize_(model, Int8WeightOnlyConfig())
print(f"{before:,} bytes, then {size(model):,}; output layer {type(model.lm_head.weight).__name__}, embeddings {model.model.embed_tokens.weight.dtype}")
assert size(model) > before
PY
