#!/usr/bin/env bash
# torchao 0.18.0, hqq 0.2.8.post1: quantised to 4 bits with an offset, torchao keeps every pruned zero; HQQ keeps none, even in 8 bits.
# Guess: an offset moves zero off the grid in both, by little in 8 bits; or in neither, since a zero point is an integer.
# Seen 2026-11-28, half of the weights zero, groups of 64: zeros kept 100 % in torchao (4 bits), 0 % in HQQ (4 or 8 bits).
source "$(dirname "$0")/environment"
packages torch==2.13.0 torchao==0.18.0 hqq==0.2.8.post1 numpy==2.4.6
check <<'PY'
import torch
from hqq.core.quantize import Quantizer
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

torch.manual_seed(0)
weight = torch.randn(128, 512)
weight[weight.abs() < weight.abs().median()] = 0

def kept(back):
    return round(float((back[weight == 0] == 0).float().mean()), 3)

ao = torch.nn.Sequential(torch.nn.Linear(512, 128, bias=False))
ao[0].weight.data.copy_(weight)
quantize_(ao, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64), mapping_type=MappingType.ASYMMETRIC))
seen = {"torchao, 4 bits": kept(ao[0].weight.dequantize())}
for bits in (4, 8):
    packed, meta = Quantizer.quantize(weight, nbits=bits, group_size=64, device="cpu", compute_dtype=torch.float32)
    seen[f"HQQ, {bits} bits"] = kept(Quantizer.dequantize(packed, meta))
print("share of zeros kept:", seen)
assert seen["torchao, 4 bits"] == 1
assert max(seen["HQQ, 4 bits"], seen["HQQ, 8 bits"]) < 0.05
PY
