"""Whether a pruned model will be faster here, in one sentence."""

import pytest
import torch

import uniprune
from made_up import timed
from small_models import tiny
from uniprune import Loaded, Recipe
from uniprune.artefacts.reports import PrunedMatrix, Realised
from uniprune.speed.outlook import outlook, verdict
from uniprune.speed.timing import Missing

OURS = {"kind": "any mask", "kernel": "uniprune.accelerate", "dtype": "bfloat16"}
SMALL = {"windows": 8, "length": 32}


def rows(token, prompt, sparsity=0.5):
    return [timed(**OURS, batch=batch, speedup=x, sparsity=sparsity) for batch, x in ((1, token), (64, prompt))]


def test_faster():
    assert verdict(rows(1.84, 0.72), [], 0.5, "bfloat16") == (
        "uniprune.accelerate multiplies its matrices 1.8 times as fast as dense bfloat16 ones for each new token, 0.7 times "
        "for a prompt; loaded in any other way it has the dense model's speed."
    )


def test_faster_than_its_own_type_but_not_than_another():
    dense = timed(kind="dense", kernel="dense", dtype="float32", batch=1, speedup=2.1)
    assert "for a prompt (dense float32: 2.1); loaded" in verdict([*rows(1.8, 0.7), dense], [], 0.5, "bfloat16")


def test_no_faster_but_sparser_ones_are():
    found = [*rows(0.9, 0.7), *rows(1.0, 0.7, 0.7), *rows(2.0, 0.7, 0.9)]
    sentence = verdict(found, [], 0.5, "bfloat16")
    assert sentence.startswith("it is no faster than the dense model: uniprune.accelerate multiplies its matrices 0.9 times")
    assert sentence.endswith("; at 90% sparsity it would be 2.0.")


def test_a_gain_within_the_margin_is_none():
    assert verdict(rows(1.04, 1.0), [], 0.5, "bfloat16").startswith("it is no faster")


def test_no_kernel_has_its_reason():
    missing = [Missing(kind="any mask", kernel="uniprune.accelerate", dtype="float16", reason="it needs a compiler.")]
    assert verdict([], missing, 0.5, "float16") == (
        "it is no faster than the dense model: no kernel takes its masks in float16 (it needs a compiler)."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shape_that_most_weights_have_is_timed(dtype):
    matrices = {f"{n}": PrunedMatrix(shape=(64, 32), sparsity=0.5) for n in range(3)}
    matrices["lone"] = PrunedMatrix(shape=(96, 48), sparsity=0.5)
    found = outlook(Realised(pattern="2:4", sparsity=0.5, matrices=matrices), dtype, torch.device("cpu"))
    threads = torch.get_num_threads()
    assert found.startswith(f"On a CPU with {threads} thread{'s' if threads > 1 else ''} ")
    assert "uniprune.accelerate multiplies its matrices" in found


def test_prune_and_apply_say_it(folder, tmp_path):
    pruned = uniprune.prune(str(folder), Recipe(sparsity="2:4", **SMALL), tmp_path / "out")
    applied = uniprune.apply(str(folder), tmp_path / "out" / "pruning" / "masks.safetensors", tmp_path / "applied")
    for report in (pruned, applied):
        assert "in any other way" in report.speed or "no faster" in report.speed
        assert "bfloat16" in report.speed  # as it is stored, whatever a CPU computes in


def test_nothing_removed_nothing_said(folder, tmp_path):
    assert uniprune.prune(str(folder), Recipe(sparsity="0", **SMALL), tmp_path / "out").speed is None


@pytest.mark.parametrize(("include", "said"), [(("experts",), "all that was pruned is in them."), ((), " of what was pruned.")])
def test_fused_experts_are_not_promised_a_speed_that_they_do_not_have(tokenizer, tmp_path, include, said):
    recipe = Recipe(sparsity=0.5, metric="magnitude", controller="none", include=include, **SMALL)
    report = uniprune.prune(Loaded(tiny("mixtral", vocab_size=512), tokenizer), recipe, tmp_path / "out")
    assert "Fused experts run dense, also with uniprune.accelerate" in report.speed
    assert report.speed.endswith(said)
    assert ("multiplies its matrices" in report.speed) == (not include)
    assert any(
        "fused experts, which uniprune.accelerate leaves dense" in note
        for note in uniprune.bench(
            tmp_path / "out", dtypes=["float32"], batches=[1], sparsities=[0.5], device="cpu", seconds=0
        ).notes
    )
