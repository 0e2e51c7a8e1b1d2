"""The command bench: what it says of numbers that are given, and that it runs on checkpoints without reading a weight."""

import inspect
import json
import os
import shutil

import pytest

from command import run
from uniprune import bench
from uniprune.entrypoints import bench as entry_bench
from uniprune.errors import InputError
from uniprune.reporting import tables
from uniprune.speed import timing
from uniprune.speed.kernels import SPARSE
from uniprune.speed.settings import Measurement
from uniprune.speed.timing import Missing, Result


def result(kind="unstructured", kernel="CSR", dtype="float32", batch=1, sparsity=0.5, speedup=1.0, low=None, **changes):
    settings = {"against": dtype, "high": speedup, "rounds": 9, "seconds": 1.0, "left_dense": {}} | changes
    low = speedup if low is None else low
    return Result(kind=kind, kernel=kernel, dtype=dtype, batch=batch, sparsity=sparsity, speedup=speedup, low=low, **settings)


def rising(*speedups, **changes):
    sparsities = (0.5, 0.7, 0.9)
    return [
        result(sparsity=sparsity, speedup=speedup, **changes) for sparsity, speedup in zip(sparsities, speedups, strict=True)
    ]


@pytest.mark.parametrize(
    ("speedups", "sentence"),
    [
        ((0.3, 0.6, 0.9), "in float32 at batch 1 not faster (0.90x the dense speed at best, at 90%)."),
        ((0.3, 1.2, 2.5), "in float32 at batch 1 faster from 70% on (1.20x, 2.50x at 90%)."),
        ((0.3, 0.8, 1.2), "in float32 at batch 1 faster from 90% on (1.20x)."),
        ((1.2, 0.8, 1.1), "in float32 at batch 1 faster from 90% on (1.10x)."),
        ((1.01, 1.02, 1.04), "in float32 at batch 1 not faster (1.04x the dense speed at best, at 90%)."),
    ],
)
def test_a_sentence_says_from_where_on_it_is_faster(speedups, sentence):
    assert entry_bench.verdicts(rising(*speedups), []) == [f"unstructured (CSR): {sentence}"]


def test_faster_is_what_three_quarters_of_the_rounds_say():
    assert entry_bench.first_faster([result(speedup=1.5, low=1.0)]) is None
    (sentence,) = entry_bench.verdicts([result(speedup=1.5, low=1.0)], [])
    assert "not certainly faster (1.50x" in sentence
    row = result(speedup=1.5, low=1.1)
    assert entry_bench.first_faster([row]) is row
    assert entry_bench.first_faster([row], bar=1.1) is None


@pytest.mark.parametrize(
    ("dense", "end"),
    [
        (0.9, "(1.20x, 2.50x at 90%)."),
        (1.1, "(1.20x, 2.50x at 90%), and than dense bfloat16 (1.10x) from 70% on."),
        (1.5, "(1.20x, 2.50x at 90%), and than dense bfloat16 (1.50x) from 90% on."),
        (2.6, "(1.20x, 2.50x at 90%), but never than dense bfloat16 (2.60x)."),
    ],
)
def test_dense_products_in_another_dtype_are_rivals(dense, end):
    rival = result("dense", "dense", "bfloat16", sparsity=0.0, speedup=dense, against="float32")
    elsewhere = result("dense", "dense", "bfloat16", batch=128, sparsity=0.0, speedup=9.0, against="float32")
    (sentence,) = entry_bench.verdicts([rival, elsewhere, *rising(0.3, 1.2, 2.5)], [])
    assert sentence.endswith(end)


def test_rivals_are_seen_from_every_dtype():
    """bfloat16 is twice as slow as float32 when dense: 1.8 times faster than that is still slower."""
    rival = result("dense", "dense", "bfloat16", sparsity=0.0, speedup=0.5, against="float32")
    (sentence,) = entry_bench.verdicts([rival, *rising(0.5, 1.2, 1.8, dtype="bfloat16")], [])
    assert sentence.endswith("but never than dense float32 (2.00x).")


def test_what_is_missing_or_left_dense_is_said():
    rows = [result("2:4", "semi-structured", "float16", batch, speedup=1.4, left_dense={"5 x 8": "odd"}) for batch in (1, 128)]
    missing = [
        Missing(kind="2:4", kernel="semi-structured", dtype="float32", reason="weights of type float32"),
        Missing(kind="unstructured", kernel="CSR", dtype="float16", reason="not implemented."),
    ]
    assert entry_bench.verdicts(rows, missing) == [
        "2:4 (semi-structured): in float16 at batch 1 faster from 50% on (1.40x); in float16 at batch 128 faster from 50% on "
        "(1.40x); no kernel in float32; matrices of 5 x 8 stay dense.",
        "unstructured: no kernel for it here (not implemented); a pruned model runs at dense speed.",
    ]


def test_the_table():
    dense = result("dense", "dense", "bfloat16", sparsity=0.0, speedup=1.5, against="float32")
    rows = [dense, result(), result(sparsity=0.95, speedup=2.5), result(batch=128, speedup=0.4, high=1.2, low=0.3)]
    assert tables.bench_rows(rows) == [
        ["masks", "type", "batch", "0%", "50%", "95%"],
        ["dense, against float32", "bfloat16", "1", "1.50", "", ""],
        ["unstructured", "float32", "1", "", "1.00", "2.50"],
        ["unstructured", "float32", "128", "", "0.40?", ""],
    ]


@pytest.fixture
def hollow_folder(folder, tmp_path):
    """A checkpoint whose weights cannot be read: there is nothing behind the files' headers."""
    shutil.copytree(folder, tmp_path / "hollow")
    for file in (tmp_path / "hollow").glob("*.safetensors"):
        size, content = file.stat().st_size, file.read_bytes()
        file.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
        os.truncate(file, size)
    return tmp_path / "hollow"


def test_a_checkpoint_is_measured_without_reading_a_weight(hollow_folder):
    found = bench(hollow_folder, dtypes=["float32", "float32"], batches=[1, 2], sparsities=[0.9], device="cpu", seconds=0)
    assert found.shapes == {"32 x 32": 6, "16 x 32": 6, "64 x 32": 6, "32 x 64": 3}
    assert (found.device, found.dtypes, found.batches) == ("CPU", ["float32"], [1, 2])
    assert "unstructured" in {row.kind for row in found.results}
    assert "2:4" in {one.kind for one in found.missing}
    assert len(found.verdicts) == len(SPARSE)
    assert found.notes[0] == entry_bench.COVERAGE


def test_a_busy_machine_is_noticed(hollow_folder, monkeypatch):
    for high, noticed in ((1.1, False), (1.5, True)):
        monkeypatch.setattr(timing, "measure", lambda *_, high=high, **__: ([result(high=high)], []))
        assert (entry_bench.RESTLESS in bench(hollow_folder, device="cpu").notes) is noticed


def test_the_command_line(hollow_folder, capsys, monkeypatch):
    few = ["--sparsity", "0.9", "--batch", "2", "--dtype", "float32", "--device", "cpu"]
    monkeypatch.setattr(entry_bench, "bench", lambda model, **settings: bench(model, seconds=0, **settings))
    code, printed, errors = run(capsys, monkeypatch, "bench", hollow_folder, *few, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(printed)
    assert {row["batch"] for row in found["results"]} == {2}
    code, printed, _ = run(capsys, monkeypatch, "bench", hollow_folder, *few)
    assert code == 0
    assert "unstructured (CSR): in float32 at batch 2 " in printed.replace("\n", " ")


def test_the_command_line_has_the_defaults_of_the_library():
    defaults = {name: parameter.default for name, parameter in inspect.signature(bench).parameters.items()}
    for name, field in Measurement.model_fields.items():
        assert defaults[name] == field.default


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "1,x"], "--batch = 'x': Input should be a valid integer"),
        (["--batch", ""], "batch is empty; leave it out"),
        (["--batch", "0"], "batch 0 is impossible"),
        (["--sparsity", "50%"], "--sparsity = '50%': Input should be a valid number"),
        (["--sparsity", "0.5,1"], "sparsity 1.0 is not between 0 and 1"),
        (["--sparsity", "nan"], "sparsity nan is not between 0 and 1"),
        (["--dtype", "int4"], "dtype 'int4' is unknown; use some of float32, bfloat16, float16"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--device", "meta"], "device 'meta' is not supported"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_make_no_sense_are_one_line(hollow_folder, capsys, monkeypatch, flags, message):
    code, printed, errors = run(capsys, monkeypatch, "bench", hollow_folder, *flags)
    assert (code, printed) == (2, "")
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_models_that_are_not_there():
    with pytest.raises(InputError, match="nowhere"):
        bench("nowhere/at/all", device="cpu")
    with pytest.raises(InputError, match="sparsities is empty"):
        bench("nowhere/at/all", sparsities=[])
