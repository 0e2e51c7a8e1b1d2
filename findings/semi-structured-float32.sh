#!/usr/bin/env bash
# torch 2.13.0 and compressed-tensors 0.20.0: packing a valid 2:4 matrix in float32 drops a tenth of its entries without a word.
# Guess: the dtype decides how wide an entry is, not which patterns fit; or float32 is refused.
# Seen 2026-11-28: round trip exact in bfloat16; in float32 9 % of all entries (a third of the groups lose one) come back as
#   zero: there the pattern
# is 1:2.
source "$(dirname "$0")/environment"
packages torch==2.13.0 compressed-tensors==0.20.0 numpy==2.4.6
check <<'PY'
import torch
from compressed_tensors.utils import sparse_semi_structured_from_dense_cutlass as pack
from compressed_tensors.utils import sparse_semi_structured_to_dense_cutlass as unpack

torch.manual_seed(0)
groups = torch.randn(64, 32, 4)
weight = groups.scatter(2, groups.abs().topk(2, largest=False).indices, 0).view(64, 128)
lost = {}
for dtype in (torch.bfloat16, torch.float32):
    typed = weight.to(dtype)
    lost[str(dtype)] = float(((unpack(*pack(typed)) == 0) & (typed != 0)).float().mean())
print("share of entries lost in a round trip:", lost)
assert lost["torch.bfloat16"] == 0 and lost["torch.float32"] > 0.05
PY
