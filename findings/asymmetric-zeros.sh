#!/usr/bin/env bash
# torchao 0.18.0, optimum-quanto 0.2.7, hqq 0.2.8.post1: 4 bits with an offset keep every pruned zero in torchao, none in
#   quanto; HQQ none even in 8 bits.
# Guess: offsets move zero off the grid in all of them, by little in 8 bits; or in none, since a zero point is an integer.
# Seen 2026-11-28, half of the weights zero, groups of 64 (quanto 128): zeros kept 100 % in torchao, 0 % in quanto, 0 % in HQQ,
#   4 or 8 bits.
source "$(dirname "$0")/environment"
packages torch==2.13.0 torchao==0.18.0 optimum-quanto==0.2.7 hqq==0.2.8.post1 numpy==2.4.6
check <<'PY'
import torch
from hqq.core.quantize import Quantizer
from optimum.quanto import freeze, qint4, quantize
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

torch.manual_seed(0)
weight = torch.randn(128, 512)
weight[weight.abs() < weight.abs().median()] = 0

def layer():
    model = torch.nn.Sequential(torch.nn.Linear(512, 128, bias=False))
    model[0].weight.data.copy_(weight)
    return model

def kept(back):
    return round(float((back[weight == 0] == 0).float().mean()), 3)

ao, quanto, seen = layer(), layer(), {}
quantize_(ao, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64), mapping_type=MappingType.ASYMMETRIC))
seen["torchao, 4 bits"] = kept(ao[0].weight.dequantize())
quantize(quanto, weights=qint4)
freeze(quanto)
seen["quanto, 4 bits"] = kept(quanto[0].weight.dequantize())
for bits in (4, 8):
    packed, meta = Quantizer.quantize(weight, nbits=bits, group_size=64, device="cpu", compute_dtype=torch.float32)
    seen[f"HQQ, {bits} bits"] = kept(Quantizer.dequantize(packed, meta))
print("share of zeros kept:", seen)
assert seen["torchao, 4 bits"] == 1
assert max(seen["quanto, 4 bits"], seen["HQQ, 4 bits"], seen["HQQ, 8 bits"]) < 0.05
PY
