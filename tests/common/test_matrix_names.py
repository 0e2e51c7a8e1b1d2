"""Names of matrices, in both spellings of experts."""

import re

import pytest

from uniprune.common.matrix_names import block_of, expression_for, kind_of, split_at_block


@pytest.mark.parametrize(
    ("name", "parts", "block", "kind"),
    [
        ("h.0.c_fc", ("h.0", "c_fc"), "0", "h.*.c_fc"),
        ("model.layers.12.mlp.up_proj", ("model.layers.12", "mlp.up_proj"), "12", "model.layers.*.mlp.up_proj"),
        ("layers.7.experts.3.up_proj", ("layers.7", "experts.3.up_proj"), "7", "layers.*.experts.*.up_proj"),
        ("layers.7.experts.up_proj.3", ("layers.7", "experts.up_proj.3"), "7", "layers.*.experts.up_proj.*"),
        ("layers.7.moe.1.experts.3.w1", ("layers.7", "moe.1.experts.3.w1"), "7", "layers.*.moe.*.experts.*.w1"),
        ("0.mlp.w2", ("0", "mlp.w2"), "0", "*.mlp.w2"),
        ("layers.7", ("layers.7", ""), "7", "layers.*"),
        ("conv1d.w2", ("", "conv1d.w2"), "", "conv1d.w2"),
    ],
)
def test_block_and_kind(name, parts, block, kind):
    assert (split_at_block(name), block_of(name), kind_of(name)) == (parts, block, kind)
    assert re.search(expression_for(name), name)


@pytest.mark.parametrize("experts", ["experts.{}.up_proj", "experts.up_proj.{}"])
def test_a_pattern_matches_its_kind_alone(experts):
    pattern = expression_for(f"layers.0.{experts.format(0)}")
    names = [f"layers.{block}.{experts.format(expert)}" for block in (0, 11) for expert in (0, 3, 27)]
    assert all(re.search(pattern, name) for name in names)
    others = [names[0].replace(*change) for change in (("up", "down"), (".", "_"), ("0", "x"), ("lay", "more.lay"))]
    assert not any(re.search(pattern, other) for other in [*others, names[0] + ".1"])
