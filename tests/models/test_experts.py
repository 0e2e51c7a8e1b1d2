"""Fused experts as matrices of their own, against their module's own forward and plain autograd."""

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

import catalogue
import uniprune
from conftest import Stopped, Stops
from families import tensors
from small_models import VOCABULARY, kind_of, tiny
from uniprune import Loaded, Recipe
from uniprune.checkpoints.checkpoint import Files, checkpoint_of
from uniprune.cli.tables import plan_lines
from uniprune.controller.descent.loss import Loss
from uniprune.controller.passes.resident import Resident
from uniprune.controller.start import sensitivities
from uniprune.controller.straight_through import StraightThrough
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import InputError, UniPruneError
from uniprune.models.experts import Slice, is_fused, unfused
from uniprune.models.matrices import find_blocks, find_matrices, left_dense
from uniprune.saliency.calibration import Calibration, LocalSaliency, one_shot
from uniprune.saliency.metrics import RIA, Wanda
from uniprune.saliency.observation import FEW, fill_starved_experts, observing, starved
from uniprune.saliency.statistics import Gram, SquaredNorm

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss")


def ids(count=4, length=32):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def loud(family):
    """A model whose experts matter: initial weights are so small that a wrong expert would hardly show."""
    model = tiny(family)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def fused_of(matrices):
    return {id(m.module.fused): m.module.fused for m in matrices.values() if hasattr(m.module, "fused")}.values()


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_the_model_computes_the_same(family):
    model = loud(family)
    matrices = find_matrices(model)
    expected = model(ids()).logits
    with unfused(matrix.module for matrix in matrices.values()):
        assert torch.allclose(model(ids()).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_sees_the_tokens_routed_to_it_and_no_others(family):
    model = loud(family)
    matrices = find_matrices(model)
    calls = {}
    for name, module in model.named_modules():
        if is_fused(module):
            module.register_forward_pre_hook(lambda m, args, name=name: calls.__setitem__(name, args))
    with observing(matrices, SquaredNorm) as statistics:
        model(ids())
    for fused in fused_of(matrices):
        hidden, chosen, _ = calls[fused.name]
        for name, one in fused.slices.items():
            if one.place.startswith("gate_up_proj"):
                routed = hidden[(chosen == one._expert).any(-1)]
                assert statistics[name].tokens == len(routed) > 0
                assert torch.allclose(statistics[name].rms, routed.square().mean(0).sqrt(), rtol=1e-4)
            else:
                assert statistics[name].tokens == int((chosen == one._expert).sum())
    assert sum(s.tokens for name, s in statistics.items() if matrices[name].module in fused._down[0]) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd(family):
    """Of the fused parameters, with the masks multiplied into them."""
    model = loud(family)
    matrices = find_matrices(model)
    generator = torch.Generator().manual_seed(2)
    masks = {name: torch.rand(matrix.shape, generator=generator) < 0.5 for name, matrix in matrices.items()}
    found = {}
    network = StraightThrough(matrices)
    passes = Resident(model, find_blocks(model)[1], network)
    with network, network.training(masks, found.__setitem__):
        student, teacher = passes.forward(ids())
        loss = Loss(passes.head(ids()))
        _, gradient = loss.gradient(student, teacher, ids())
        passes.backward(gradient)
    uniprune.models.masking.apply(matrices, masks.items())
    parameters = {id(p): p.requires_grad_() for fused in fused_of(matrices) for p in fused.module.parameters(recurse=False)}
    last = model.base_model(input_ids=ids(), use_cache=False).last_hidden_state
    assert torch.allclose(last, student, rtol=1e-3, atol=1e-4)
    torch.autograd.backward([last], [gradient])
    for fused in fused_of(matrices):
        for name, one in fused.slices.items():
            whole = parameters[id(fused.module._parameters[one._parameter])].grad[one._expert]
            expected = whole[:, one._rows].T if fused.transposed else whole[one._rows]
            assert float((found[name] - expected).norm() / expected.norm()) < 1e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_where_the_checkpoint_has_the_weights(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    files, stored = Files(tmp_path), tensors(tmp_path)
    for name, matrix in find_matrices(model).items():
        assert files.region(name).shape == tuple(matrix.parameter.shape)
        assert files.words(name).tobytes() == matrix.parameter.contiguous().numpy().tobytes()
        assert f"{name}.weight" in stored or name.rpartition(".")[2].isdigit()


def test_routers_are_left_dense_and_shown():
    model = tiny("qwen2_moe")
    assert left_dense(model) == {
        f"model.layers.{layer}.mlp.{name}": (shape, "a router")
        for layer in (0, 1)
        for name, shape in (("gate", (4, 32)), ("shared_expert_gate", (1, 32)))
    }
    assert not left_dense(model).keys() & find_matrices(model).keys()
    names = "".join(find_matrices(tiny("deepseek_v3")))
    assert "layers.0.mlp.gate_proj" in names  # a first layer without experts
    assert "layers.1.mlp.shared_experts.up_proj" in names


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("qwen2_moe", "Left dense: 2 x model.layers.*.mlp.shared_expert_gate, a router."),
        ("zamba2", "Shared by several modules, and pruned once: 10 matrices, e.g. model.layers.1.shared_transformer."),
    ],
)
def test_the_plan_says_what_is_left_and_what_is_shared(family, line, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    plan = uniprune.plan(tmp_path, Recipe(sparsity="2:4"))
    assert any(found.startswith(line) for found in plan_lines(plan))
    experts = [group for group in plan.groups if ".experts." in group.name]
    assert all(group.count == 8 for group in experts)  # those of both layers in one row


def test_what_no_conversion_touches_keeps_its_name():
    model = tiny("mixtral")
    layout = checkpoint_of(model).layout(model)
    assert layout.key("model.layers.0.self_attn.q_proj.weight") == "model.layers.0.self_attn.q_proj.weight"
    assert layout.key("model.layers.0.mlp.gate.weight") == "model.layers.0.block_sparse_moe.gate.weight"
    with pytest.raises(InputError, match="not stored as a tensor of its own"):
        layout.key("model.layers.0.mlp.experts.down_proj")


def test_experts_that_compute_something_else_are_refused():
    model = loud("mixtral")
    matrices = find_matrices(model)
    fused = next(iter(fused_of(matrices)))
    fused.module.act_fn = torch.nn.Identity()
    fused.module.__class__ = type("Odd", (type(fused.module),), {"forward": lambda self, x, index, weights: x + 1})
    with pytest.raises(UniPruneError, match="Odd computes something else"), observing(matrices, SquaredNorm):
        model(ids())
    assert "forward" not in vars(fused.module)


# ------------------------------------------------------------------------------------------------------- starved experts


def starving():
    """A model in whose first layer the last of four experts is chosen for no token."""
    model = loud("mixtral")
    router = model.model.layers[0].mlp.gate

    def forward(hidden):
        logits = functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        values, chosen = torch.topk(logits[:, :3].softmax(-1), 2, dim=-1)
        return logits, values, chosen

    router.forward = forward
    return model


@pytest.mark.parametrize("kind", ["step3p7", "longcat_flash"])
def test_experts_of_another_class_run_one_by_one_as_their_own_code_does(kind):
    """They take what transformers' conventional ones take; LongCat's router may also choose to pass a token on."""
    config = catalogue.small(kind)
    model = kind_of(config).from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.2, generator=generator)
    matrices = find_matrices(model)
    experts = {name: matrix for name, matrix in matrices.items() if isinstance(matrix.module, Slice)}
    fused = {id(matrix.module.fused): matrix.module.fused for matrix in experts.values()}
    assert len(experts) == sum(3 * one.experts for one in fused.values())
    tokens = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=tokens).logits
    with observing(experts, SquaredNorm) as seen:
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)
    assert sum(statistic.tokens for statistic in seen.values())


@pytest.mark.parametrize("metric", [Wanda(), RIA()])
def test_a_starved_expert_is_scored_by_magnitude_on_its_fellows_scale(metric):
    model = starving()
    matrices = find_matrices(model)
    scores = one_shot(Calibration(model, matrices, ids(16)), metric)
    record = scores.starved
    last = [f"model.layers.0.block_sparse_moe.experts.3.{name}" for name in ("w1", "w3", "w2")]
    assert sorted(record.matrices) == sorted(last)
    assert record.of == 24
    for name in last:
        score, size = scores[name], matrices[name].weight.abs()
        if isinstance(metric, Wanda):
            assert torch.equal(score.argsort(), size.argsort())
        fellows = [scores[name.replace("experts.3", f"experts.{n}")].mean() for n in range(3)]
        assert 0.5 * min(fellows) < score.mean() < 2 * max(fellows)


def test_a_starved_expert_starts_the_controller_as_its_fellows_do():
    model = starving()
    matrices = find_matrices(model)
    passes = Resident(model, find_blocks(model)[1], StraightThrough(matrices))
    with passes.network:
        inputs, gradients, *_ = sensitivities(passes, ids(), SquaredNorm)
    name = "model.layers.0.block_sparse_moe.experts.{}.w2"
    assert len(gradients[name.format(3)].unique()) == 1
    power = sum(float(gradients[name.format(n)].square().mean()) for n in range(3)) / 3
    assert float(gradients[name.format(3)][0]) == pytest.approx(power**0.5, rel=1e-4)
    assert float(inputs[name.format(3)].rms[0]) > 0


@pytest.mark.parametrize("kind", [SquaredNorm, Gram])
def test_the_stand_in_has_the_power_of_all_tokens_of_the_others(kind):
    few, some, many = (f"model.layers.0.block_sparse_moe.experts.{number}.w2" for number in range(3))
    found = find_matrices(tiny("mixtral"))
    matrices = {name: found[name] for name in (few, some, many)}
    statistics = {name: kind(64, torch.device("cpu")) for name in matrices}
    x = torch.randn(5 * FEW, 64, generator=torch.Generator().manual_seed(0))
    statistics[few].update(1e3 * x[: FEW - 1])
    statistics[some].update(x[:FEW])
    statistics[many].update(3 * x[FEW:])
    fill_starved_experts(matrices, statistics)
    expected = torch.cat([x[:FEW], 3 * x[FEW:]]).square().mean().sqrt()
    assert torch.allclose(statistics[few].rms, expected.expand(64), rtol=1e-4)
    assert statistics[some].tokens == FEW
    assert statistics[many].tokens == 4 * FEW


def test_with_no_token_for_any_expert_the_error_says_what_to_do():
    matrices = find_matrices(tiny("mixtral"))
    statistics = {name: SquaredNorm(matrix.shape[1], torch.device("cpu")) for name, matrix in matrices.items()}
    fill_starved_experts(matrices, statistics)
    assert all(statistic.tokens == 0 for statistic in statistics.values())
    assert starved({}, {}) is None


def test_a_run_on_too_little_text_says_so_once_and_in_its_report(tmp_path, caplog):
    tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    few = ids(2, 16)
    save_windows(Windows(few, "random", 2, "none"), tmp_path / "t.safetensors")
    text = str(tmp_path / "t.safetensors")
    report = uniprune.prune(tmp_path / "model", Recipe(sparsity="2:4", text=text, controller="none"), tmp_path / "out")
    assert report.starved.matrices
    assert report.starved.tokens_under == FEW
    said = f"{len(report.starved.matrices)} of {report.starved.of} experts' matrices saw under 32 calibration tokens"
    assert caplog.text.count("calibration tokens") == caplog.text.count(said) == 1
    for number, how in enumerate(({"sequential": True}, {"refine": True}, {"controller": "unipruning"})):
        recipe = Recipe(sparsity="2:4", text=text, **{"controller": "none"} | how)
        caplog.clear()
        other = uniprune.prune(tmp_path / "model", recipe, tmp_path / f"out{number}")
        found = (other.controller or other).starved
        assert found.of == report.starved.of
        assert caplog.text.count("calibration tokens") == 1
        assert set(found.matrices) & set(report.starved.matrices)  # later blocks see what pruned ones put out


def test_what_starved_before_an_interruption_is_in_the_report(tmp_path):
    tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    save_windows(Windows(ids(2, 16), "random", 2, "none"), tmp_path / "t.safetensors")
    recipe = Recipe(sparsity="2:4", text=str(tmp_path / "t.safetensors"), controller="none", sequential=True)
    whole = uniprune.prune(tmp_path / "model", recipe, tmp_path / "whole").starved
    assert {name.split(".")[2] for name in whole.matrices} == {"0", "1"}
    with pytest.raises(Stopped):
        uniprune.prune(tmp_path / "model", recipe, tmp_path / "out", progress=Stops(1))
    assert uniprune.prune(tmp_path / "model", recipe, tmp_path / "out", resume=True).starved == whole


# ----------------------------------------------------------------------------------------------------------- in memory


def test_a_model_in_memory_is_pruned_in_place(tmp_path):
    model = loud("qwen3_moe")
    save_windows(Windows(ids(9), "random", 9, "none"), tmp_path / "t.safetensors")
    uniprune.prune_in_place(
        Loaded(model, None), Recipe(sparsity="2:4", text=str(tmp_path / "t.safetensors"), controller="none")
    )
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            assert bool((weight.reshape(-1, 4).count_nonzero(-1) == 2).all())
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("model.layers.1.mlp.experts.3.up_proj.weight")
    assert torch.equal(weight, model.model.layers[1].mlp.experts.gate_up_proj[3, 16:])


def test_without_a_statistic_there_is_nothing_to_starve_for():
    matrices = find_matrices(tiny("mixtral"))
    assert LocalSaliency(matrices, Wanda(), {}).starved is None
