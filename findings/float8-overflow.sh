#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0: infinity cast to float8_e4m3fn is 448 in torch; ml_dtypes, and torch in every other float8,
#   do not hide it.
# Guess: a type without infinities makes NaN of what it cannot hold (so ml_dtypes), or every float8 saturates; not one type
#   alone.
# Seen 2026-11-28, torch: e4m3fn inf -> 448, 1000 -> 448; e4m3fnuz -> NaN, NaN; e5m2 -> inf, 1024. ml_dtypes: e4m3fn -> NaN,
#   NaN.
source "$(dirname "$0")/environment"
packages torch==2.13.0 ml_dtypes==0.6.0 numpy==2.4.6
check <<'PY'
import math

import ml_dtypes
import numpy as np
import torch

values = [1000.0, math.inf]
torchs = {name: torch.tensor(values).to(getattr(torch, f"float8_{name}")).float().tolist() for name in ("e4m3fn", "e4m3fnuz", "e5m2")}
numpys = np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32).tolist()
print(f"of {values} torch makes {torchs}; ml_dtypes, in e4m3fn, {numpys}")
assert torchs["e4m3fn"] == [448, 448] and torchs["e5m2"] == [1024, math.inf]
assert all(map(math.isnan, torchs["e4m3fnuz"])) and all(map(math.isnan, numpys))
PY
