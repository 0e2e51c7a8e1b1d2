#!/usr/bin/env bash
# torchao 0.18.0 and compressed-tensors 0.20.0: N of N:M is what is kept in one and what is zero in the other; 2:4 hides it.
# Guess: N:M means N of M are kept, as for 2:4 on the hardware that made it known.
# Seen 2026-11-28: torchao's 3:4 mask (a quarter zero) is refused as 3:4 by compressed-tensors, which takes it for 1:4;
#   torchao's 1:4 passes as 3:4.
source "$(dirname "$0")/environment"
packages torch==2.13.0 torchao==0.18.0 compressed-tensors==0.20.0 numpy==2.4.6
check <<'PY'
import torch
from compressed_tensors.utils import tensor_follows_mask_structure
from torchao.sparsity.utils import mask_creator

def follows(tensor, pattern):
    try:
        return tensor_follows_mask_structure(tensor, pattern)
    except ValueError:
        return False

torch.manual_seed(0)
weight = torch.randn(32, 64)
seen = {}
for kept in (1, 2, 3):
    masked = weight * mask_creator(weight, N=kept, M=4)
    seen[f"{kept}:4"] = [f"{n}:4" for n in (1, 2, 3) if follows(masked, f"{n}:4")]
print("torchao's pattern -> what compressed-tensors takes it for:", seen)
assert seen == {"1:4": ["1:4", "2:4", "3:4"], "2:4": ["1:4", "2:4"], "3:4": ["1:4"]}
PY
