"""Models that somebody else has loaded and placed: what they have of their own is given back, or they are refused."""

import accelerate.hooks
import pytest
import torch

import uniprune
from conftest import tiny_model
from small_models import tiny
from uniprune import Loaded, Recipe
from uniprune.errors import InputError
from uniprune.models.blocks import rerouted

SMALL = {"sparsity": "2:4", "windows": 4, "length": 32}
WAYS = [
    ("qwen3_moe", {"controller": "none"}),
    ("qwen3_moe", {"steps": 1}),
    ("llama", {"sequential": True}),
    ("llama", {"controller": "unipruning", "steps": 1}),
]


@pytest.mark.parametrize(("family", "settings"), WAYS)
def test_hooks_of_accelerate_survive(tokenizer, family, settings):
    """Experts, too, are taken apart whoever has replaced their forward before."""
    models = [tiny(family, vocab_size=512) for _ in range(2)]
    hooked = models[1]
    for module in hooked.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))
    before = {name: vars(module)["forward"] for name, module in hooked.named_modules()}
    expected, found = (uniprune.prune_in_place(Loaded(model, tokenizer), Recipe(**SMALL, **settings)) for model in models)
    assert {name: vars(module)["forward"] for name, module in hooked.named_modules()} == before
    assert found.controller == expected.controller
    plain = dict(models[0].named_parameters())
    assert all(torch.equal(parameter, plain[name]) for name, parameter in hooked.named_parameters())


def test_forwards_come_back_in_the_order_they_went():
    """Also where one module is rerouted twice, and where an error ends it."""
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), rerouted([layer, layer], lambda index, forward: lambda x: forward(x) + index + 1):
        assert torch.equal(layer(torch.zeros(2)), layer.bias + 3)
        raise ZeroDivisionError
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(("elsewhere", "devices"), [(["lm_head"], "cpu, meta"), (["lm_head", "model"], "meta")])
def test_a_model_on_several_devices_or_none_is_refused(tokenizer, elsewhere, devices):
    model = tiny_model(tie_word_embeddings=False)
    for part in elsewhere:
        model.get_submodule(part).to("meta")
    with pytest.raises(InputError, match=f"parameters lie on {devices}; load it onto one device"):
        uniprune.prune_in_place(Loaded(model, tokenizer), Recipe(**SMALL))
    with pytest.raises(InputError, match=f"parameters lie on {devices}; load it onto one device"):
        uniprune.evaluate(Loaded(model, tokenizer), windows=2, length=32)
