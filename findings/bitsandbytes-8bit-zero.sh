#!/usr/bin/env bash
# bitsandbytes 0.50.2, CPU: 8-bit blockwise quantisation never gives a zero back, though its code book holds one; 4 bits (NF4)
#   keep them all.
# Guess: what the code book holds comes back unchanged, zero above all.
# Seen 2026-11-28: every zero comes back as 2.1e-5 times its block's maximum; NF4 keeps 100 %.
source "$(dirname "$0")/environment"
packages torch==2.13.0 bitsandbytes==0.50.2 scipy==1.17.1 numpy==2.4.6
check <<'PY'
import bitsandbytes.functional as bnb
import torch

torch.manual_seed(0)
weight = torch.randn(64, 256)
weight[weight.abs() < weight.abs().median()] = 0
pruned = weight == 0
in_book = bool((bnb.create_dynamic_map() == 0).any())
eight = bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight))
four = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64))
kept = {8: float((eight[pruned] == 0).float().mean()), 4: float((four[pruned] == 0).float().mean())}
print(f"zero in the code book: {in_book}; zeros kept by bits: {kept}; what 8 bits make of zero: {eight[pruned].unique()[:3].tolist()}")
assert in_book and kept == {8: 0, 4: 1}
PY
