"""Kernels in Triton, run by its interpreter on the CPU, against the plain functions beside them; in a process of their own, as
Triton chooses when it is imported. And what becomes of a kernel that fails."""

import os
import subprocess
import sys

import pytest
import torch

from uniprune.common import fused as module
from uniprune.common.fused import Fused, agree, available

CODE = """
import itertools
import math
import torch
from triton.runtime.interpreter import GridExecutor
from uniprune.common.fused import agree
from uniprune.controller.descent.token_weighting import weighted
from uniprune.controller.descent.update import Step, updated
from uniprune.sparsity.top import _among_few

launches, launch = 0, GridExecutor.__call__

def counted(self, *arguments, **settings):
    global launches
    launches += 1
    return launch(self, *arguments, **settings)

GridExecutor.__call__ = counted

def same(function, *tensors, kernels=None, **settings):
    global launches
    launches = 0
    found, expected = function.launcher(*tensors, **settings), function.plain(*tensors, **settings)
    assert agree(found, expected), (function.__name__, [t.shape for t in tensors], settings)
    assert launches == (kernels or function.kernels), launches

torch.manual_seed(0)
for groups, size, keep in ((1, 4, 2), (300, 4, 2), (7, 8, 4), (5, 5, 2), (3, 16, 1), (4, 1, 1)):
    scores = torch.randn(groups, size)
    for some in (scores, scores.round(), scores.bfloat16()):
        same(_among_few, some, keep=keep)
for rows, columns in ((1, 1), (16, 128), (33, 200), (5, 300)):
    gradient, dual = torch.randn(rows, columns), torch.rand(rows, columns)
    ratio = torch.randint(-127, 127, (rows, columns), dtype=torch.int8)
    rms = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    before = torch.tensor(0.8)
    step = Step(decays=(0.9, 0.95), rescale=0.7, noise=0.05, unit=0.5, size=0.1, turn=7)
    for noise in (None, 0.05):
        same(updated, gradient, dual, ratio, rms, before, step=step._replace(noise=noise), kernels=None if noise else 1)
    same(updated, gradient.T.contiguous().T, dual, ratio, rms, before, step=step._replace(decays=(0.3, 0.4)))
    still = (torch.zeros_like(ratio), torch.zeros_like(rms), torch.tensor(0.0))
    same(updated, torch.zeros_like(gradient), dual, *still, step=step)
for tokens, dtype in itertools.product((1, 5), (torch.float32, torch.bfloat16, torch.float16)):
    x, gradient = torch.randn(tokens, 1100).to(dtype), torch.randn(tokens, 7).to(dtype)
    same(weighted, x, gradient, torch.rand(1100), torch.rand(7))
    same(weighted, torch.zeros_like(x), gradient, torch.rand(1100), torch.rand(7))
    same(weighted, x, torch.zeros_like(gradient), torch.rand(1100), torch.rand(7))
gradient = torch.tensor([[1.0, math.nan], [0.5, 0.25]]).half()
assert weighted.launcher(torch.randn(2, 64).half(), gradient, torch.rand(64), torch.rand(2))[0].isnan().any()
"""


@pytest.mark.skipif(not available(), reason="needs the triton package")
def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def plain(a, *, factor):
    """Docstring."""
    return a * factor


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda a, *, factor: a * factor + 1, "it gives something else"),
        (lambda a, *, factor: (a * factor).double(), "it gives something else"),
        (lambda a, *, factor: 1 / 0, "ZeroDivisionError: division by zero"),
        (None, "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_kernel_that_does_not_do_gives_way(monkeypatch, caplog, kernel, reason):
    function = Fused(plain, 1, "nowhere:nothing")
    if kernel:
        monkeypatch.setattr(Fused, "launcher", staticmethod(kernel))
    assert (function.__name__, function.__doc__) == ("plain", "Docstring.")
    a = torch.ones(3)
    assert function(a, factor=2).tolist() == [2, 2, 2]  # on a CPU nobody asks for the kernel
    monkeypatch.setattr(module, "available", lambda: True)
    monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    for _ in range(2):
        assert function(a, factor=2).tolist() == [2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [f"the kernel of plain is not used on this GPU: {reason}"]


def test_a_kernel_that_does_is_used(monkeypatch):
    seen = []
    function = Fused(plain, 1, "nowhere:nothing")
    monkeypatch.setattr(Fused, "launcher", staticmethod(lambda a, *, factor: seen.append(factor) or a * factor))
    monkeypatch.setattr(module, "available", lambda: True)
    monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    for factor in (1, 2, 3):
        assert function(torch.ones(3), factor=factor).tolist() == [factor] * 3
    assert seen == [1, 2, 3]


def test_a_kernel_that_has_no_memory_beside_plain_is_tried_again(monkeypatch, caplog):
    function, calls = Fused(plain, 1, "nowhere:nothing"), []

    def kernel(a, *, factor):
        calls.append(factor)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("of the device")
        return a * factor

    monkeypatch.setattr(Fused, "launcher", staticmethod(kernel))
    monkeypatch.setattr(module, "available", lambda: True)
    monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    assert [function(torch.ones(1), factor=factor).item() for factor in (2, 3, 4)] == [2, 3, 4]
    assert calls == [2, 3, 4]
    assert not caplog.records


def test_a_kernel_is_held_against_plain_for_each_way_that_it_is_compiled(monkeypatch, caplog):
    function = Fused(plain, 1, "nowhere:nothing", specialised_on=lambda a, *, factor: len(a))

    def kernel(a, *, factor):
        if len(a) == 2 or a.dtype == torch.float64:
            raise RuntimeError("not compiled")
        return a * factor

    monkeypatch.setattr(Fused, "launcher", staticmethod(kernel))
    monkeypatch.setattr(module, "available", lambda: True)
    monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    for length, dtype in ((1, torch.float32), (2, torch.float32), (1, torch.float64), (2, torch.float32), (3, torch.float32)):
        assert function(torch.ones(length, dtype=dtype), factor=2).tolist() == [2] * length
    assert len(caplog.records) == 2


def test_a_kernel_is_held_against_a_representative_call(monkeypatch):
    function = Fused(plain, 1, "nowhere:nothing", representative=lambda a, *, factor: factor > 1)
    monkeypatch.setattr(Fused, "launcher", staticmethod(lambda a, *, factor: a * factor**2))  # right for 1 alone
    monkeypatch.setattr(module, "available", lambda: True)
    monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    assert [function(torch.ones(1), factor=factor).item() for factor in (1, 1, 3, 1, 2)] == [1, 1, 3, 1, 2]


def test_what_agrees():
    a = torch.tensor([1.0, 1000.0])
    assert agree((a, a), (a + 0.1, a))
    assert not agree((a, a), (a + 10, a))
    assert not agree(a, torch.full((2,), torch.nan))
    assert agree(a > 1, a > 1)
    assert not agree(a > 1, a > 0)
