#!/usr/bin/env bash
# torch 2.13.0, CPU: a boolean mask becomes bfloat16 many times slower than the same bytes as uint8 do, and `weight * mask` waits for it.
# Guess: the two are the same bytes, so they take the same time, that of reading and writing them.
# Seen 2026-11-29: mask.bfloat16() takes about 8 times as long as mask.view(torch.uint8).bfloat16(), and weight * mask about 10 times
#   as long as (weight.view(torch.int16) * mask).view(torch.bfloat16), which has the same values.
source "$(dirname "$0")/environment"
packages torch==2.13.0 numpy==2.4.6
check <<'PY'
import torch
from timing import seconds

torch.set_num_threads(1)
torch.manual_seed(0)
weight, mask = torch.randn(1000, 1000).bfloat16(), torch.rand(1000, 1000) > 0.5
assert torch.equal(mask.bfloat16(), mask.view(torch.uint8).bfloat16())
assert torch.equal(weight * mask, (weight.view(torch.int16) * mask).view(torch.bfloat16))
become = seconds(lambda: mask.bfloat16()) / seconds(lambda: mask.view(torch.uint8).bfloat16())
product = seconds(lambda: weight * mask) / seconds(lambda: (weight.view(torch.int16) * mask).view(torch.bfloat16))
print(f"bool to bfloat16 / uint8 to bfloat16: {become:.1f}; weight * mask / the same of integers: {product:.1f}")
assert become > 3 and product > 3
PY
