"""Hardware profiles: what does not fit is named, and treated as the caller says."""

import pytest
import torch

from uniprune.errors import InputError
from uniprune.sparsity.hardware import PROFILES, check_prunes, fitted, parse
from uniprune.sparsity.patterns.mixed import Mixed
from uniprune.sparsity.patterns.nm import DENSE, NM
from uniprune.sparsity.patterns.ruled import Rule, Ruled, reach
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured

SHAPES = {"layers.0.q": (64, 128), "layers.0.k": (16, 128), "layers.0.down": (64, 96)}
NVIDIA = "nvidia-semi-structured"


def test_everything_fits_the_profile_of_no_hardware():
    assert fitted(NM(2, 4), SHAPES, "float32") == (NM(2, 4), {})


def test_shapes_that_kernels_do_not_take_are_named():
    with pytest.raises(InputError, match=r"2 of 3 matrices cannot be 2:4 on nvidia.*layers\.0\.k: 16 x 128 .* 32 x 64"):
        fitted(NM(2, 4), SHAPES, "bfloat16", NVIDIA)


@pytest.mark.parametrize(("unsupported", "part"), [("dense", DENSE), ("unstructured", Unstructured(0.5, "matrix"))])
def test_unsupported_layers_get_what_was_said_and_are_reported(unsupported, part):
    pattern, reasons = fitted(NM(2, 4), SHAPES, "float16", NVIDIA, unsupported)
    assert list(reasons) == ["layers.0.k", "layers.0.down"]
    assert [pattern.pattern_of(name) for name in SHAPES] == [NM(2, 4), part, part]
    masks = dict(pattern({name: torch.rand(shape) for name, shape in SHAPES.items()}))
    assert bool((masks["layers.0.q"].reshape(-1, 4).sum(1) == 2).all())


def test_a_model_that_would_stay_dense_as_a_whole_is_refused():
    shapes = {name: shape for name, shape in SHAPES.items() if name != "layers.0.q"}
    with pytest.raises(InputError, match=r"nothing would be pruned: all .* dense, e\.g\. layers\.0\.k: 16 x 128"):
        check_prunes(*fitted(NM(2, 4), shapes, "float16", NVIDIA, "dense"), shapes)
    check_prunes(*fitted(NM(2, 4), shapes, "float16", NVIDIA, "unstructured"), shapes)
    check_prunes(*fitted(NM(2, 4), SHAPES, "float16", NVIDIA, "dense"), SHAPES)


def test_n_m_that_does_not_divide_is_a_misfit_on_any_hardware():
    shapes = {"a": (4, 8), "b": (4, 6)}
    with pytest.raises(InputError, match=r"b: 6 inputs are not divisible by 4; leave them out .*--unsupported, --rule"):
        fitted(NM(2, 4), shapes, "float32")
    pattern, reasons = fitted(NM(2, 4), shapes, "float32", unsupported="dense")
    assert list(reasons) == ["b"]
    assert bool(dict(pattern({name: torch.rand(shape) for name, shape in shapes.items()}))["b"].all())


@pytest.mark.parametrize(
    ("pattern", "dtype", "hardware", "complaint"),
    [
        (NM(2, 4), "float32", NVIDIA, "type float32; the kernels take float16"),
        (NM(4, 8), "float16", NVIDIA, "4:8 is not 2:4"),
        (Unstructured(0.5, "model"), "float16", NVIDIA, "0.5 by model is not 2:4"),
        (Mixed(0.3, (NM(1, 4), DENSE)), "float16", NVIDIA, "1:4 is not 2:4"),
        (Unstructured(0.9), "float32", "block", "not 1x16 tiles or 16x1 tiles"),
        (Tiled(Unstructured(0.9), 8, 8), "float32", "block", "8x8 tiles is not"),
        (NM(2, 4), "float32", "tpu", "hardware 'tpu' is unknown"),
    ],
)
def test_patterns_and_types_that_kernels_do_not_take_are_refused(pattern, dtype, hardware, complaint):
    with pytest.raises(InputError, match=complaint):
        fitted(pattern, SHAPES, dtype, hardware)


def test_types_may_differ_by_matrix_and_are_asked_for_only_where_they_count():
    shapes = dict.fromkeys(("attention", "expert"), (64, 128))
    kinds = {"attention": "bfloat16", "expert": "F4_E2M1"}
    pattern, reasons = fitted(NM(2, 4), shapes, kinds.__getitem__, NVIDIA, "dense")
    assert reasons == {"expert": "weights of type F4_E2M1; the kernels take float16, bfloat16, int8"}
    assert [pattern.pattern_of(name) for name in shapes] == [NM(2, 4), DENSE]
    assert fitted(NM(2, 4), shapes, {}.__getitem__) == (NM(2, 4), {})


def test_rules_come_after_misfits_and_stay():
    pattern, reasons = fitted(Ruled(NM(2, 4), (Rule("down", "dense"),)), SHAPES, "bfloat16", NVIDIA, "dense")
    assert list(reasons) == ["layers.0.k"]
    assert [pattern.pattern_of(name) for name in SHAPES] == [NM(2, 4), DENSE, DENSE]


def test_a_misfit_that_is_to_be_unstructured_keeps_the_sparsity_of_its_rule():
    """It has no kernel there, so it is pruned without one: by as much as it was to lose."""
    rules = Rule("q", "0.3"), Rule("down", "1:5")
    pattern, reasons = fitted(Ruled(NM(2, 4), rules), SHAPES, "bfloat16", NVIDIA, "unstructured")
    assert list(reasons) == [*SHAPES]
    assert [pattern.pattern_of(name) for name in SHAPES] == [Unstructured(sparsity, "matrix") for sparsity in (0.3, 0.5, 0.8)]


def test_a_rule_that_only_misfits_obeyed_goes():
    rules = Rule("q", "dense"), Rule("q|k", "2:4")
    pattern, reasons = fitted(Ruled(NM(2, 4), rules), SHAPES, "bfloat16", NVIDIA, "dense")
    assert list(reasons) == ["layers.0.k", "layers.0.down"]
    assert all(pattern.pattern_of(name) == DENSE for name in SHAPES)


def test_mixed_patterns_and_tiles_fit_where_their_parts_do():
    shapes = {"a": (64, 128), "b": (32, 64)}
    assert fitted(Mixed(0.3, (NM(2, 4), DENSE)), shapes, "float16", NVIDIA)[1] == {}
    assert fitted(Tiled(Unstructured(0.9, "model"), 16, 16), shapes, "float32", "block")[1] == {}


def test_profiles_are_data():
    assert all(parse(name) is profile for name, profile in PROFILES.items())


def test_experts_that_cannot_have_it_share_a_rule():
    """A model can have 40,000 of them, and each rule is looked for in each name."""
    experts = {f"layers.{i}.experts.{j}.{part}_proj": (8, 6) for i in range(4) for j in range(16) for part in ("up1", "up2")}
    shapes = experts | {f"layers.{i}.q_proj": (8, 8) for i in range(4)}
    pattern, reasons = fitted(NM(2, 4), shapes, "float32", unsupported="dense")
    assert reasons.keys() == experts.keys()
    assert [rule.match for rule in pattern.rules] == [rf"^layers\.\d+\.experts\.\d+\.up{n}_proj$" for n in (1, 2)]
    shapes["layers.0.experts.5.up1_proj"] = (8, 8)  # now some of a kind can have it
    pattern, reasons = fitted(NM(2, 4), shapes, "float32", unsupported="dense")
    assert len(pattern.rules) == 63 + 1
    assert (
        {name for name in shapes if str(pattern.pattern_of(name)) == str(DENSE)}
        == reasons.keys()
        == shapes.keys() - fitting(shapes)
    )


def fitting(shapes):
    return {name for name, shape in shapes.items() if shape == (8, 8)}


def test_choices_that_shapes_keep_from_the_sparsity_are_refused():
    """A matrix of 126 inputs cannot be 2:4: it stays dense, and the others cannot lose more than half."""
    shapes = {"q": (60, 60), "down": (60, 126)}
    with pytest.raises(
        InputError, match=r"sparsity 0\.45 is out of reach: with these shapes it is between 0\.0000 and 0\.1613"
    ):
        fitted(Mixed(0.45, (NM(2, 4), DENSE)), shapes, "float32")
    assert reach(Mixed(0.1, (NM(2, 4), DENSE)), shapes) == (0.0, pytest.approx(0.1613, abs=1e-4))
    with pytest.raises(InputError, match=r"between 0\.\d+ and 0\.5"):  # 60 inputs are no groups of eight
        fitted(Mixed(0.375, (NM(5, 8), NM(2, 4))), {"q": (60, 60), "down": (60, 128)}, "float32")
