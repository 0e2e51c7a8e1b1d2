"""Layers are told by what they compute, not by their class: subclasses of Linear and Conv1D, run here by hand."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import uniprune
from conftest import tiny_model
from uniprune import Recipe
from uniprune.errors import InputError
from uniprune.models.linear import Probe
from uniprune.models.matrices import choose_matrices, find_matrices, left_dense


class Same(nn.Linear):
    """Falcon's: another way to write the same product."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


class Buffered(nn.Linear):
    """A factor that is 1 until somebody sets it."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.factor


class Rounded(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.mul(7).round().div(7), self.bias)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-10, 10))


class WithLoRA(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Linear(sizes[0], 2, bias=False), nn.Linear(2, sizes[1], bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Grouped(nn.Linear):
    """DeepSeek-V4's: each group of inputs has rows of its own."""

    def __init__(self, columns, rows, groups):
        super().__init__(columns // groups, rows, bias=False)
        self.groups = groups

    def forward(self, x):
        weight = self.weight.view(self.groups, -1, self.weight.shape[1])
        return torch.einsum("...gi,goi->...go", x.unflatten(-1, (self.groups, -1)), weight).flatten(-2)


class WithRouting(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.topk(2)


class Doubled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


PLAIN = [nn.Linear(8, 6), nn.Linear(8, 6, bias=False), Conv1D(6, 8), Same(8, 6), Same(8, 6, bias=False)]
OTHERS = [Scaled(8, 6), Buffered(8, 6), Rounded(8, 6), Clamped(8, 6), WithLoRA(8, 6), Grouped(8, 6, 2), WithRouting(8, 6)]
OTHERS += [Doubled(6, 8), nn.Embedding(8, 6), nn.Conv1d(8, 6, 1)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_is_plain_if_it_multiplies_as_one_wherever_its_weights_are(device):
    probe = Probe()
    for _ in range(2):  # the second time from memory
        assert all(probe(layer.to(device)) for layer in PLAIN)
        assert not any(probe(layer.to(device)) for layer in OTHERS)


def test_layers_of_one_class_with_other_settings_are_run_again():
    class Factor(nn.Linear):
        def __init__(self, factor):
            super().__init__(8, 8)
            self.factor = factor

        def forward(self, x):
            return super().forward(x) * self.factor

    probe = Probe()
    assert [probe(Factor(factor)) for factor in (1.0, 2.0, 1.0)] == [True, False, True]


def test_a_probe_leaves_a_layer_as_it_is():
    layer, count = Buffered(8, 6), []
    layer.register_forward_pre_hook(lambda *_: count.append(1))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    Probe()(layer)
    assert not count
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def with_layer(name, layer):
    model = tiny_model()
    for block in model.model.layers:
        owner, _, leaf = name.rpartition(".")
        made = layer()
        made.weight.data.copy_(block.get_submodule(name).weight)
        setattr(block.get_submodule(owner), leaf, made.requires_grad_(False))
    return model


def test_a_small_layer_that_does_not_multiply_plainly_stays_dense():
    model = with_layer("self_attn.k_proj", lambda: Scaled(32, 16, bias=False))
    assert len(find_matrices(model)) == 18
    assert set(left_dense(model).values()) == {((16, 32), "Scaled does not compute x @ W.T + b")}
    assert left_dense(model).keys() == {f"model.layers.{i}.self_attn.k_proj" for i in range(3)}


def test_a_model_that_is_largely_made_of_such_layers_is_refused():
    with pytest.raises(InputError, match=r"under 90%.*mlp\.up_proj\.weight \(64, 32\) \(Scaled does not compute x @ W\.T"):
        choose_matrices(with_layer("mlp.up_proj", lambda: Scaled(32, 64, bias=False)))


def test_a_weight_that_such_a_layer_shares_with_a_plain_one_stays_dense():
    for order in (0, 1):
        model = tiny_model()
        layers = [model.model.layers[0].self_attn, model.model.layers[1].self_attn]
        layers[order].k_proj = Scaled(32, 16, bias=False)
        layers[order].k_proj.weight = layers[1 - order].k_proj.weight
        assert "model.layers.0.self_attn.k_proj" not in find_matrices(model)
        assert "model.layers.0.self_attn.k_proj" in left_dense(model)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_student_is_the_pruned_model_whatever_its_layers_compute(loaded, sparsity):
    """With nothing pruned the student is the teacher."""
    model = with_layer("self_attn.k_proj", lambda: Scaled(32, 16, bias=False))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    recipe = Recipe(sparsity=sparsity, steps=1, text="builtin", windows=8, length=32)
    report = uniprune.prune_in_place(uniprune.Loaded(model, loaded.tokenizer), recipe)
    assert (abs(report.controller.best_held_out_loss) < 1e-7) == (sparsity == 0)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == ({f"{name}.weight" for name in find_matrices(model)} if sparsity else set())
