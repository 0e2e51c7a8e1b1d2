"""Times of matrix products: the arithmetic by a clock that is told what to say, the rest for real on tiny matrices."""

from collections import Counter
from dataclasses import dataclass
from statistics import median, quantiles

import pytest
import torch

import pretend
from uniprune.speed import timing
from uniprune.speed.kernels import BSR, CSR, DENSE

CPU = torch.device("cpu")
FLOAT = torch.float32
SHAPES = {(32, 64): 3, (64, 64): 1}


def measure(kernel, timer=timing.clock, shapes=SHAPES, dtypes=(FLOAT,), batches=(1,), sparsities=(0.5,)):
    return timing.measure(shapes, timing.Conditions(CPU, dtypes, batches, sparsities, [kernel], 0, timer))


def test_times_are_summed_over_the_matrices_of_the_model():
    seconds = {("dense", 32): 2, ("dense", 64): 10, ("CSR", 32): 1, ("CSR", 64): 20}
    results, missing = measure(CSR(), lambda kernel, weights, tokens: seconds[kernel.name, len(weights[0])] * len(weights))
    assert missing == []
    (result,) = results
    assert result.seconds == 3 * 1 + 20
    assert result.speedup == pytest.approx((3 * 2 + 10) / (3 * 1 + 20))
    assert result.low == result.high == result.speedup
    assert (result.kind, result.kernel, result.dtype, result.batch) == ("unstructured", "CSR", "float32", 1)
    assert (result.sparsity, result.rounds, result.left_dense) == (0.5, timing.ROUNDS, {})


def test_the_median_round_counts_the_first_does_not_and_sides_take_turns():
    sparse_seconds = [1000.0, 1, 2, 4, 5, 8, 10, 20]  # by round
    calls = []

    def timer(kernel, weights, tokens):
        calls.append(kernel.name)
        return sparse_seconds[calls.count("CSR") - 1] if kernel.name == "CSR" else 1.0

    (result,), _ = measure(CSR(), timer, shapes={(32, 64): 1})
    ratios = [1 / value for value in sparse_seconds[1:]]
    assert result.speedup == median(ratios) == 1 / 5
    low, _, high = quantiles(ratios, method="inclusive")
    assert (result.low, result.high) == (low, high)
    assert result.low < result.speedup < result.high
    assert calls == ["CSR", "dense", "dense", "CSR"] * 4


def test_every_dtype_batch_and_level_is_measured_and_dense_products_race_too():
    dtypes, batches, sparsities = (FLOAT, torch.float64), (1, 7), (0.9, 0.5)
    results, _ = measure(CSR(), dtypes=dtypes, batches=batches, sparsities=sparsities)
    cases = [(r.kind, r.dtype, r.against, r.sparsity, r.batch) for r in results]
    assert cases[:2] == [("dense", "float64", "float32", 0, batch) for batch in batches]
    assert cases[2:] == [
        ("unstructured", dtype, dtype, sparsity, batch)
        for dtype in ("float32", "float64")
        for sparsity in (0.5, 0.9)
        for batch in batches
    ]
    for result in results:
        assert result.rounds >= timing.ROUNDS
        assert 0 < result.low <= result.speedup <= result.high
        assert result.seconds > 0


@dataclass(frozen=True)
class Wrong(CSR):
    """Right for one token, not for several."""

    name: str = "wrong"

    def multiply(self, weight, tokens):
        return super().multiply(weight, tokens) * (1 if len(tokens) == 1 else 1.1)


def test_a_wrong_kernel_is_no_result():
    results, missing = measure(Wrong(), batches=(1, 2))
    assert results == []
    assert [(one.kernel, one.dtype) for one in missing] == [("wrong", "float32")]
    assert "the product is wrong" in missing[0].reason


@dataclass(frozen=True)
class Broken(CSR):
    """Has no product in float64."""

    def compress(self, weight):
        if weight.dtype == torch.float64:
            tried[weight.dtype] += 1
            raise NotImplementedError("not implemented for 'Double'\nand a trace")
        return super().compress(weight)


tried = Counter()


def test_a_kernel_that_is_not_there_is_tried_once_and_says_why():
    tried.clear()
    results, missing = measure(Broken(), dtypes=(torch.float64, FLOAT), sparsities=(0.5, 0.9))
    assert [(one.dtype, one.reason) for one in missing] == [("float64", "not implemented for 'Double'")]
    assert tried == {torch.float64: 1}
    assert [r.dtype for r in results if r.kernel == "CSR"] == ["float32"] * 2


def test_matrices_that_a_kernel_does_not_take_are_dense_on_both_sides():
    seconds = {"dense": 2.0, "BSR": 1.0}
    timer = lambda kernel, weights, tokens: seconds[kernel.name] * len(weights)  # noqa: E731
    (result,), missing = measure(BSR(), timer, shapes={(32, 64): 3, (24, 64): 2})
    assert missing == []
    assert list(result.left_dense) == ["24 x 64"]
    assert "16x16 tiles" in result.left_dense["24 x 64"]
    assert result.seconds == 3 * 1 + 2 * 2
    assert result.speedup == pytest.approx((3 * 2 + 2 * 2) / (3 * 1 + 2 * 2))


def test_a_kernel_that_takes_no_matrix_is_missing():
    results, missing = measure(BSR(), shapes={(24, 64): 2})
    assert results == []
    assert "24 x 64 weights are not divisible" in missing[0].reason


def test_rounds_go_through_copies_that_no_cache_holds_but_no_more_than_the_model_has(monkeypatch):
    def seen(cache):
        monkeypatch.setattr(timing, "CACHE", cache)
        weights = {}

        def timer(kernel, copies, tokens):
            weights.setdefault((kernel.name, *copies[0].shape), set()).add(id(copies[0]))
            return 1.0

        measure(CSR(), timer, shapes={(32, 64): 3, (64, 64): 9})
        return {key: len(ids) for key, ids in weights.items()}

    one = 4 * (32 * 64 + 64 * 64)  # bytes of one copy of each
    few = {("dense", 32, 64): 3, ("CSR", 32, 64): 3, ("dense", 64, 64): 5, ("CSR", 64, 64): 5}
    assert seen(4 * one + 1) == few
    assert set(seen(one).values()) == {1}


def test_copies_hold_the_same_weights_elsewhere():
    copies = timing._copies(CSR(), torch.eye(16), 3)
    assert len({copy.values().data_ptr() for copy in copies}) == 3
    assert all(torch.equal(copy.to_dense(), torch.eye(16)) for copy in copies)
    assert len(timing._copies(DENSE, torch.eye(4), 1)) == 1


@pytest.mark.parametrize(("copies", "queued"), [(1, 32), (5, 35), (40, 40)])
def test_a_gpu_is_given_many_products_at_once(copies, queued):
    given = []

    def timer(kernel, weights, tokens):
        given.append(len(weights))
        return 1.0

    with pretend.device():
        side = timing.Side(DENSE, list(range(copies)), torch.ones(4, 8, device=pretend.DEVICE))
        assert side.time(0, 2, timer) == 1 / queued
    assert given == [queued]
    assert timing.Side(DENSE, list(range(copies)), torch.ones(4, 8)).time(0, 2, timer) == 1
