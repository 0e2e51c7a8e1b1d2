#!/usr/bin/env bash
# transformers 5.23.0 with torchao 0.18.0, optimum-quanto 0.2.7 and torch's pruning: a Mixtral quantised to int8 stays float32
#   by nine tenths.
# Guess: experts are Linear layers (in the checkpoint they are a matrix each), so what walks over Linear layers finds them, or
#   warns.
# Seen 2026-11-28: experts are two stacked parameters per layer; torchao quantises 12 % of the weights, quanto 12 %,
# and 50 % of all Linear layers' weights pruned are 6 % of the model's. No warning.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 torchao==0.18.0 optimum-quanto==0.2.7 numpy==2.4.6
check <<'PY'
import torch
import torch.nn.utils.prune as prune
from optimum.quanto import QTensor, freeze, qint8, quantize
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import MixtralConfig, MixtralForCausalLM

shape = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)

def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))

total = sum(p.numel() for p in mixtral().parameters())
ao, quanto, pruned = mixtral(), mixtral(), mixtral()
quantize_(ao, Int8WeightOnlyConfig())
quantize(quanto, weights=qint8)
freeze(quanto)
linear = [(module, "weight") for module in pruned.modules() if isinstance(module, torch.nn.Linear)]
prune.global_unstructured(linear, prune.L1Unstructured, amount=0.5)
seen = {
    "torchao": sum(p.numel() for p in ao.parameters() if isinstance(p, TorchAOBaseTensor)) / total,
    "quanto": sum(p.numel() for p in quanto.parameters() if isinstance(p, QTensor)) / total,
    "pruned": sum(int((module.weight == 0).sum()) for module, _ in linear) / total,
}
print("share of all weights:", seen)
assert 0 < min(seen.values()) and max(seen.values()) < 0.2
PY
