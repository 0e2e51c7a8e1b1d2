"""Results that can be reproduced, and what is said when they cannot."""

import json

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import uniprune
from command import run
from conftest import tiny_model
from small_models import tiny
from task_rows import ROWS
from uniprune import Loaded, Recipe
from uniprune.data.windows import Windows, save_windows
from uniprune.evaluation.reproduce import differences, weights_sha256

ASKED = ("--text", "builtin", "--windows", 2, "--length", 32)


@pytest.fixture
def result(capsys, monkeypatch, folder, tmp_path):
    """A result of two models beside each other, and the command's output folder."""
    uniprune.prune(str(folder), Recipe(sparsity="2:4", windows=2, length=32, controller="none"), tmp_path / "pruned")
    capsys.readouterr()
    path = tmp_path / "result.json"
    command = ["evaluate", tmp_path / "pruned", *ASKED, "--against", folder, "--new-tokens", 4, "-o", path]
    code, printed, errors = run(capsys, monkeypatch, *command)
    assert (code, errors) == (0, "")
    assert "nats per token" in printed
    return path


def test_a_result_is_reproduced_to_the_last_bit(capsys, monkeypatch, result):
    code, printed, _ = run(capsys, monkeypatch, "evaluate", "--check", result)
    assert code == 0
    assert "result.json: reproduced" in printed
    found = json.loads(run(capsys, monkeypatch, "evaluate", "--check", result, "--json")[1])
    assert found["reproduced"]
    assert found["same_machine"]
    assert found["differences"] == []


def test_results_of_tasks_may_say_how_a_text_would_have_been_read(capsys, monkeypatch, folder, tmp_path):
    """Earlier versions recorded such settings and made nothing of them."""
    (tmp_path / "arc.jsonl").write_text(json.dumps(ROWS["arc"]) + "\n")
    path = tmp_path / "result.json"
    assert run(capsys, monkeypatch, "evaluate", folder, "--tasks", tmp_path / "arc.jsonl", "-o", path)[0] == 0
    result = json.loads(path.read_text())
    result["protocol"]["request"] |= {"length": 64, "windows": 2}
    path.write_text(json.dumps(result))
    assert run(capsys, monkeypatch, "evaluate", "--check", path)[0] == 0


def test_another_processor_is_a_machine_of_another_kind(capsys, monkeypatch, result):
    """Seen: two makers' processors with AVX-512, and perplexities that differ in the eighth digit."""
    recorded = json.loads(result.read_text())
    recorded["perplexity"] *= 1 + 1e-8
    result.write_text(json.dumps(recorded))
    assert run(capsys, monkeypatch, "evaluate", "--check", result)[0] != 0
    monkeypatch.setattr("uniprune.evaluation.reproduce._processor", lambda: "another of the same capability")
    code, printed, _ = run(capsys, monkeypatch, "evaluate", "--check", result)
    assert code == 0
    assert "on a machine of another kind" in printed


def test_a_changed_value_is_named(capsys, monkeypatch, result):
    recorded = json.loads(result.read_text())
    recorded["closeness"]["kl"] *= 1 + 1e-12
    recorded["generations"][0]["model"] += "!"
    result.write_text(json.dumps(recorded))
    code, printed, _ = run(capsys, monkeypatch, "evaluate", "--check", result)
    assert code == 1
    assert "NOT reproduced" in printed
    assert "closeness.kl" in printed
    assert "generations[0].model" in printed


def test_other_weights_are_named(capsys, monkeypatch, result, folder):
    code, printed, _ = run(capsys, monkeypatch, "evaluate", folder, "--check", result)
    assert code == 1
    assert "protocol.weights_sha256" in printed


def test_another_kind_of_machine_may_differ_a_little(capsys, monkeypatch, result):
    recorded = json.loads(result.read_text())
    recorded["protocol"]["machine"]["kind"] = "another"
    recorded["perplexity"] *= 1.001
    result.write_text(json.dumps(recorded))
    code, printed, _ = run(capsys, monkeypatch, "evaluate", "--check", result)
    assert code == 0
    assert "another kind" in printed
    recorded["perplexity"] *= 1.1
    result.write_text(json.dumps(recorded))
    assert run(capsys, monkeypatch, "evaluate", "--check", result)[0] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ("{}", "no result of uniprune evaluate"),
        ('{"protocol": {"request": {"windows": "many"}}}', "not written by this version"),
        ('{"protocol": {"request": {"shell": "rm"}}}', "not written by this version"),
        ('{"protocol": {"request": {}}}', "names no model"),
    ],
)
def test_what_is_no_result(capsys, monkeypatch, tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    code, _, errors = run(capsys, monkeypatch, "evaluate", "--check", path)
    assert code == 2
    assert message in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "none.json"], "does not exist"),
        (["model", "--check", "none.json", "--windows", 3], "--check re-runs the evaluation that RESULT records"),
        ([], "MODEL is missing"),
        (["model", "-o", "result.txt"], "end in .json"),
    ],
)
def test_bad_requests(capsys, monkeypatch, arguments, message):
    code, _, errors = run(capsys, monkeypatch, "evaluate", *arguments)
    assert code == 2
    assert message in errors


def test_results_are_not_overwritten(capsys, monkeypatch, folder, result):
    before = result.read_bytes()
    command = ["evaluate", folder, *ASKED, "-o", result]
    code, _, errors = run(capsys, monkeypatch, *command)
    assert code == 2
    assert "--overwrite" in errors
    assert result.read_bytes() == before
    assert run(capsys, monkeypatch, *command, "--overwrite")[0] == 0
    assert result.read_bytes() != before


def test_one_bit_of_any_parameter_changes_the_hash():
    model, other = tiny_model(), tiny_model()
    assert weights_sha256(model) == weights_sha256(other)
    other.model.norm.weight.view(torch.int32)[3] ^= 1
    assert weights_sha256(model) != weights_sha256(other)


def test_so_does_one_of_a_buffer_that_a_checkpoint_has():
    """The biases of routers are buffers; rotary frequencies follow from the configuration."""
    model, other = tiny("deepseek_v3"), tiny("deepseek_v3")
    next(buffer for name, buffer in other.named_buffers() if name.endswith("inv_freq")).mul_(1 + 1e-6)
    assert weights_sha256(model) == weights_sha256(other)
    next(buffer for name, buffer in other.named_buffers() if name.endswith("e_score_correction_bias")).add_(1e-3)
    assert weights_sha256(model) != weights_sha256(other)


def test_so_does_one_of_what_a_quantised_parameter_is_made_of():
    """torchao's parameters have no bits of their own, but codes and scales; here two matrices."""
    model = tiny_model()
    plain, norm = weights_sha256(model), model.model.norm

    def made_of(*parts):
        norm.weight = torch.nn.Parameter(TwoTensor(*parts), requires_grad=False)
        return weights_sha256(model)

    codes, scales = torch.arange(32.0), torch.ones(32)
    assert len({plain, made_of(codes, scales), made_of(codes, scales + 1), made_of(codes + 1, scales)}) == 4
    assert made_of(codes, scales) == made_of(codes.clone(), scales.clone())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_an_accelerated_model_has_the_hash_of_its_weights(tmp_path, family):
    tokens = tmp_path / "tokens.safetensors"
    save_windows(Windows(torch.arange(64).reshape(4, 16), "made up", 4, "none"), tokens)
    model, other = tiny_model(family), tiny_model(family)
    for one, sparsity in ((model, "0.5"), (other, "2:4")):
        uniprune.prune_in_place(Loaded(one), Recipe(sparsity=sparsity, text=str(tokens), controller="none"))
    plain = [weights_sha256(one) for one in (model, other)]
    assert plain[0] != plain[1]
    assert [weights_sha256(uniprune.accelerate(one)) for one in (model, other)] == plain


def test_differences_are_leaf_by_leaf():
    before = {"a": [1, {"b": 2.0}], "c": float("nan"), "versions": {"x": 1}, "only": 1}
    after = {"a": [1, {"b": 2.001}], "c": float("nan"), "versions": {"x": 2}, "new": None}
    assert [(d.what, d.within) for d in differences(before, after)] == [("a[1].b", True), ("only", False)]


def test_a_result_without_the_other_models_numbers_can_be_checked():
    """Earlier versions measured and dropped them."""
    before = {"lm_eval": {"arc": {"acc": 0.5}}, "lm_eval_reference": {}}
    after = before | {"lm_eval_reference": {"arc": {"acc": 0.6}}}
    assert differences(before, after) == []
    assert [d.what for d in differences(after, after | {"lm_eval_reference": {}})] == ["lm_eval_reference.arc.acc"]
