"""The commands end to end, on a tiny model in a folder."""

import json
import os
import shutil
from functools import partial

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, RwkvConfig

import uniprune
from conftest import VOCABULARY, Stopped, Stops, shared, tiny_model, write_gguf
from processes import Forked
from uniprune import Loaded, Recipe
from uniprune.artefacts import archive, mask_tools
from uniprune.artefacts.reports import Pruning
from uniprune.errors import InputError, MismatchError, UniPruneError
from uniprune.models.loading import dtype_name, fast_dtype
from uniprune.models.matrices import find_matrices
from uniprune.runtime import layout
from uniprune.storage import files, runs

SMALL = {"windows": 8, "length": 32}


def weights(folder):
    return {key: value for shard in sorted(folder.glob("*.safetensors")) for key, value in load_file(shard).items()}


@pytest.mark.parametrize(
    "settings", [{}, {"sequential": True}, {"refine": True}, {"metric": "ria:a=0.5"}, {"metric": "magnitude"}]
)
def test_prune_writes_what_plain_transformers_runs(folder, tmp_path, settings):
    out = tmp_path / "out"
    report = uniprune.prune(str(folder), Recipe(sparsity="2:4", **SMALL, **settings), out)
    assert report.sparsity == 0.5
    assert json.loads((out / "pruning.json").read_text()) == json.loads(json.dumps(report.record()))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.generate(**tokenizer("The import", return_tensors="pt"), max_new_tokens=5).shape[1] > 5
    for matrix in find_matrices(model).values():
        assert int((matrix.weight.view(-1, 4) != 0).sum(1).max()) == 2
    source, pruned = weights(folder), weights(out)
    for key, weight in source.items():
        assert pruned[key].dtype == weight.dtype == torch.bfloat16
        kept = pruned[key] != 0
        assert torch.equal(pruned[key][kept], weight[kept])


def test_one_seed_one_file(folder, tmp_path):
    recipe = Recipe(sparsity="0.5", metric="stochria", **SMALL)
    first = uniprune.prune(str(folder), recipe, tmp_path / "first")
    again = uniprune.prune(str(folder), recipe, tmp_path / "again")
    other = uniprune.prune(str(folder), recipe.model_copy(update={"seed": 1}), tmp_path / "other")
    assert first.masks_sha256 == again.masks_sha256 != other.masks_sha256
    assert first.calibration.sha256 != other.calibration.sha256


def test_sparsity_zero_is_the_identity(folder, tmp_path):
    uniprune.prune(str(folder), Recipe(sparsity="0", **SMALL), tmp_path / "out")
    for file in folder.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("sparsity", "scope", "controller"),
    [
        ("2:4", None, "none"),
        ("0.6", None, "none"),
        ("0.6", "matrix", "none"),
        ("0.6", "model", "none"),
        ("2:4", None, "feedback"),
        ("0.6", None, "feedback"),
        ("2:4", None, "unipruning"),
        ("0.6", "model", "paper"),
    ],
)
def test_the_three_steps_are_prune(folder, tmp_path, sparsity, scope, controller):
    """With the controller, too, if calibrate is told the one target."""
    scores, masks = tmp_path / "scores.safetensors", tmp_path / "masks.safetensors"
    recipe = Recipe(sparsity=sparsity, scope=scope, controller=controller, **SMALL)
    uniprune.calibrate(str(folder), recipe, scores)
    uniprune.mask(scores, sparsity, masks, scope=scope)
    uniprune.apply(str(folder), masks, tmp_path / "steps")
    report = uniprune.prune(str(folder), recipe, tmp_path / "once")
    steps, once = weights(tmp_path / "steps"), weights(tmp_path / "once")
    assert steps.keys() == once.keys()
    assert all(torch.equal(steps[key], once[key]) for key in once)
    assert json.loads((tmp_path / "steps" / "pruning.json").read_text())["sparsity"] == report.sparsity


def test_one_calibration_serves_every_sparsity(folder, tmp_path, caplog):
    scores = tmp_path / "scores.safetensors"
    facts = uniprune.calibrate(str(folder), Recipe(**SMALL), scores)
    assert facts.controller.targets == ["0.5 by model", "0.6 by model", "0.7 by model", "2:4", "4:8", "2:4"]
    for sparsity, expected in {"0.31": 0.31, "0.8": 0.8, "1:4": 0.75, "7:8": 0.125}.items():
        cut = uniprune.mask(scores, sparsity, tmp_path / "masks.safetensors", overwrite=True)
        assert cut.sparsity == pytest.approx(expected, abs=1e-4)
    assert not caplog.records


@pytest.mark.parametrize("controller", ["feedback", "fisher"])
def test_scores_for_one_sparsity_say_so_at_others(folder, tmp_path, caplog, controller):
    scores, out = tmp_path / "scores.safetensors", tmp_path / "masks.safetensors"
    uniprune.calibrate(str(folder), Recipe(sparsity="0.5", controller=controller, scope="model", **SMALL), scores)
    uniprune.mask(scores, "0.5", out, scope="model")
    uniprune.mask(scores, "0.5", out, scope="model", rules="down_proj=dense", overwrite=True)
    assert not caplog.records
    uniprune.mask(scores, "2:4", out, overwrite=True)
    found = [record.getMessage() for record in caplog.records]
    assert found == [
        f"{scores} was calibrated for 0.5 by model alone; masks of 2:4 would be better from scores for any "
        "sparsity, calibrated without --sparsity"
    ] * (controller == "feedback")


def test_a_report_replays_its_run(folder, tmp_path):
    recipe = Recipe(sparsity="0.3", scope="matrix", metric="ria:a=0.7", exclude="down_proj", seed=3, **SMALL)
    report = uniprune.prune(str(folder), recipe, tmp_path / "out")
    again = uniprune.prune(str(folder), Recipe(**report.recipe), tmp_path / "again")
    assert again.masks_sha256 == report.masks_sha256


def test_a_recipe_tunes_its_controller(folder, tmp_path):
    recipe = Recipe(sparsity="2:4", tuning={"labels": 0.5, "power": 0.7}, **SMALL)
    report = uniprune.prune(str(folder), recipe, tmp_path / "out")
    plain = uniprune.prune(str(folder), Recipe(sparsity="2:4", **SMALL), tmp_path / "plain")
    assert report.controller.held_out_loss != plain.controller.held_out_loss
    again = uniprune.prune(str(folder), Recipe(**report.recipe), tmp_path / "again")
    assert again.masks_sha256 == report.masks_sha256


@pytest.mark.parametrize(
    ("tuning", "controller", "message"),
    [
        ({"stepsize": 1}, "feedback", "'stepsize' is not a setting of MirrorDescent; it has: step_size"),
        ({"temperature": 0}, "feedback", "'temperature' is not a setting of MirrorDescent; it has: step_size"),
        ({"step_size": 1}, "paper", "'step_size' is not a setting of UniPruning; it has: learning_rate"),
        ({"rho": -1}, "paper", "alpha \\* rho \\* kappa"),
        ({"step_size": -1}, "feedback", "step_size = -1.0"),
        ({"labels": 2}, "feedback", "labels = 2.0"),
    ],
)
def test_bad_tuning_is_named(tuning, controller, message):
    with pytest.raises(InputError, match=message):
        Recipe(tuning=tuning, controller=controller)


def test_a_model_in_memory_is_pruned_in_place(loaded):
    dense = {name: p.clone() for name, p in loaded.model.named_parameters()}
    report = uniprune.prune_in_place(loaded, Recipe(sparsity="0.5", exclude="down_proj", scope="row", **SMALL))
    assert report.masks_sha256 is None
    assert report.sparsity == pytest.approx(0.5)
    assert len(report.matrices) == 18
    for name, parameter in loaded.model.named_parameters():
        pruned = name.removesuffix(".weight") in report.matrices
        assert float((parameter == 0).float().mean()) == pytest.approx(0.5 if pruned else 0, abs=0.001)
        assert torch.equal(parameter[parameter != 0], dense[name][parameter != 0])


@pytest.mark.parametrize("controller", ["none", "feedback"])
def test_a_model_in_memory_stays_dense_if_a_folder_is_written(folder, tmp_path, controller):
    loaded = uniprune.load(str(folder), dtype="float32")
    dense = {name: p.clone() for name, p in loaded.model.named_parameters()}
    recipe = Recipe(sparsity="2:4", controller=controller, dtype="float32", **SMALL)
    uniprune.prune(loaded, recipe, tmp_path / "out")
    assert all(torch.equal(p, dense[name]) for name, p in loaded.model.named_parameters())
    uniprune.prune(str(folder), recipe, tmp_path / "again")
    written, again = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert written.keys() == again.keys()
    assert all(torch.equal(written[key], again[key]) for key in written)


def test_masks_of_another_model_are_refused(folder, tmp_path, tokenizer):
    scores, masks = tmp_path / "scores.safetensors", tmp_path / "masks.safetensors"
    uniprune.calibrate(str(folder), Recipe(metric="magnitude", **SMALL), scores)
    uniprune.mask(scores, "2:4", masks)
    same_shapes, other_shapes = tmp_path / "same", tmp_path / "other"
    tiny_model(rms_norm_eps=1e-3, initializer_range=0.03).to(torch.bfloat16).save_pretrained(same_shapes)
    tiny_model(num_hidden_layers=2).to(torch.bfloat16).save_pretrained(other_shapes)
    for wrong in (same_shapes, other_shapes):
        with pytest.raises(MismatchError, match="made for another model"):
            uniprune.apply(str(wrong), masks, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(MismatchError, match="has no matrix"):
        uniprune.apply(str(other_shapes), masks, tmp_path / "out", force=True)
    assert len(uniprune.apply(str(same_shapes), masks, tmp_path / "out", force=True).differs) == 21
    own = tmp_path / "out" / "pruning" / "masks.safetensors"
    assert mask_tools.verify(own, same_shapes, tmp_path / "out")["checked"][-2:] == ["model", "pruned"]
    assert "made for another model" in (tmp_path / "out" / "README.md").read_text()
    assert uniprune.apply(str(same_shapes), own, tmp_path / "again").differs == []
    assert uniprune.apply(str(folder), masks, tmp_path / "right").differs == []


def test_evaluate_says_how_sparse_the_model_really_is(folder, tmp_path):
    uniprune.prune(str(folder), Recipe(sparsity="0.75", **SMALL), tmp_path / "out")
    dense = uniprune.evaluate(str(folder), length=64, windows=4)
    pruned = uniprune.evaluate(str(tmp_path / "out"), length=64, windows=4)
    assert dense.sparsity < 0.01
    assert pruned.sparsity == pytest.approx(0.75, abs=0.01)
    assert dense.text == pruned.text
    assert dense.perplexity != pruned.perplexity


def test_gpt2_goes_the_whole_way(tmp_path, tokenizer):
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    report = uniprune.prune(str(tmp_path / "model"), Recipe(sparsity="1:4", **SMALL), tmp_path / "out")
    assert report.sparsity == 0.75
    for matrix in find_matrices(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).values():
        assert int((matrix.weight.reshape(-1, 4) != 0).sum(1).max()) == 1


def test_gguf_files_become_safetensors(tmp_path, tokenizer):
    model = tiny_model()
    source = write_gguf(model, tokenizer, tmp_path / "model" / "tiny.gguf")
    out = source.parent / "out"  # beside a file there is room
    uniprune.prune(str(source), Recipe(sparsity="2:4", **SMALL), out)
    assert not list(out.glob("*.gguf"))
    pruned = find_matrices(AutoModelForCausalLM.from_pretrained(out))
    for name, matrix in find_matrices(model).items():
        kept = pruned[name].weight != 0
        assert torch.equal(pruned[name].weight[kept], matrix.weight[kept])


def test_pickled_weights_are_never_loaded(tmp_path, tokenizer):
    """Neither where they are all there is, nor where safetensors files lie beside them; and no code beside them is run."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    touched = tmp_path / "touched"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(f"open({str(touched)!r}, 'w')")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %b'\ntR." % str(touched).encode())
    uniprune.prune(str(tmp_path / "model"), Recipe(sparsity="2:4", **SMALL), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="convert them to safetensors"):
        uniprune.load(tmp_path / "model")
    assert not touched.exists()


def test_plan_reads_no_weight(folder, tmp_path):
    """A folder with a configuration and safetensors headers, but broken data."""
    for file in folder.iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            header = 8 + int.from_bytes(data[:8], "little")
            data = data[:header] + b"\xff" * (len(data) - header)
        (tmp_path / file.name).write_bytes(data)
    plan = uniprune.plan(str(tmp_path), Recipe(sparsity="3:8"))
    assert plan.prunable == sum(matrix.size for matrix in find_matrices(tiny_model()).values())
    assert plan.sparsity == 0.625
    assert plan.dtype == dtype_name(fast_dtype(torch.bfloat16, torch.device("cpu")))
    assert plan.fits
    assert not uniprune.plan(str(tmp_path), Recipe(sparsity="2:5")).fits
    assert uniprune.plan(str(tmp_path), Recipe(sparsity="2:5", unsupported="dense")).fits
    with pytest.raises(InputError, match="nothing would be pruned: all matrices would stay dense"):
        uniprune.prune(str(folder), Recipe(sparsity="2:5", unsupported="dense"), tmp_path / "out")


def test_one_budget_under_rules_and_mixed_patterns(folder, tmp_path):
    scores = tmp_path / "scores.safetensors"
    uniprune.calibrate(str(folder), Recipe(controller="none", **SMALL), scores)
    cut = uniprune.mask(scores, "0.5", tmp_path / "a.safetensors", scope="model", rules=["down_proj=dense", "q_proj=0.1..0.2"])
    assert cut.sparsity == pytest.approx(0.5, abs=1e-4)
    for name, matrix in cut.matrices.items():
        assert matrix.sparsity == 0 or "down_proj" not in name
        assert 0.1 <= matrix.sparsity <= 0.2 or "q_proj" not in name
    mixed = uniprune.mask(scores, "0.3", tmp_path / "b.safetensors", allow=["2:4,dense"])
    assert mixed.sparsity == pytest.approx(0.3, abs=1e-3)
    assert sum(matrix.sparsity in (0, 0.5) for matrix in mixed.matrices.values()) >= 20
    recipe = Recipe(sparsity="2:4", hardware="nvidia-semi-structured", unsupported="dense", **SMALL)
    report = uniprune.prune(str(folder), recipe, tmp_path / "out")
    assert report.unsupported
    assert all(report.matrices[name].sparsity == (0 if name in report.unsupported else 0.5) for name in report.matrices)
    with pytest.raises(InputError, match="matches none of the 21 matrices"):
        uniprune.plan(str(folder), Recipe(sparsity="0.5", rules="o_project=dense"))
    with pytest.raises(InputError, match="--allow goes with a fraction"):
        Recipe(sparsity="2:4", allow="2:4,dense")


def test_unknown_keywords_are_named(folder, tmp_path):
    known = r"overwite = True: .*; known settings: device, max_memory, execution, save_tokens, resume, overwrite"
    with pytest.raises(InputError, match=known):
        uniprune.prune(str(folder), Recipe(sparsity="2:4"), tmp_path / "out", overwite=True)
    with pytest.raises(InputError, match=r"--windows = 'many': "):
        uniprune.evaluate(str(folder), windows="many")
    with pytest.raises(InputError, match=r"txt = 'c4': .*; known settings: text_source, field, split, windows"):
        uniprune.sweep(str(folder), tmp_path / "scores", tmp_path / "s.json", ["2:4"], txt="c4")
    assert not list(tmp_path.iterdir())


def test_a_plan_shows_the_range_of_a_rule(folder):
    plan = uniprune.plan(str(folder), Recipe(sparsity="0.5", rules=["q_proj=dense", "down_proj=0.3..0.6"]))
    gets = {group.name.rpartition(".")[2]: group.pattern for group in plan.groups}
    assert (gets["q_proj"], gets["down_proj"], gets["up_proj"]) == ("dense", "0.5 by model, 0.3..0.6 here", "0.5 by model")


def test_the_controller_descends_on_budgets_with_rules(folder, tmp_path):
    for index, settings in enumerate(({"rules": "down_proj=2:4"}, {"allow": "2:4,dense"}, {"scope": "block"})):
        recipe = Recipe(sparsity="0.4", steps=2, **settings, **SMALL)
        assert uniprune.prune(str(folder), recipe, tmp_path / str(index)).sparsity == pytest.approx(0.4, abs=1e-3)


def test_calibration_refuses_what_it_cannot_do(folder, tmp_path):
    with pytest.raises(InputError, match=r"3:7, e\.g"):
        uniprune.prune(str(folder), Recipe(sparsity="3:7", **SMALL), tmp_path / "out")
    for settings, complaint in {
        "length=129": "context of 128; take shorter ones",
        "text=nope.txt": "nor an existing file or folder",
    }.items():
        name, value = settings.split("=")
        recipe = Recipe(sparsity="2:4", **{name: int(value) if value.isdigit() else value})
        for verb in (uniprune.plan, partial(uniprune.prune, output=tmp_path / "out")):
            with pytest.raises(InputError, match=complaint):
                verb(str(folder), recipe)
    with pytest.raises(InputError, match="no sparsity"):
        uniprune.prune(str(folder), Recipe(**SMALL), tmp_path / "out")
    with pytest.raises(InputError, match="use it with prune"):
        uniprune.calibrate(str(folder), Recipe(sequential=True), tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="--refine needs the masks"):
        uniprune.calibrate(str(folder), Recipe(refine=True), tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_wikitext_rows():
    """The development data reads as the papers' text: 4358 rows joined by two newlines."""
    from uniprune.data.text import read

    text = read(shared("wikitext2/wiki.test.raw"), "evaluation")
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n")
    assert text.count("\n\n") >= 4357


def plan_of(name, cache):
    huggingface_hub.constants.HF_HUB_CACHE = cache
    uniprune.plan(name, Recipe())


def test_hub_names_that_are_not_here(tmp_path):
    """Offline and not cached: one error that names the model, and no traceback of the hub client."""
    done = Forked(plan_of, "nobody/nothing", str(tmp_path)).wait()
    assert "InputError: model nobody/nothing does not exist here, nor in the Hub's cache" in done.err


def test_no_safetensors_but_the_weights_lie_beside_the_config(folder, tmp_path):
    """Runtimes that load every safetensors file of a folder must not meet the masks."""
    uniprune.prune(str(folder), Recipe(sparsity="2:4", controller="none", **SMALL), tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").glob("*.safetensors")} == {f.name for f in folder.glob("*.safetensors")}
    assert (tmp_path / "out" / "pruning" / "masks.safetensors").is_file()


def test_a_cpu_that_only_emulates_a_type_computes_in_float32(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for supported, expected in ((lambda: True, torch.bfloat16), (lambda: False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", supported, raising=False)
        assert fast_dtype(torch.bfloat16, cpu) == expected
    assert fast_dtype(torch.bfloat16, cuda) == torch.bfloat16
    assert fast_dtype(torch.float32, cpu) == torch.float32


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), ("float32", False)])
def test_a_loaded_model_of_an_emulated_type_is_warned_of(monkeypatch, folder, caplog, dtype, warned):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    loaded = uniprune.load(str(folder), dtype=dtype)
    with caplog.at_level("WARNING"):
        uniprune.evaluate(loaded, windows=1, length=16)
        uniprune.prune_in_place(loaded, Recipe(sparsity="2:4", metric="magnitude", controller="none", **SMALL))
    assert caplog.text.count("load the model with dtype='float32'") == 2 * warned
    assert all(p.dtype == getattr(torch, dtype) for p in loaded.model.parameters())


def test_a_model_that_changes_its_weights_as_it_computes_is_refused_in_memory(tokenizer, tmp_path):
    """RWKV halves those of every sixth block in place; what would be written is not what was scored. From its folder it is."""
    shape = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RwkvConfig(vocab_size=VOCABULARY, num_hidden_layers=8, **shape)).eval()
    recipe = Recipe(sparsity="2:4", controller="none", windows=2, length=32)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UniPruneError, match=r"changes them as it computes .*give the folder"):
        uniprune.prune(Loaded(model, tokenizer), recipe, tmp_path / "out")
    uniprune.prune(tmp_path / "model", recipe, tmp_path / "out")


def test_inference_mode_is_no_hindrance_unless_the_model_was_made_in_it(tokenizer):
    recipe = Recipe(sparsity="2:4", controller="feedback", steps=2, windows=8, length=32)
    model = tiny_model()
    with torch.inference_mode():
        assert uniprune.prune_in_place(Loaded(model, tokenizer), recipe).sparsity == 0.5
        made_in_it = tiny_model().requires_grad_()
    local = {"sparsity": "2:4", "metric": "magnitude", "controller": "none", "windows": 2, "length": 32}
    assert uniprune.prune_in_place(Loaded(made_in_it, tokenizer), Recipe(**local)).sparsity == 0.5
    with pytest.raises(InputError, match=r"made in torch\.inference_mode and cannot be differentiated"):
        uniprune.prune_in_place(Loaded(made_in_it, tokenizer), recipe)


# ------------------------------------------------------------------------------------------------- files beside the output


def test_tokens_are_not_saved_into_the_output(folder, tmp_path):
    """It is made as a whole, and with it what lay there before is gone."""
    recipe, out = Recipe(sparsity="0.5", controller="none", **SMALL), tmp_path / "out"
    for name in ("tokens.safetensors", "pruning/tokens.safetensors"):
        with pytest.raises(InputError, match="lies in the output folder"):
            uniprune.prune(str(folder), recipe, out, save_tokens=out / name)
    assert not list(tmp_path.iterdir())
    uniprune.prune(str(folder), recipe, out)
    with pytest.raises(InputError, match="lies in the output folder"):
        uniprune.prune(str(folder), recipe, out, save_tokens=out / "tokens.safetensors", overwrite=True)


def test_a_refused_run_saves_no_tokens(folder, tokenizer, tmp_path):
    recipe, tokens = Recipe(sparsity="0.5", controller="none", **SMALL), tmp_path / "tokens.safetensors"
    with pytest.raises(InputError, match="needs"):
        uniprune.prune(str(folder), recipe, tmp_path / "out", save_tokens=tokens, max_memory=1000)
    assert not list(tmp_path.iterdir())
    broken = tiny_model()
    broken.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        uniprune.prune(Loaded(broken, tokenizer), recipe, tmp_path / "out", save_tokens=tokens)
    assert not list(tmp_path.iterdir())
    uniprune.prune(str(folder), recipe, tmp_path / "out", save_tokens=tokens)
    assert tokens.exists()


@pytest.mark.parametrize("model", [".", "../model"])
def test_a_finished_run_of_where_one_stands_has_nothing_to_do(folder, tmp_path, monkeypatch, model):
    shutil.copytree(folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    for entry, sparsity in ((uniprune.prune, "0.5"), (uniprune.calibrate, None)):
        asked = Recipe(sparsity=sparsity, metric="magnitude", controller="none", windows=2, length=16)
        output = tmp_path / f"{entry.__name__}.safetensors"
        entry(model, asked, output)
        before = files.changed(output)
        entry(model, asked, output, resume=True)
        assert files.changed(output) == before


def test_what_is_newer_than_a_finished_run_is_found_below_a_folder_and_dangling_links_are_not(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "texts" / "below").mkdir(parents=True)
    text = tmp_path / "texts" / "below" / "one.txt"
    text.write_text("One two three. " * 300)
    recipe = Recipe(sparsity="0.5", controller="none", text=str(tmp_path / "texts"), **SMALL)
    uniprune.prune(tmp_path / "model", recipe, tmp_path / "out")
    uniprune.prune(tmp_path / "model", recipe, tmp_path / "out", resume=True)
    assert "has been written since" not in caplog.text
    later = files.changed(tmp_path / "out") + 10
    os.utime(text, (later, later))
    uniprune.prune(tmp_path / "model", recipe, tmp_path / "out", resume=True)
    assert "has been written since" in caplog.text
    assert {"prepare", "write", "time"} <= Pruning.read(tmp_path / "out" / "pruning.json").seconds.keys()


def test_a_finished_run_that_is_resumed_says_that_it_kept_no_tokens(folder, tmp_path):
    recipe, tokens = Recipe(sparsity="0.5", controller="none", **SMALL), tmp_path / "tokens.safetensors"
    for entry, output in ((uniprune.prune, tmp_path / "out"), (uniprune.calibrate, tmp_path / "scores.safetensors")):
        entry(str(folder), recipe, output)
        entry(str(folder), recipe, output, resume=True)
        with pytest.raises(InputError, match="is complete, and its calibration samples were not saved"):
            entry(str(folder), recipe, output, resume=True, save_tokens=tokens)


def test_as_much_disk_is_asked_for_as_is_written(folder, tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "check_disk_space", lambda path, size, held=0: asked.append(size))
    recipe = Recipe(sparsity="0.5", controller="none", **SMALL)
    write_gguf(tiny_model(tie_word_embeddings=False), tokenizer, tmp_path / "model.gguf")
    sources = {"memory": Loaded(tiny_model().to(torch.bfloat16), tokenizer), "gguf": str(tmp_path / "model.gguf")}
    for name, source in sources.items():
        uniprune.prune(source, recipe, tmp_path / name)
        written = sum(file.stat().st_size for file in (tmp_path / name).rglob("*.safetensors"))
        assert asked[0] == pytest.approx(written, rel=0.15)
        asked.clear()


def test_masks_count_as_disk_that_is_taken(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "check_disk_space", lambda path, size, held=0: asked.append(size))
    uniprune.prune(str(folder), Recipe(sparsity="0.5", controller="none", **SMALL), tmp_path / "pruned")
    masks = tmp_path / "pruned" / "pruning" / "masks.safetensors"
    uniprune.apply(str(folder), masks, tmp_path / "applied")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    bits = sum(bits.nbytes for bits in load_file(masks).values())
    assert asked[0] == weights + bits
    assert asked[-1] == weights + masks.stat().st_size


@pytest.mark.parametrize("settings", [{}, {"controller": "unipruning", "steps": 1}], ids=str)
def test_progress_may_be_a_plain_function(loaded, settings):
    seen = []

    def progress(items, label, total):
        seen.append(label)
        yield from items

    uniprune.prune_in_place(loaded, Recipe(sparsity="2:4", **SMALL, **settings), progress=progress)
    assert seen


def test_budgets_at_the_limit_of_their_ranges_are_met(tokenizer):
    """Of a sample of the scores they cannot be, so nearly."""
    loaded = Loaded(tiny_model(hidden_size=36, intermediate_size=54, head_dim=6), tokenizer)
    recipe = Recipe(sparsity="0.5", rules=(".=0.5..0.7",), tuning={"batch_tokens": 64}, steps=1, **SMALL)
    report = uniprune.prune_in_place(loaded, recipe)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_apply_discards_an_interrupted_run_if_told_to_and_packing_does_not(folder, tmp_path):
    recipe, out, inter = Recipe(sparsity="2:4", controller="none", **SMALL), tmp_path / "out", tmp_path / "inter"
    uniprune.prune(str(folder), recipe, out)
    with pytest.raises(Stopped):
        uniprune.prune(str(folder), recipe, inter, execution="streamed", progress=Stops(1))
    assert runs.folder_of(inter).exists()
    archive.pack(out, tmp_path / "a.upz")
    for make in (layout.pack, lambda source, output: archive.unpack(tmp_path / "a.upz", output)):
        with pytest.raises(InputError, match="unfinished run of"):
            make(str(out), inter)
    masks = out / "pruning" / "masks.safetensors"
    with pytest.raises(InputError, match="unfinished run of"):
        uniprune.apply(str(folder), masks, inter)
    uniprune.apply(str(folder), masks, inter, overwrite=True)
    assert not runs.folder_of(inter).exists()
