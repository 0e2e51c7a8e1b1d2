#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0: torch.zeros in float8_e8m0fnu, the type of MX formats' scales, is not zero; in ml_dtypes a
#   zero is NaN.
# Guess: a type that has no zero refuses zeros and zero_(), or both libraries round to its smallest number.
# Seen 2026-11-28: torch.zeros and zero_() give 5.9e-39 (2^-127) and say nothing; ml_dtypes makes NaN of the same 0.0.
source "$(dirname "$0")/environment"
packages torch==2.13.0 ml_dtypes==0.6.0 numpy==2.4.6
check <<'PY'
import ml_dtypes
import numpy as np
import torch

made = torch.zeros(1, dtype=torch.float8_e8m0fnu).float().item()
set_ = torch.ones(1).to(torch.float8_e8m0fnu).zero_().float().item()
cast = float(np.zeros(1, np.float32).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)[0])
print(f"torch.zeros: {made}, zero_(): {set_}, ml_dtypes' cast of 0: {cast}")
assert made == set_ == 2.0**-127 and np.isnan(cast)
PY
