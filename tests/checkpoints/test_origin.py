"""Models on the Hub: its real client against a server on this machine that speaks its API (local_hub.py)."""

import json
import shutil

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

import local_hub
import uniprune
from command import run
from conftest import tiny_model, write_gguf
from uniprune import InputError, Recipe
from uniprune.checkpoints.hub import Address, at_revision, parse
from uniprune.checkpoints.origin import resolve

JUNK = {  # what repositories have beside a model, and nobody needs
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"again",
    "onnx/model.onnx": b"other",
    "onnx/config.json": b"{}",
    "checkpoint-500/optimizer.pt": b"state",
    "modeling.py": b"raise SystemExit",
}


@pytest.fixture
def hub(real_hub):
    return real_hub


def same_files(origin, folder):
    return all((origin.folder / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("owner/name", Address("owner/name")),
        ("gpt2", Address("gpt2")),
        ("owner/name/", Address("owner/name")),
        ("owner/name@v1.0", Address("owner/name", "v1.0")),
        ("gpt2@refs/pr/4", Address("gpt2", "refs/pr/4")),
        ("owner/name@refs/pr/4/sub", Address("owner/name", "refs/pr/4", "sub")),
        ("owner/name@feature%2Fx", Address("owner/name", "feature/x")),
        ("owner/name/step-100/model", Address("owner/name", None, "step-100/model")),
        ("owner/name@main/Q4/a.gguf", Address("owner/name", "main", "Q4/a.gguf")),
        ("owner/name-GGUF/model.Q4_K_M.gguf", Address("owner/name-GGUF", None, "model.Q4_K_M.gguf")),
        ("https://huggingface.co/owner/name", Address("owner/name")),
        ("https://huggingface.co/owner/name/", Address("owner/name")),
        ("https://hf.co/gpt2", Address("gpt2")),
        ("https://huggingface.co/gpt2/tree/main", Address("gpt2", "main")),
        ("https://huggingface.co/owner/name/tree/v1/sub/folder", Address("owner/name", "v1", "sub/folder")),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F4", Address("owner/name", "refs/pr/4")),
        ("https://huggingface.co/owner/name/commit/0a1b", Address("owner/name", "0a1b")),
        ("https://huggingface.co/o/n/resolve/main/a.gguf?download=true", Address("o/n", "main", "a.gguf")),
        ("https://huggingface.co/o/n/blob/main/a.gguf#L1", Address("o/n", "main", "a.gguf")),
        ("hf://owner/name@v1/sub", Address("owner/name", "v1", "sub")),
        ("hf://models/owner/name", Address("owner/name")),
    ],
)
def test_a_name_or_an_address_says_where_a_model_is(text, address):
    assert parse(text) == address
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "./name",
        "../a/b",
        "/a/b",
        "~/a",
        "a/../b",
        "model.gguf",
        "a/model.GGUF",
        "model.safetensors",
        "a/b.upz",
        ".x",
        "-x/y",
        "a//b",
        "a\\b",
        "a/b@",
        "@v1",
    ],
)
def test_what_can_only_be_a_path_is_no_name(text):
    assert parse(text) is None
    with pytest.raises(InputError, match=r"does not exist here, and is not a Hub name of the form owner/name, owner/name@rev"):
        resolve(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("https://huggingface.co/datasets/owner/name", "is the address of no model"),
        ("https://huggingface.co", "is the address of no model"),
        ("https://modelscope.cn/models/owner/name", "is an address, but none of huggingface.co; download it"),
        ("https://huggingface.co/owner/name/discussions/3", "is a page about a model; give the model: owner/name"),
        ("https://huggingface.co/owner/name/tree", "is a page about a model; give the model: owner/name"),
        ("hf://../secret", "is the address of no model"),
    ],
)
def test_addresses_of_other_things_are_refused(text, reason):
    with pytest.raises(InputError, match=reason):
        resolve(text)


def test_a_revision_beside_a_name(folder):
    assert at_revision("owner/name", None) == "owner/name"
    assert at_revision("owner/name/sub", "v1") == "owner/name@v1/sub"
    assert at_revision("gpt2", "feature/x") == "gpt2@feature%2Fx"
    assert at_revision("owner/name@v1", "v1") == "owner/name@v1"
    with pytest.raises(InputError, match="name two revisions; leave one out"):
        at_revision("owner/name@v1", "v2")
    with pytest.raises(InputError, match="is a path here; leave it out"):
        at_revision(str(folder), "v1")


# ------------------------------------------------------------------------------------------------------------- download


def test_a_model_is_downloaded_once_and_nothing_else(hub, folder, monkeypatch):
    sha = hub.add("owner/name", local_hub.files_of(folder) | JUNK).branches["main"]
    origin = resolve("owner/name")
    assert (origin.name, origin.repository, origin.commit) == ("owner/name", "owner/name", sha)
    assert same_files(origin, folder)
    assert {file.name for file in origin.folder.iterdir()} == {file.name for file in folder.iterdir()}
    hub.requests.clear()
    assert resolve("owner/name").folder == origin.folder
    assert not hub.asked("GET", "resolve|large")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    for name in ("owner/name", f"owner/name@{sha}", "https://huggingface.co/owner/name"):
        assert resolve(name).folder == origin.folder
    assert not hub.requests
    assert uniprune.plan("owner/name", Recipe(sparsity="2:4")).fits


def test_a_whole_file_comes_before_an_index(hub, tmp_path, tokenizer):
    """As transformers takes them, so the shards need not be there."""
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    sharded = local_hub.files_of(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    hub.add("owner/name", sharded | local_hub.files_of(tmp_path / "model"))
    origin = resolve("owner/name")
    assert [file.name for file in origin.folder.glob("*.safetensors")] == ["model.safetensors"]
    uniprune.load("owner/name", device="cpu")


def test_the_hub_goes_away(hub, folder, monkeypatch):
    hub.add("owner/name", folder)
    resolve("owner/name")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert same_files(resolve("owner/name"), folder)
    with pytest.raises(InputError, match=r"owner/other does not exist here, and could not be downloaded from .*; try again"):
        resolve("owner/other")


def test_offline_without_a_copy(hub, folder, monkeypatch):
    hub.add("owner/name", folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"nor in the Hub's cache .*, and HF_HUB_OFFLINE is set; unset it"):
        resolve("owner/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert resolve("owner/name").commit


def test_offline_with_a_part_of_a_copy(hub, folder, monkeypatch):
    hub.add("owner/name", folder)
    origin = resolve("owner/name")
    next(origin.folder.glob("*.safetensors")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"is only in part in the Hub's cache .*, and HF_HUB_OFFLINE is set; unset it"):
        resolve("owner/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert same_files(resolve("owner/name"), folder)


def test_revisions(hub, folder, tmp_path):
    repository = hub.add("owner/name", folder)
    first = repository.branches["main"]
    other = local_hub.files_of(folder) | {"README.md": b"---\nlicense: mit\n---\n"}
    second = repository.commit(other)
    repository.tags["v1"] = first
    repository.branches |= {"refs/pr/7": first, "feature/x": first}
    assert resolve("owner/name").commit == second
    for revision in ("v1", first, "refs/pr/7", "feature%2Fx"):
        origin = resolve(f"owner/name@{revision}")
        assert (origin.commit, str(origin)) == (first, f"owner/name@{revision}")
    assert resolve("https://huggingface.co/owner/name/tree/v1").name == "owner/name@v1"
    with pytest.raises(InputError, match="model owner/name has no revision 'v2'; it has main, refs/pr/7, feature/x, v1"):
        resolve("owner/name@v2")


def test_a_name_of_one_word_may_be_an_old_one(hub, folder):
    hub.add("openai-community/small", folder)
    hub.add("small", moved="openai-community/small")
    assert same_files(resolve("small"), folder)


def test_folders_of_a_repository(hub, folder):
    inside = {f"step-100/model/{name}": data for name, data in local_hub.files_of(folder).items()}
    hub.add("owner/steps", inside | {"step-100/model/logs/config.json": b"{}", "README.md": b"", "step-100/a.bin": b""})
    origin = resolve("owner/steps/step-100/model")
    assert same_files(origin, folder)
    assert {file.name for file in origin.folder.iterdir()} == {file.name for file in folder.iterdir()}
    assert uniprune.load("owner/steps/step-100/model", device="cpu").tokenizer is not None
    hub.requests.clear()
    there = "owner/steps/step-100/model, owner/steps/step-100/model/logs"
    with pytest.raises(InputError, match=f"has no config.json, but its folders have; give one: {there}"):
        resolve("owner/steps")
    with pytest.raises(InputError, match=f"owner/steps has no step-200; it has {there}"):
        resolve("owner/steps/step-200")
    with pytest.raises(InputError, match=r"but not a \.gguf one; give the folder it is in: owner/steps@main/step-100/model$"):
        resolve("https://huggingface.co/owner/steps/blob/main/step-100/model/config.json")
    assert not hub.asked("GET", "resolve|large")


def test_a_download_goes_on_where_it_was_cut(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    tiny_model().save_pretrained(tmp_path / "model")
    hub.add("owner/name", tmp_path / "model")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of which whole ones are kept
    hub.cut["model.safetensors"] = 2
    assert same_files(resolve("owner/name"), tmp_path / "model")
    ranges = [headers.get("Range") for verb, path, headers in hub.requests if verb == "GET" and path.startswith("/large/")]
    assert ranges[0] is None
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in ranges[1:]]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1]


def test_what_is_complete_is_not_downloaded_again(hub, folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.small = 1000
    hub.add("owner/name", folder)
    last = sorted(file.name for file in folder.glob("*.safetensors"))[-1]
    hub.cut[last] = 100
    with pytest.raises(InputError, match=r"could not be downloaded from .*; try again: files that are complete are kept"):
        resolve("owner/name")
    had = hub.asked("GET", "large/.*safetensors$")
    assert {path.rpartition("/")[2] for path in had} >= {last}
    hub.cut.clear()
    hub.requests.clear()
    assert same_files(resolve("owner/name"), folder)
    assert not {*had} & {*hub.asked("GET", "large/.*safetensors$")} - {path for path in had if path.endswith(last)}


# ------------------------------------------------------------------------------------------------------------- refusals


def test_gated_and_private_models(hub, folder, monkeypatch):
    hub.add("owner/gated", folder, gated=True)
    hub.add("owner/private", folder, private=True)
    with pytest.raises(InputError, match=f"owner/gated is gated: accept its terms at {hub.url}/owner/gated, then log in"):
        resolve("owner/gated")
    for name in ("owner/private", "owner/nothing", "nothing"):
        with pytest.raises(InputError, match=rf"'{name}' does not exist here, nor on the Hub .*; correct the name, or, if"):
            resolve(name)
    monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    with pytest.raises(InputError, match="does not accept this login; log in"):
        resolve("owner/gated")
    monkeypatch.setenv("HF_TOKEN", local_hub.TOKEN)
    for name in ("owner/gated", "owner/private"):
        assert same_files(resolve(name), folder)


def test_pickled_models_are_told_before_they_are_downloaded(hub, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    files = {name: data for name, data in local_hub.files_of(folder).items() if "safetensors" not in name}
    hub.add("owner/old", files | {"pytorch_model.bin": b"pickled"})
    with pytest.raises(InputError, match=r"owner/old has pickled weights alone \(pytorch_model\.bin\).*convert them"):
        resolve("owner/old")
    assert not hub.asked("GET", "resolve|large")
    model.save_pretrained(tmp_path / "new")
    assert resolve(tmp_path / "new").files.shards


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "is an adapter"),
        ({"README.md": b""}, "has no config.json; give the folder of"),
        ({"config.json": b"{}", "README.md": b""}, "has no weights"),
        ({"config.json": b"{}", "model.fp16.safetensors": b""}, "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_repositories_that_hold_no_checkpoint(hub, files, reason):
    hub.add("owner/name", files)
    with pytest.raises(InputError, match=f"owner/name.* {reason}"):
        resolve("owner/name")
    assert not hub.asked("GET", r"resolve.*safetensors|large")


def test_a_disk_that_is_full(hub, folder, monkeypatch):
    hub.add("owner/name", folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/nowhere")
    with pytest.raises(InputError, match=r"cannot be stored in /proc/nowhere: .*; set HF_HOME to another place"):
        resolve("owner/name")


# ----------------------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture
def gguf(tmp_path, tokenizer):
    return write_gguf(tiny_model(), tokenizer, tmp_path / "gguf" / "model-Q8_0.gguf")


def test_a_gguf_file_of_a_repository(hub, gguf):
    data = gguf.read_bytes()
    files = {"model-Q8_0.gguf": data, "model-F32.GGUF": data, "big/model-F64-00001-of-00002.gguf": b"", "config.json": b"{}"}
    hub.add("owner/name-GGUF", files | {"big/model-F64-00002-of-00002.gguf": b""})
    for name in ("model-Q8_0.gguf", "model-F32.GGUF"):
        origin = resolve(f"owner/name-GGUF/{name}")
        assert (origin.gguf, origin.repository) == (name, "owner/name-GGUF")
        assert origin.path.read_bytes() == data
        assert uniprune.plan(f"owner/name-GGUF/{name}", Recipe(sparsity="2:4")).fits
    assert not hub.asked("GET", "resolve/.*config.json")
    models = ("big/model-F64-00001-of-00002.gguf", "model-F32.GGUF", "model-Q8_0.gguf")
    there = ", ".join(f"owner/name-GGUF/{name}" for name in models)
    with pytest.raises(InputError, match=f"has GGUF files, of which one is a model; give it: {there}"):
        resolve("owner/name-GGUF")
    with pytest.raises(InputError, match=f"owner/name-GGUF has no model-Q2.gguf; it has {there}"):
        resolve("owner/name-GGUF/model-Q2.gguf")


# --------------------------------------------------------------------------------------------------- through the commands


def test_a_model_of_the_hub_from_the_command_line_and_back(hub, folder, tmp_path, capsys, monkeypatch):
    repository = hub.add("owner/name", folder)
    sha = repository.branches["main"]
    repository.tags["v1"] = sha
    repository.commit({"README.md": b"it was moved"})
    monkeypatch.setenv("HF_TOKEN", local_hub.TOKEN)
    out, small = tmp_path / "out", ["--windows", 4, "--length", 32]
    command = ["prune", "owner/name", "--revision", "v1", "-s", "2:4", *small, "-o", out, "--json"]
    code, printed, errors = run(capsys, monkeypatch, *command, "--push-to-hub", "owner/pruned")
    assert code == 0, errors
    result = json.loads(printed)
    assert result["uploaded"] == f"{hub.url}/owner/pruned"
    report = json.loads((out / "pruning.json").read_bytes())
    assert report["model"]["name"] == "owner/name@v1"
    assert (report["model"]["repository"], report["model"]["commit"]) == ("owner/name", sha)
    card = (out / "README.md").read_text()
    assert "base_model: owner/name\n" in card
    assert f"[owner/name](https://huggingface.co/owner/name/tree/{sha})" in card
    assert f"of owner/name@v1 at commit {sha}" in card
    pushed = hub.repositories["owner/pruned"]
    there = pushed.commits[pushed.branches["main"]]
    assert {name: data for name, data in there.items() if name != ".gitattributes"} == local_hub.files_of(out)
    code, printed, errors = run(capsys, monkeypatch, *command, "--resume")
    assert (code, json.loads(printed)["model"]["commit"]) == (0, sha), errors
    code, printed, errors = run(capsys, monkeypatch, "evaluate", "owner/pruned", "--against", "owner/name@v1", *small, "--json")
    assert code == 0, errors
    assert json.loads(printed)["sparsity"] == pytest.approx(0.5)


def test_an_upload_replaces_only_what_it_may(hub, folder, tmp_path, capsys, monkeypatch):
    """Weights that lay there are deleted: transformers would load the whole file, not the new shards."""
    monkeypatch.setenv("HF_TOKEN", local_hub.TOKEN)
    old = {"model.safetensors": b"old", "pytorch_model.bin": b"old", "config.json": b"old", "LICENSE": b"kept"}
    hub.add("owner/pruned", old)
    recipe = Recipe(sparsity="2:4", controller="none", metric="magnitude", windows=2, length=16)
    uniprune.prune(folder, recipe, tmp_path / "out")
    code, _, errors = run(capsys, monkeypatch, "card", tmp_path / "out", "--push-to-hub", "owner/pruned")
    assert code == 2
    assert "--push-to-hub owner/pruned has 4 files; give another name, or --overwrite" in errors
    code, _, errors = run(capsys, monkeypatch, "card", tmp_path / "out", "--push-to-hub", "owner/pruned", "--overwrite")
    assert code == 0, errors
    pushed = hub.repositories["owner/pruned"]
    assert pushed.commits[pushed.branches["main"]] == local_hub.files_of(tmp_path / "out") | {"LICENSE": b"kept"}


def test_an_upload_is_refused_before_the_work(hub, folder, tmp_path, capsys, monkeypatch):
    command = ["prune", folder, "-s", "2:4", "-o", tmp_path / "out", "--push-to-hub"]
    for name, token, reason in (
        ("owner/pruned", None, "needs a login; run `hf auth login`, or set HF_TOKEN"),
        ("pruned", local_hub.TOKEN, "is no repository; give owner/name"),
        ("a/b/c", local_hub.TOKEN, "Repo id must be in the form"),
    ):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        code, _, errors = run(capsys, monkeypatch, *command, name)
        assert code == 2
        assert reason in errors
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_folder(hub, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    command = ["prune", folder, "-s", "2:4", "--windows", 2, "--length", 16, "-o", tmp_path / "out", "--push-to-hub", "owner/p"]
    code, _, errors = run(capsys, monkeypatch, *command, "--controller", "none")
    assert code == 1
    assert f"{tmp_path / 'out'} is complete, but was not uploaded to owner/p" in errors
    monkeypatch.setenv("HF_TOKEN", local_hub.TOKEN)
    code, _, errors = run(capsys, monkeypatch, "card", tmp_path / "out", "--push-to-hub", "owner/p")
    assert code == 0, errors
    assert resolve("owner/p").files.size == resolve(tmp_path / "out").files.size
