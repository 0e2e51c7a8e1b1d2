"""Numbers at the edges: half precision, overflow, denormals, nothing at all, singular matrices, sums in another order."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import uniprune
from conftest import VOCABULARY, tiny_model
from small_models import tiny
from uniprune import Loaded, Recipe
from uniprune.artefacts.reports import Gain
from uniprune.comparison.sparsegpt import inverse_factor, sparsegpt
from uniprune.entrypoints.permute import permute
from uniprune.errors import InputError, UniPruneError
from uniprune.models import blocks
from uniprune.models.matrices import find_matrices
from uniprune.saliency import calibration
from uniprune.saliency.metrics import METRICS, Wanda
from uniprune.saliency.refine import errors, refine
from uniprune.saliency.statistics import Gram, SquaredNorm
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.threshold import thresholds
from uniprune.sparsity.views import ScaledToMeanOne

CPU = torch.device("cpu")
SMALL = {"windows": 4, "length": 32}
TINY = 1.4e-45  # the smallest float32, a denormal


def observed(x, kind=SquaredNorm, parts=1):
    statistic = kind(x.shape[1], CPU)
    for part in torch.tensor_split(x, parts):
        statistic.update(part)
    return statistic


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [SquaredNorm, Gram])
def test_large_activations_do_not_overflow(dtype, kind):
    """1e4 squared is beyond float16, and its sum over 50,000 tokens loses its end in bfloat16."""
    x = torch.full((50_000, 3), 1e4).to(dtype)
    precision = 1e-3 if kind is Gram else 1e-6  # its sums are float32
    assert torch.allclose(observed(x, kind, parts=25).rms, x[0].float(), rtol=precision)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-10, 1e10, 1e30, 1e38])
def test_squares_neither_overflow_nor_vanish(scale):
    x = torch.rand(100, 5, generator=torch.Generator().manual_seed(0)) * scale
    assert torch.allclose(observed(x).rms.double(), x.double().square().mean(0).sqrt(), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_are_the_same_in_whatever_parts_they_come(dtype):
    x = (torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)).to(dtype)
    whole = observed(x)
    for parts in (2, 7, 300):
        assert torch.equal(observed(x, parts=parts).rms, whole.rms)
    reverse = observed(x.flip(0), parts=5)
    reverse.merge(observed(x[:0]))
    assert torch.equal(reverse.rms, whole.rms)


def test_masks_are_the_same_in_whatever_batches_windows_come(tokenizer, monkeypatch):
    def masks(tokens):
        monkeypatch.setattr("uniprune.saliency.calibration.batches", lambda windows: blocks.batches(windows, tokens))
        model = tiny_model()
        matrices = find_matrices(model)
        windows = torch.arange(8 * 32).view(8, 32) % 512
        return dict(NM(2, 4)(calibration.one_shot(calibration.Calibration(model, matrices, windows), Wanda())))

    once, again, other = masks(64), masks(64), masks(10**6)
    for name, mask in once.items():
        assert torch.equal(mask, again[name])
        assert (mask == other[name]).float().mean() > 0.999  # matrix products of other sizes round otherwise


def broken(dtype, block):
    """A model whose hidden states leave float16 in one block."""
    model = tiny_model()
    model.model.layers[block].mlp.up_proj.weight.mul_(1e5)
    model.model.layers[block].mlp.gate_proj.weight.mul_(1e5)
    return model.to(dtype)


@pytest.mark.parametrize(
    "settings", [{"controller": "none"}, {"controller": "feedback"}, {"sequential": True}, {"refine": True}]
)
def test_an_overflow_is_named_by_matrix_and_block(tokenizer, settings):
    with pytest.raises(UniPruneError, match=r"(model\.layers\.1\.\S+: its inputs overflowed|block 1 puts out NaN).*--dtype"):
        uniprune.prune_in_place(Loaded(broken(torch.float16, 1), tokenizer), Recipe(sparsity="2:4", **SMALL, **settings))


def overflowing_experts():
    model = tiny("mixtral", vocab_size=VOCABULARY)
    model.model.layers[0].mlp.experts.gate_up_proj.mul_(1e5)
    return model.to(torch.float16)


def not_a_number(name):
    """A model of which one weight beside the matrices is NaN."""
    model = tiny_model(tie_word_embeddings=False)
    model.get_parameter(name).view(-1)[0] = math.nan
    return model


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (overflowing_experts, {"controller": "none"}, r"experts puts out NaN or infinity.*--dtype"),
        (overflowing_experts, {}, r"experts puts out NaN or infinity.*--dtype"),
        (partial(not_a_number, "lm_head.weight"), {}, r"the output head of LlamaForCausalLM puts out NaN"),
        (partial(not_a_number, "model.norm.weight"), {"sequential": True}, r"LlamaForCausalLM puts out NaN or infinity"),
    ],
)
def test_what_is_not_finite_is_an_error_of_one_line(tokenizer, make, settings, said):
    with pytest.raises(InputError, match=said):
        uniprune.prune_in_place(Loaded(make(), tokenizer), Recipe(sparsity="2:4", **SMALL, **settings))


def test_weights_that_are_too_large_for_float16_are_not_called_broken(tokenizer, tmp_path):
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"infinity in float16; give --dtype bfloat16 or float32"):
        uniprune.prune(
            tmp_path / "model", Recipe(sparsity="2:4", controller="none", dtype="float16", **SMALL), tmp_path / "out"
        )


def test_an_overflow_in_evaluation_is_no_perplexity(tokenizer):
    with pytest.raises(InputError, match=r"not finite.*--dtype"):
        uniprune.evaluate(Loaded(broken(torch.float16, 1), tokenizer), windows=2, length=32)


# ------------------------------------------------------------------------------------------------------ nothing at all


def silent():
    """A model with a matrix, o_proj of block 1, whose inputs are all zero, one whose weights are, and a constant one."""
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.weight.zero_()
    model.model.layers[2].mlp.gate_proj.weight.fill_(0.25)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        *({"sparsity": "2:4", "metric": metric, "controller": "none"} for metric in METRICS),
        *({"sparsity": "0.5", "scope": scope, "controller": "none"} for scope in ("row", "matrix", "block", "model")),
        {"sparsity": "0.5"},
        {"sparsity": "2:4", "controller": "unipruning", "steps": 2},
        {"sparsity": "2:4", "sequential": True},
        {"sparsity": "2:4", "refine": True},
        {"sparsity": "0.5", "scope": "row", "refine": True},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_inputs_that_are_all_zero(tokenizer, settings):
    """All their weights matter as little: they tie, and of ties the lower index stays. Budgets hold all the same."""
    model = silent()
    report = uniprune.prune_in_place(Loaded(model, tokenizer), Recipe(**SMALL, **settings))
    assert report.sparsity == pytest.approx(0.5, abs=1e-6)
    kept = model.model.layers[1].self_attn.o_proj.weight != 0
    if (
        settings.get("metric") == "magnitude"
        or settings.get("scope", "row") != "row"
        or settings.get("controller") == "unipruning"
    ):
        return  # other rules
    if settings["sparsity"] == "2:4":
        assert torch.equal(kept, torch.tensor([True, True, False, False]).repeat(32, 8))
    elif "scope" in settings:
        assert torch.equal(kept, torch.tensor([True, False]).repeat_interleave(16).repeat(32, 1))


def test_channels_without_inputs_are_permuted_like_any(tokenizer, tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.zero_()  # so that down_proj has no inputs
    report = permute(Loaded(model, tokenizer), Recipe(sparsity="2:4", **SMALL), tmp_path / "out")
    assert report.permuted["model.layers.1.mlp.down_proj"] == Gain(kept_before=1.0, kept_after=1.0)


def test_a_matrix_without_scores_does_not_upset_the_others():
    scores = {"a": torch.zeros(4, 8), "b": torch.rand(4, 8) * 1e38, "c": torch.full((4, 8), TINY)}
    scaled = dict(ScaledToMeanOne(scores))
    assert float(scaled["b"].mean()) == pytest.approx(1, rel=1e-5)
    assert float(scaled["c"].mean()) == 1
    assert not scaled["a"].any()
    masks = dict(Unstructured(0.5, "model")(ScaledToMeanOne(scores)))
    assert sum(int(mask.sum()) for mask in masks.values()) == 48
    assert not masks["a"].any()


# ------------------------------------------------------------------------------------------------------------ denormals


def test_denormals_are_numbers_of_their_own():
    """They are neither zero nor each other, however a mask is cut."""
    scores = torch.tensor([[0.0, -0.0, TINY, 2 * TINY, 1e-40, 1.2e-38, 1.0, 3 * TINY]])
    order = [6, 5, 4, 7, 3, 2, 0, 1]
    for keep in range(1, 9):
        expected = torch.zeros(1, 8, dtype=torch.bool)
        expected[0, order[:keep]] = True
        sparsity = 1 - keep / 8
        assert torch.equal(dict(Unstructured(sparsity, "row")({"a": scores}))["a"], expected)
        assert torch.equal(thresholds({"a": scores}, keep)["a"].mask(scores), expected)
    assert torch.equal(dict(NM(4, 8)({"a": scores}))["a"], torch.isin(torch.arange(8), torch.tensor(order[:4]))[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_denormal_weights_keep_their_bits(tokenizer, tmp_path, dtype):
    model = tiny_model().to(dtype)
    tiny = torch.finfo(dtype).tiny / 4
    matrices = find_matrices(model)
    for matrix in matrices.values():
        matrix.weight[:, ::2], matrix.weight[:, 1::2] = 0.125, tiny
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = Recipe(sparsity="3:4", metric="magnitude", controller="none", **SMALL)
    uniprune.prune(str(tmp_path / "model"), recipe, tmp_path / "out")
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    for name, matrix in matrices.items():
        kept = pruned[f"{name}.weight"] != 0
        assert torch.equal(pruned[f"{name}.weight"][kept], matrix.weight[kept])
        assert int(kept[:, 1::2].sum()) == matrix.size // 4


# ---------------------------------------------------------------------------------------------------- singular matrices

GRAMS = {
    "zero": torch.zeros(16, 16),
    "one direction": torch.ones(16, 16) * 1e8,
    "equal columns": torch.block_diag(*[torch.ones(2, 2)] * 8),
    "dead columns": torch.diag(torch.tensor([1.0, 0.0] * 8)),
    "far apart": torch.diag(torch.logspace(-18, 18, 16)),
}


@pytest.mark.parametrize("name", GRAMS)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row")], ids=str)
def test_refinement_of_singular_matrices_never_does_harm(name, pattern):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.5
    mask = dict(pattern({"a": weight.abs()}))["a"]
    better = refine(weight, mask, GRAMS[name], pattern)
    assert torch.equal(better.sum(1), mask.sum(1))
    after = errors(weight, better, GRAMS[name])
    assert bool(torch.isfinite(after).all())
    assert bool((after <= errors(weight, mask, GRAMS[name])).all())
    if name == "zero":
        assert torch.equal(better, mask)


@pytest.mark.parametrize("name", [name for name in GRAMS if name != "zero"])
def test_damping_makes_singular_hessians_regular(name):
    factor = inverse_factor("a", GRAMS[name], 0.01)
    hessian = GRAMS[name].double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    damped[hessian.diagonal() == 0, hessian.diagonal() == 0] = 1
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(16, dtype=torch.float64), atol=1e-6)


def test_undamped_singular_hessians_are_refused_by_name():
    with pytest.raises(UniPruneError, match=r"blocks\.7: its Hessian is not positive definite at damp = 0"):
        inverse_factor("blocks.7", GRAMS["one direction"], 0.0)
    with pytest.raises(UniPruneError, match=r"blocks\.7 saw no calibration token"):
        inverse_factor("blocks.7", GRAMS["zero"], 0.01)


def test_the_baseline_names_a_matrix_without_inputs():
    model = silent()
    with pytest.raises(UniPruneError, match=r"model\.layers\.1\.self_attn\.o_proj saw no calibration token"):
        sparsegpt(model, find_matrices(model), torch.arange(64).view(2, 32), NM(2, 4))
