"""The product in Triton, run by Triton's interpreter on the CPU; in a process of its own, as Triton chooses when imported."""

import os
import subprocess
import sys

import pytest

from uniprune.common.fused import available

if not available():
    pytest.skip("needs the triton package", allow_module_level=True)

CODE = """
import torch
from uniprune.runtime import gpu
from uniprune.runtime.packed import pack

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows, columns in ((1, 1), (3, 7), (5, 256), (4, 300)):
        weight = torch.randn(rows, columns).to(dtype) * (torch.rand(rows, columns) < 0.5)
        packed, bias = pack(weight), torch.randn(rows).to(dtype)
        for batch in (1, 2, 3, 8):
            tokens = torch.randn(batch, columns).to(dtype)
            for one in (None, bias):
                exact = tokens.double() @ weight.double().T + (0 if one is None else one.double())
                found = gpu.multiply(tokens, packed, one).double()
                assert torch.allclose(found, exact, rtol=torch.finfo(dtype).eps, atol=1e-5), (dtype, rows, columns, batch)
"""


def test_products_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
