"""Model cards: what they say is what the folder and the results hold; and what an upload needs."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import made_up
import uniprune
from command import run
from uniprune import Recipe
from uniprune.artefacts.reports import ModelFacts, Pruning
from uniprune.checkpoints.origin import resolve
from uniprune.errors import InputError, MismatchError
from uniprune.reporting import model_card
from uniprune.reporting.results import read_all
from uniprune.reporting.summary import summarise

ASKED = ("--text", "builtin", "--windows", 2, "--length", 32)


@pytest.fixture
def pruned(folder, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(folder, source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base model\n")
    uniprune.prune(str(source), Recipe(sparsity="2:4", windows=2, length=32, controller="none"), tmp_path / "pruned")
    return tmp_path / "pruned"


def test_every_output_folder_has_a_card(pruned):
    written = ModelCard.load(pruned / "README.md")
    assert written.data.library_name == "transformers"
    assert written.data.pipeline_tag == "text-generation"
    assert written.data.license == "apache-2.0"
    assert written.data.base_model is None  # a folder is no name that others know
    assert {"pruned", "n-m-sparsity"} <= set(written.data.tags)
    assert "50.0% of the weights in 21 matrices were set to zero** (2:4" in written.text
    assert "dense with zeros" in written.text
    recipe = written.text.partition("```yaml\n")[2].partition("```")[0]
    assert Recipe(**yaml.safe_load(recipe)).record() == json.loads((pruned / "pruning.json").read_text())["recipe"]


@pytest.mark.parametrize("name", [".", "./", "..", "sub/.."])
def test_a_folder_that_is_named_by_where_one_stands(folder, tmp_path, monkeypatch, name):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "model" / ("sub" if name == ".." else ""))
    facts = ModelFacts.of(resolve(name), "0" * 64)
    assert (facts.name, facts.title) == ("model", "model")


def test_a_hub_name_is_the_base_model():
    model = {"name": "owner/model@v1", "fingerprint": "0" * 64, "repository": "owner/model", "commit": "1" * 40}
    text = model_card.card(Pruning(**made_up.pruning(model=model, versions={"uniprune": "1"})))
    assert ModelCard(text).data.base_model == "owner/model"
    assert f"[owner/model](https://huggingface.co/owner/model/tree/{'1' * 40})" in text
    assert "of owner/model@v1 at commit 1111" in text


def test_what_the_head_says_of_licence_and_languages_is_kept(folder, tmp_path):
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder, source)
    head = {"license": "other", "license_name": "llama3.2", "license_link": "https://example.org/LICENSE", "language": ["en"]}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(head | {'tags': ['dense'], 'base_model': 'x/y'})}---\n\nA card.\n")
    recipe = Recipe(sparsity="2:4", metric="magnitude", controller="none", windows=2, length=16)
    uniprune.prune(source, recipe, out)
    written = ModelCard.load(out / "README.md").data.to_dict()
    assert {name: written[name] for name in head} == head
    assert "dense" not in written["tags"]
    assert "base_model" not in written
    model_card.rewrite(out, [])
    assert {name: ModelCard.load(out / "README.md").data.to_dict()[name] for name in head} == head


def test_results_of_what_was_in_the_folder_before_are_refused(folder, tmp_path):
    out, result, asked = tmp_path / "out", tmp_path / "r.json", {"windows": 2, "length": 16}
    recipe = {"metric": "magnitude", "controller": "none", **asked}
    uniprune.prune(folder, Recipe(sparsity=0.5, exclude="down_proj", **recipe), out)
    uniprune.evaluate(out, **asked).write(result)
    assert "token perplexity" in model_card.rewrite(out, [result])
    for other in ({"sparsity": 0.6}, {"sparsity": 0.5, "exclude": "down_proj", "metric": "wanda"}):
        uniprune.prune(folder, Recipe(**recipe | other), out, overwrite=True)
        with pytest.raises(InputError, match=r"was measured before \S+ was pruned by other masks; evaluate the folder again"):
            model_card.rewrite(out, [result])
        assert summarise(read_all([out, result])).pruned[0].reading is None


def test_no_card_says_that_other_weights_are_pruned(folder, tmp_path):
    """Those that training has put into the folder, say."""
    uniprune.prune(str(folder), Recipe(sparsity="2:4", metric="magnitude", controller="none"), tmp_path / "out")
    before = model_card.rewrite(tmp_path / "out", [])
    shutil.copytree(folder, tmp_path / "out", dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
    with pytest.raises(MismatchError, match=r"was not pruned by .*: .* weights that it removes are not 0"):
        model_card.rewrite(tmp_path / "out", [])
    assert (tmp_path / "out" / "README.md").read_text() == before


def test_a_card_says_with_what_it_was_compared(folder, tmp_path):
    asked = {"windows": 2, "length": 16}
    for name in ("out", "other"):
        uniprune.prune(folder, Recipe(sparsity="2:4", metric="magnitude", controller="none", **asked), tmp_path / name)
    for rival, said in ((folder, "(dense)"), (tmp_path / "other", "(other)")):
        result = tmp_path / f"{rival.name}.json"
        uniprune.evaluate(tmp_path / "out", against=rival, **asked).write(result)
        (row,) = [line for line in model_card.rewrite(tmp_path / "out", [result]).splitlines() if "token perplexity" in line]
        assert row.endswith(f" {said} |")


def test_results_are_shown_as_they_are(capsys, monkeypatch, pruned, tmp_path):
    capsys.readouterr()
    result = tmp_path / "result.json"
    code, _, errors = run(capsys, monkeypatch, "evaluate", pruned, *ASKED, "-o", result)
    assert (code, errors) == (0, "")
    code, printed, errors = run(capsys, monkeypatch, "card", pruned, result)
    assert (code, errors) == (0, "")
    assert "README.md: written" in printed
    perplexity = json.loads(result.read_text())["perplexity"]
    written = ModelCard.load(pruned / "README.md")
    assert f"| {perplexity:.2f} |" in written.text
    (found,) = written.data.eval_results
    assert (found.metric_type, found.metric_value) == ("perplexity", round(perplexity, 4))


def test_cards_of_others_are_kept(capsys, monkeypatch, pruned, folder, tmp_path):
    result = tmp_path / "result.json"
    capsys.readouterr()
    run(capsys, monkeypatch, "evaluate", folder, *ASKED, "-o", result)
    code, _, errors = run(capsys, monkeypatch, "card", pruned, result)
    assert code == 2
    assert "not of" in errors
    (pruned / "README.md").write_text("my own words")
    code, _, errors = run(capsys, monkeypatch, "card", pruned)
    assert code == 2
    assert "--overwrite" in errors
    assert (pruned / "README.md").read_text() == "my own words"
    assert run(capsys, monkeypatch, "card", pruned, "--overwrite")[0] == 0
    code, _, errors = run(capsys, monkeypatch, "card", tmp_path)
    assert code == 2
    assert "no pruning.json" in errors


@pytest.mark.parametrize(
    ("repository", "message"),
    [("owner/name", "HF_HUB_OFFLINE"), ("name", "give owner/name"), ("owner/na me", "owner/na me"), ("a/b/c", "a/b/c")],
)
def test_uploads_are_checked_before_the_work(capsys, monkeypatch, folder, tmp_path, repository, message):
    command = ["prune", folder, "-s", "2:4", "-o", tmp_path / "out", "--push-to-hub", repository]
    code, _, errors = run(capsys, monkeypatch, *command)
    assert code == 2
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_an_upload_needs_a_login(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(uniprune.InputError, match="hf auth login"):
        model_card.check_push("owner/name")


def test_models_that_see_images_are_found_by_their_configuration(tmp_path):
    unlike = {"evolla", "mistral4"}  # of proteins, and of text alone: nothing in them is about images
    for model_type, architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        config = CONFIG_MAPPING[model_type]()
        config.architectures = [architecture]
        config.save_pretrained(tmp_path)
        assert model_card.sees_images(tmp_path) == (model_type not in unlike), model_type
    AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert not model_card.sees_images(tmp_path)
