#!/usr/bin/env bash
# torch 2.13.0 with zstandard 0.25.0: half of the zeros that torch.nn.utils.prune leaves are negative zeros; a packed checkpoint
#   is 1.8 times as large for it.
# Guess: a pruned weight is all zero bits, so a file of 90 % zeros is small however it was pruned.
# Seen 2026-11-28: 50 % of the zeros have the sign bit set (they are weight * mask); in bfloat16 zstd packs them into 0.22 of
#   the size, with plain zeros into 0.12.
source "$(dirname "$0")/environment"
packages torch==2.13.0 zstandard==0.25.0 numpy==2.4.6
check <<'PY'
import torch
import torch.nn.utils.prune as prune
import zstandard

torch.manual_seed(0)
layer = torch.nn.Linear(1024, 1024, bias=False)
prune.l1_unstructured(layer, "weight", amount=0.9)
prune.remove(layer, "weight")
weight = layer.weight.data.bfloat16()
negative = float(torch.signbit(weight[weight == 0]).float().mean())

def packed(tensor):
    raw = tensor.view(torch.uint8).numpy().tobytes()
    return len(zstandard.ZstdCompressor().compress(raw)) / len(raw)

as_is, plain = packed(weight), packed(weight.masked_fill(weight == 0, 0))
print(f"{negative:.2f} of the zeros are negative; packed to {as_is:.3f} of the size, {plain:.3f} with plain zeros")
assert 0.4 < negative < 0.6 and as_is > 1.5 * plain
PY
