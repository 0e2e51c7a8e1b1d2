#!/usr/bin/env bash
# torch 2.13.0, CPU: the largest absolute value of a float32 tensor, as torch.linalg.vector_norm(x, inf).
# Guess: one pass over the memory, as fast as the 2-norm, and faster than x.abs().amax(), which makes a tensor on the way.
# Seen 2026-11-30 (AMD EPYC, one thread): 20 times as slow as abs().amax(), 24 times as slow as the 2-norm.
source "$(dirname "$0")/environment"
packages torch==2.13.0 numpy==2.4.6
check <<'PY'
import torch
from timing import seconds

torch.set_num_threads(1)
x = torch.randn(1 << 20)
assert torch.linalg.vector_norm(x, torch.inf) == x.abs().amax()
largest = seconds(lambda: torch.linalg.vector_norm(x, torch.inf))
copied, two = seconds(lambda: x.abs().amax()), seconds(lambda: torch.linalg.vector_norm(x, 2))
print(f"vector_norm(x, inf): {largest / copied:.0f} times abs().amax(), {largest / two:.0f} times vector_norm(x, 2)")
assert largest > 4 * copied and largest > 4 * two
PY
