#!/usr/bin/env bash
# torch 2.13.0, CPU: `.T.contiguous()` of a tall matrix with few columns is not the fast way to transpose it.
# Guess: it is one pass in one call, so nothing in Python that copies column by column is faster.
# Seen 2026-11-29: with 4 columns it takes 2.5 times as long as torch.stack(x.unbind(1)), with 2 more than 4 times; from 16 columns on
#   it is the faster one.
source "$(dirname "$0")/environment"
packages torch==2.13.0 numpy==2.4.6
check <<'PY'
import torch
from timing import seconds

torch.set_num_threads(1)
torch.manual_seed(0)
ratios = {}
for columns in (2, 4, 16):
    tall = torch.rand(800_000 // columns, columns)
    assert torch.equal(tall.T.contiguous(), torch.stack(tall.unbind(1)))
    ratios[columns] = seconds(lambda: tall.T.contiguous()) / seconds(lambda: torch.stack(tall.unbind(1)))
print("columns: .T.contiguous() / stack of the columns:", {columns: round(ratio, 1) for columns, ratio in ratios.items()})
assert ratios[2] > 2 and ratios[4] > 1.5 and ratios[16] < 1
PY
