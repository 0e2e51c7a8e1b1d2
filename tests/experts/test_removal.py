"""Experts removed whole, against the model in which transformers' own router is kept from choosing them."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import catalogue
import processes
import quantised
import uniprune
from command import run
from conftest import Stopped, Stops
from small_models import VOCABULARY, config_of, kind_of, save, tiny
from uniprune import InputError, Recipe
from uniprune.artefacts.reports import ExpertRemoval, read_report
from uniprune.checkpoints.origin import resolve
from uniprune.data.windows import Windows, save_windows
from uniprune.reporting import model_card

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "qwen3_next", "qwen3_5_moe", "deepseek_v3"]
FUSED = ["mixtral, fused", "qwen3_moe, fused", "deepseek_v3, fused", "qwen3_5_moe, fused"]
GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}  # of four each, two of which stay


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    ids = torch.randint(0, VOCABULARY, (9, 32), generator=torch.Generator().manual_seed(1))
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_windows(Windows(ids, "random", 9, "none"), file)
    return file


def recipe(tokens, **settings):
    return Recipe(**{"experts": 0.5, "text": str(tokens), "metric": "reap"} | settings)


def saved(family, folder, **changes):
    """A checkpoint of a family, in several files. DeepSeek's has groups."""
    if "deepseek" in family:
        model = tiny(family, **GROUPS | changes)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)
        model.save_pretrained(folder, max_shard_size="40KB", save_original_format="fused" not in family)
    else:
        save(family, folder)
    return folder


@contextmanager
def unchosen(model, layers):
    """Inside ``with``, no router chooses an expert that is not kept: its logit is minus infinity."""
    owns = []
    for name, layer in layers.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        count = len(layer.tokens)
        router = next(m for m in parent.children() if len(getattr(m, "weight", ())) == count)
        removed = [number for number in range(count) if number not in layer.kept]
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias[removed] = -torch.inf
        owns.append((router, router.forward))
        router.forward = _masked(router.forward, removed)
    try:
        yield
    finally:
        for router, own in owns:
            router.forward = own


def _masked(own, removed):
    def forward(*args, **kwargs):
        linear = functional.linear

        def masked(x, weight, bias=None):
            logits = linear(x, weight, bias)
            logits[..., removed] = -torch.inf
            return logits

        functional.linear = masked
        try:
            return own(*args, **kwargs)
        finally:
            functional.linear = linear

    return forward


AROUND = ["ernie4_5_moe", "hunyuan_v1_moe", "lfm2_moe", "minimax_m2", "hy_v3"]


@pytest.mark.parametrize("family", AROUND)
def test_routers_that_have_a_part_in_the_module_around_them(family, tmp_path, tokens, monkeypatch):
    catalogue.saved(family, tmp_path)
    source, out = tmp_path / "model", tmp_path / "out"
    report = uniprune.prune(source, recipe(tokens), out)
    whole, small, linear, removed = loaded(source), loaded(out), functional.linear, {}
    for name, layer in report.layers.items():
        parent = whole.get_submodule(name.rpartition(".")[0])
        (router,) = (p for p in parent.parameters() if p.dim() == 2 and len(p) == report.experts.of)
        removed[id(router)] = [number for number in range(report.experts.of) if number not in layer.kept]

    def masked(x, weight, bias=None):
        logits = linear(x, weight, bias)
        logits[..., removed.get(id(weight), [])] = -torch.inf
        return logits

    ids = torch.randint(0, VOCABULARY, (3, 20))
    with torch.no_grad():
        found, dense = small(ids).logits, whole(ids).logits
        monkeypatch.setattr(functional, "linear", masked)
        expected = whole(ids).logits
    error, effect = (float((one - expected).abs().max()) for one in (found, dense))
    assert error < 1e-6 < 0.02 * effect


def loaded(folder):
    config = uniprune.load(folder, dtype="float32", device="cpu").model.config
    return kind_of(config).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES + FUSED)
def test_it_computes_what_the_model_does_without_those_experts(family, tmp_path, tokens):
    source, out = saved(family, tmp_path / "model"), tmp_path / "out"
    report = uniprune.prune(source, recipe(tokens), out)
    whole, small = loaded(source), loaded(out)
    ids = torch.randint(0, VOCABULARY, (3, 20))
    with torch.no_grad(), unchosen(whole, report.layers):
        expected = whole(ids).logits
    assert torch.allclose(small(ids).logits, expected, atol=1e-5)
    assert not torch.allclose(loaded(source)(ids).logits, expected, atol=1e-3)  # those experts did something
    assert report.experts.kept * 2 == report.experts.of
    assert sum(p.numel() for p in small.parameters()) == report.experts.parameters
    check_bits(whole, small, report)
    check_files(source, out)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_number_stands_under_the_name_that_config_json_has_for_it(family, tmp_path, tokens):
    """As published Qwen3-MoE has ``num_experts``: other runtimes know no other, and transformers takes one of two."""
    file, names = saved(family, tmp_path / "model") / "config.json", {"num_experts", "num_local_experts"}
    settings = json.loads(file.read_text())
    (name,) = names & settings.keys()
    (other,) = names - {name}
    file.write_text(json.dumps({other: settings.pop(name), **settings}))
    uniprune.prune(file.parent, recipe(tokens), tmp_path / "out")
    expected = {other: 2, **settings}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    loaded(tmp_path / "out")


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "fp8, fp4 experts", "compressed-tensors INT4"])
def test_experts_stored_as_codes_go_with_their_scales(name, tmp_path, tokens):
    source, out = tmp_path / "model", tmp_path / "out"
    quantised.save(name, source, "9KB", **GROUPS if quantised.FORMATS[name][0] == "deepseek_v3" else {})
    report = uniprune.prune(source, recipe(tokens), out)
    whole, small = (uniprune.load(folder, dtype="float32", device="cpu").model for folder in (source, out))
    check_bits(whole, small, report)
    check_files(source, out)
    assert resolve(out).quantised.tensors.keys() <= resolve(source).quantised.tensors.keys()
    ids = torch.randint(0, VOCABULARY, (3, 20))
    with torch.no_grad(), unchosen(whole, report.layers):
        assert torch.allclose(small(ids).logits, whole(ids).logits, atol=1e-5)


def check_bits(whole, small, report):
    """What is kept is the source's, bit for bit."""
    before, after = whole.state_dict(), small.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed
    for name, tensor in after.items():
        expected = before[name]
        if name in changed:
            kept = next(one.kept for layer, one in report.layers.items() if name.startswith(layer.rpartition(".")[0] + "."))
            expected = expected[kept]
        assert torch.equal(tensor, expected)


def check_files(source, out):
    """Keys are those of a model with fewer experts, the index is of the files, and everything else is as it was."""
    origin = resolve(out)
    there = {file.name for file in out.glob("*.safetensors")}
    assert there <= {file.name for file in source.glob("*.safetensors")}
    keys = {key for name in there for key in load_file(out / name)}
    assert keys == origin.files.entries.keys() <= resolve(source).files.entries.keys()
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"].keys() == keys
    assert index["metadata"]["total_size"] == sum(e.stop - e.start for e in origin.files.entries.values())
    parameters = index["metadata"].get("total_parameters")
    before = json.loads((source / "model.safetensors.index.json").read_bytes())["metadata"].get("total_parameters")
    assert parameters == (before and read_report(out / "pruning.json").experts.parameters)
    config = json.loads((out / "config.json").read_bytes())
    before = json.loads((source / "config.json").read_bytes())
    differing = {key for key in before if config[key] != before[key]}
    assert len(differing) == 1
    assert config.keys() == before.keys()
    assert "experts" in differing.pop() or config["text_config"]["num_experts"] * 2 == before["text_config"]["num_experts"]


# ------------------------------------------------------------------------------------------------------------- criteria


def reap_by_hand(model, ids):
    """The criterion, written out: what each expert puts out for each token that goes to it."""
    found, handles = {}, []

    def watch(name):
        def hook(experts, args, kwargs):
            x, index, weights = (*args, *kwargs.values())[:3]
            sums, counts = torch.zeros(2, len(experts.down_proj), dtype=torch.float64)
            for token, (chosen, gates) in enumerate(zip(index, weights, strict=True)):
                for expert, gate in zip(chosen.tolist(), gates, strict=True):
                    one = torch.tensor([[expert]])
                    alone = experts.forward(x[token : token + 1], one, torch.ones(1, 1))
                    sums[expert] += (gate * alone[0]).norm()
                    counts[expert] += 1
            found.setdefault(name, [torch.zeros_like(sums), torch.zeros_like(counts)])
            found[name][0] += sums
            found[name][1] += counts

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "down_proj") and getattr(module.down_proj, "ndim", 0) == 3:
            handles.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return {name: (sums / counts.clamp_min(1), counts) for name, (sums, counts) in found.items()}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_reap_is_the_published_criterion(family, tmp_path, tokens):
    source = saved(family, tmp_path / "model")
    report = uniprune.prune(source, recipe(tokens), tmp_path / "out")
    expected = reap_by_hand(loaded(source), load_file(tokens)["tokens"].long())
    assert expected.keys() == report.layers.keys()
    for name, (scores, counts) in expected.items():
        layer = report.layers[name]
        assert layer.tokens == counts.int().tolist()
        assert layer.reap == layer.scores == pytest.approx(scores.tolist(), rel=1e-4)
        if "deepseek" in family:
            each = scores.view(2, 4).topk(2).indices + torch.tensor([[0], [4]])
            assert layer.kept == sorted(each.flatten().tolist())
        else:
            assert layer.kept == sorted(scores.topk(2).indices.tolist())


def test_scores_of_experts_are_those_of_their_weights(tmp_path, tokens):
    source = saved("mixtral", tmp_path / "model")
    report = uniprune.prune(source, recipe(tokens, metric="magnitude", controller="none"), tmp_path / "out")
    model = loaded(source)
    for name, layer in report.layers.items():
        experts = model.get_submodule(name)
        gate, up = experts.gate_up_proj.chunk(2, 1)
        sums = [part.abs().sum((1, 2)).double() for part in (gate, up, experts.down_proj)]
        assert layer.scores == pytest.approx(sum(one / one.mean() for one in sums).tolist(), rel=1e-5)
    assert report.controller is None


def test_scores_by_inputs_count_how_often_an_expert_is_chosen(tmp_path, tokens):
    """Wanda's norm is over all tokens: the root of their number times the root of the mean square."""
    source = saved("mixtral", tmp_path / "model")
    report = uniprune.prune(source, recipe(tokens, metric="wanda", controller="none"), tmp_path / "out")
    assert report.starved is None
    model, inputs = loaded(source), {}
    for name in report.layers:
        keep = lambda module, args, name=name: inputs.__setitem__(name, args)  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(load_file(tokens)["tokens"].long())
    for name, layer in report.layers.items():
        experts, (x, chosen, _) = model.get_submodule(name), inputs[name]
        sums = torch.zeros(3, 4, dtype=torch.float64)
        for expert in range(4):
            mine = x[(chosen == expert).any(1)]
            gate, up = experts.gate_up_proj[expert].chunk(2)
            between = experts.act_fn(mine @ gate.T) * (mine @ up.T)
            for place, (weight, seen) in enumerate(((gate, mine), (up, mine), (experts.down_proj[expert], between))):
                sums[place, expert] = (weight.abs() * seen.double().square().mean(0).sqrt()).sum()
        expected = (sums / sums.mean(1, keepdim=True)).sum(0) * torch.tensor(layer.tokens).double().sqrt()
        assert layer.scores == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_controller_scores_experts(tmp_path, tokens):
    source = saved("mixtral", tmp_path / "model")
    asked = recipe(tokens, metric="wanda", tuning={"batch_tokens": 128})
    report = uniprune.prune(source, asked, tmp_path / "out")
    assert "0.5" in report.controller.targets[0]
    assert report.recipe["controller"] == "feedback"
    alone = uniprune.prune(source, recipe(tokens, metric="wanda", controller="none"), tmp_path / "alone")
    assert [one.scores for one in alone.layers.values()] != [one.scores for one in report.layers.values()]
    assert [one.reap for one in alone.layers.values()] == [one.reap for one in report.layers.values()]


def test_experts_that_no_token_reached_go_first_and_are_listed(tmp_path, tokens, capsys, monkeypatch):
    model = tiny("mixtral", num_experts_per_tok=1)
    for layer in model.model.layers:  # a token goes to 0 or 2, whichever logit is positive
        weight = layer.mlp.gate.weight
        weight[0], weight[1], weight[3] = -weight[2], 0.0, 0.5 * weight[2]
    model.save_pretrained(tmp_path / "model")
    command = ["prune", tmp_path / "model", "--experts", "0.5", "--metric", "reap", "--text", tokens, "-o", tmp_path / "out"]
    code, printed, errors = run(capsys, monkeypatch, *command)
    assert code == 0, errors
    report = ExpertRemoval.read(tmp_path / "out" / "pruning.json")
    assert report.unreached == {layer: [1, 3] for layer in report.layers}
    assert all(layer.kept == [0, 2] and layer.reap[1] == 0 == layer.tokens[3] for layer in report.layers.values())
    assert "No calibration token was routed to 4 experts, e.g. number 1 of model.layers.0.mlp" in " ".join(printed.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No calibration token of random was routed to 4 of the original's experts" in card


# ------------------------------------------------------------------------------------------------------------------ runs


METHODS = {
    "reap": {},
    "wanda": {"metric": "wanda", "controller": "none"},
    "ours": {"metric": "wanda", "tuning": {"batch_tokens": 128}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_streamed(tmp_path, tokens, method):
    """The same experts, and the same files."""
    source, asked = saved("qwen3_moe", tmp_path / "model"), recipe(tokens, **METHODS[method])
    uniprune.prune(source, asked, tmp_path / "whole")
    uniprune.prune(source, asked, tmp_path / "streamed", execution="streamed")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()


def remove(source, tokens, output, execution):
    """What each of several processes does; all return the report."""
    report = uniprune.prune(source, recipe(tokens), output, execution=execution)
    assert report.experts.kept == 2


@pytest.mark.parametrize("execution", ["resident", "sharded", "streamed"])
def test_two_processes_remove_the_same_experts(tmp_path, tokens, execution):
    source = saved("qwen3_moe", tmp_path / "model")
    alone = uniprune.prune(source, recipe(tokens), tmp_path / "alone")
    for done in processes.together(2, remove, source, tokens, tmp_path / "out", execution):
        assert done.code == 0, done.err
    found = ExpertRemoval.read(tmp_path / "out" / "pruning.json")
    assert [(one.kept, one.tokens) for one in found.layers.values()] == [
        (one.kept, one.tokens) for one in alone.layers.values()
    ]
    for file in (tmp_path / "alone").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_goes_on(tmp_path, tokens, after):
    source = saved("qwen3_moe", tmp_path / "model")
    asked = recipe(tokens, metric="wanda", controller="none")
    options = {"execution": "streamed"}
    expected = uniprune.prune(source, asked, tmp_path / "expected", **options)
    with pytest.raises(Stopped):
        uniprune.prune(source, asked, tmp_path / "out", progress=Stops(after), **options)
    assert not (tmp_path / "out").exists()
    found = uniprune.prune(source, asked, tmp_path / "out", resume=True, **options)
    assert found.layers == expected.layers
    before = (tmp_path / "out" / "pruning.json").stat().st_mtime_ns
    assert uniprune.prune(source, asked, tmp_path / "out", resume=True, **options).layers == expected.layers
    assert (tmp_path / "out" / "pruning.json").stat().st_mtime_ns == before


def test_the_record_replays_the_run(tmp_path, tokens):
    source = saved("olmoe", tmp_path / "model")
    first = uniprune.prune(source, recipe(tokens), tmp_path / "a")
    recorded = json.loads((tmp_path / "a" / "pruning.json").read_bytes())["recipe"]
    again = uniprune.prune(source, Recipe(**recorded), tmp_path / "b")
    assert (again.layers, again.recipe) == (first.layers, first.recipe)
    again = uniprune.evaluate(tmp_path / "a", text_source=str(tokens))
    again.write(tmp_path / "result.json")
    card = model_card.rewrite(tmp_path / "a", [tmp_path / "result.json"])
    assert f"| {again.perplexity:.2f} |" in card
    assert "each of 2 layers has 2 of 4 experts" in card
    with pytest.raises(InputError, match=r"has fewer experts, which a report of sparsity does not show"):
        uniprune.report([tmp_path / "a"], tmp_path / "report.html")
    assert "experts: 0.5" in card


def test_plan_says_what_is_left(tmp_path, tokens, capsys, monkeypatch):
    source = saved("deepseek_v3", tmp_path / "model")
    plan = uniprune.plan(source, recipe(tokens))
    report = uniprune.prune(source, recipe(tokens), tmp_path / "out")
    assert plan.experts == report.experts
    assert (plan.experts.kept, plan.experts.of, plan.experts.groups) == (4, 8, 2)
    assert plan.disk == sum(e.stop - e.start for e in resolve(tmp_path / "out").files.entries.values())
    code, printed, _ = run(capsys, monkeypatch, "plan", source, "--experts", "0.5", "--metric", "reap")
    assert code == 0
    assert "4 of 8 stay in each of 1 layers, as many in each of 2 groups" in " ".join(printed.split())


def test_the_output_is_a_model_like_any_other(tmp_path, tokens):
    """It can be pruned to 2:4, and its experts once more."""
    source = saved("mixtral", tmp_path / "model")
    uniprune.prune(source, recipe(tokens, experts=0.25), tmp_path / "a")
    assert uniprune.prune(tmp_path / "a", recipe(tokens, experts=0.34), tmp_path / "b").experts.kept == 2
    report = uniprune.prune(tmp_path / "b", Recipe(sparsity="2:4", text=str(tokens), controller="none"), tmp_path / "c")
    assert report.sparsity == 0.5
    assert uniprune.evaluate(tmp_path / "c", text_source=str(tokens)).perplexity > 1


@pytest.mark.parametrize(
    ("family", "layer", "beside", "setting"),
    [
        ("deepseek_v3", "model.layers.2.", "model.layers.2.eh_proj.weight", "num_nextn_predict_layers"),
        ("qwen3_next", "mtp.layers.0.", "mtp.fc.weight", "mtp_num_hidden_layers"),
    ],
)
def test_heads_that_predict_several_tokens_go(tmp_path, tokens, family, layer, beside, setting):
    """They have experts of their own, as many as config.json says, and nothing scores them."""
    source = saved(family, tmp_path / "model")
    shard = sorted(source.glob("*.safetensors"))[-1]
    state = {key: tensor for file in source.glob("*.safetensors") for key, tensor in load_file(file).items()}
    last = "model.layers.1."
    extra = {key.replace(last, layer): tensor.clone() for key, tensor in state.items() if key.startswith(last)}
    other = "talker.layers.0.mlp.experts.0.up_proj.weight"  # of a part that is no head
    extra |= {beside: torch.ones(2, 2)}
    save_file(load_file(shard) | extra | {other: torch.ones(2, 2)}, shard, {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_bytes())
    index["weight_map"] |= dict.fromkeys([*extra, other], shard.name)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | {setting: 1}))
    report = uniprune.prune(source, recipe(tokens), tmp_path / "out")
    assert report.experts.left_out == len(extra)
    kept = resolve(tmp_path / "out").files.entries
    assert not any(key == beside or key.startswith(layer) for key in kept)
    assert other in kept
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())[setting] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {}, "has no experts that transformers holds together; leave --experts out"),
        ("llama4", {}, "gives every expert all tokens"),
        ("jamba", {}, "no part for each"),
        ("mixtral", {"experts": 0.2}, "removes none of the 4 experts in a layer .*; give at least 0.25"),
        ("mixtral", {"experts": 0.8}, "leaves 1 of the 4 experts .*, too few for tokens that go to 2 each; give at most 0.5"),
        ("deepseek_v3", {"experts": 0.8}, "in 2 groups, too few for tokens that go to 2 each; give at most 0.5"),
        ("deepseek_v3", {"experts": 0.2}, "removes none of the 8 experts .* in 2 groups; give at least 0.25"),
    ],
)
def test_models_whose_experts_cannot_go(tmp_path, tokens, family, settings, reason):
    source = saved(family, tmp_path / "model")
    for command in (uniprune.plan, lambda source, asked: uniprune.prune(source, asked, tmp_path / "out")):
        with pytest.raises(InputError, match=reason):
            command(source, recipe(tokens, **settings))
    assert not (tmp_path / "out").exists()


def test_a_router_that_would_choose_otherwise(tmp_path, tokens, monkeypatch):
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    own = MixtralTopKRouter.forward

    def by_rank(self, hidden):
        """Favours the second half of the experts, however many there are."""
        logits = functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        logits[:, len(self.weight) // 2 :] += 100
        scores, chosen = torch.topk(logits.softmax(-1), self.top_k)
        return logits, scores, chosen

    source = saved("mixtral", tmp_path / "model")
    monkeypatch.setattr(MixtralTopKRouter, "forward", by_rank)
    with pytest.raises(InputError, match=r"the router model\.layers\.0\.mlp\.gate of .* chooses otherwise among fewer experts"):
        uniprune.plan(source, recipe(tokens))
    monkeypatch.setattr(MixtralTopKRouter, "forward", lambda self, hidden, ids: own(self, hidden))
    with pytest.raises(InputError, match=r"the router model\.layers\.0\.mlp\.gate of .* cannot be tried: .*ids"):
        uniprune.plan(source, recipe(tokens))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sparsity": "2:4"}, "leave out sparsity, and prune its output afterwards"),
        ({"metric": "wanda", "sequential": True}, "leave out sequential"),
        ({"include": ["mlp"]}, "leave out include"),
        ({"controller": "feedback"}, "--metric reap scores whole experts by themselves"),
        ({"experts": None, "sparsity": 0.5}, "--metric reap scores whole experts by themselves; give it with --experts"),
        ({"experts": 0}, "--experts = 0: Input should be greater than 0"),
        ({"experts": 1}, "--experts = 1: Input should be less than 1"),
    ],
)
def test_settings_that_do_not_go_together(tokens, settings, reason):
    with pytest.raises(InputError, match=reason):
        recipe(tokens, **settings)


def test_where_there_are_no_files(tmp_path, tokens):
    model = tiny("mixtral")
    with pytest.raises(InputError, match=r"is not in safetensors files; save it \(save_pretrained\) and give the folder"):
        uniprune.prune(uniprune.Loaded(model), recipe(tokens), tmp_path / "out")
    with pytest.raises(InputError, match="use prune, not prune_in_place"):
        uniprune.prune_in_place(uniprune.Loaded(model), recipe(tokens))
    with pytest.raises(InputError, match="--experts is for prune"):
        uniprune.calibrate(saved("mixtral", tmp_path / "model"), recipe(tokens), tmp_path / "s.safetensors")
    report = uniprune.prune(uniprune.load(tmp_path / "model", device="cpu"), recipe(tokens), tmp_path / "out")
    assert report.experts.kept == 2
    shutil.rmtree(tmp_path / "model")
    assert config_of("mixtral").num_local_experts == 4 == report.experts.of


def test_single_experts_that_are_quantised_by_name(tmp_path, tokens):
    source = tmp_path / "model"
    quantised.save("fp8", source, **GROUPS)
    config = json.loads((source / "config.json").read_bytes())
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.1.mlp.experts.3"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="names single experts to be quantised, whose numbers would change"):
        uniprune.plan(source, recipe(tokens))


def test_tensors_whose_elements_share_a_byte_stay_whole(tmp_path, tokens):
    source, out = tmp_path / "model", tmp_path / "out"
    tiny("mixtral").save_pretrained(source)
    codes = torch.arange(36, dtype=torch.uint8).reshape(4, 9)[:, :8].contiguous()
    extra = {"codes": codes.view(torch.float4_e2m1fn_x2), "bytes": codes[0, :3].clone(), "wide": torch.ones(3)}
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors", {"format": "pt"})
    plan = uniprune.plan(source, recipe(tokens))
    uniprune.prune(source, recipe(tokens), out)
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)) for key, tensor in extra.items())
    assert plan.disk == sum(tensor.nbytes for tensor in after.values())
