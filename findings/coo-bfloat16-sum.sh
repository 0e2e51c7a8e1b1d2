#!/usr/bin/env bash
# torch 2.13.0, CPU: a bfloat16 weight in COO times a dense matrix is 30 times less accurate than the same product dense.
# Guess: sums of bfloat16 are accumulated in float32, as in the dense product; CSR, which has no such kernel, says so.
# Seen 2026-11-28: relative error 0.0016 dense, 0.050 in COO (4,096 inputs, half of them zero): what sums in bfloat16 gives.
source "$(dirname "$0")/environment"
packages torch==2.13.0 numpy==2.4.6
check <<'PY'
import torch

torch.manual_seed(0)
weight = torch.randn(256, 4096).masked_fill(torch.rand(256, 4096) < 0.5, 0).bfloat16()
inputs = torch.randn(4096, 8).bfloat16()
exact = weight.double() @ inputs.double()

def error(product):
    return float((product.double() - exact).norm() / exact.norm())

dense, coo = error(weight @ inputs), error(weight.to_sparse() @ inputs)
try:
    csr = error(weight.to_sparse_csr() @ inputs)
except NotImplementedError as refusal:
    csr = str(refusal)
print(f"dense {dense:.4f}, COO {coo:.4f}, CSR: {csr}")
assert dense < 0.005 and coo > 5 * dense
PY
