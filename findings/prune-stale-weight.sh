#!/usr/bin/env bash
# torch 2.13.0: after load_state_dict a layer under torch.nn.utils.prune still shows the old weight, in the old place, until its
#   next forward.
# Guess: layer.weight is computed from weight_orig and weight_mask whenever it is read.
# Seen 2026-11-28: it is a plain attribute that a forward hook sets; the same after .to(bfloat16) (float32 stays) and after an
#   optimizer's step.
source "$(dirname "$0")/environment"
packages torch==2.13.0 numpy==2.4.6
check <<'PY'
import torch
import torch.nn.utils.prune as prune

torch.manual_seed(0)
layers = [torch.nn.Linear(16, 16, bias=False) for _ in range(2)]
for layer, amount in zip(layers, (0.25, 0.75)):
    prune.l1_unstructured(layer, "weight", amount=amount)
mine, other = layers
mine.load_state_dict(other.state_dict())
before = float((mine.weight == 0).float().mean())
mine(torch.zeros(1, 16))
after = float((mine.weight == 0).float().mean())
mine.to(torch.bfloat16)
print(f"sparsity of the layer loaded from one of 75 %: {before}, after a forward {after}; in {mine.weight.dtype} after .to(bfloat16)")
assert (before, after, mine.weight.dtype) == (0.25, 0.75, torch.float32)
PY
