"""Every command and execution on a device that is not the CPU: nothing is mixed, results are the CPU's, and what a step has a
GPU do is counted. The device is a pretended one (``pretend``), so that this needs no GPU."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import pretend
import uniprune
from conftest import VOCABULARY, tiny_model
from small_models import save
from uniprune import Recipe
from uniprune.artefacts.masks import MasksFile
from uniprune.checkpoints.origin import resolve
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.models import loading
from uniprune.models.loading import load_weights
from uniprune.models.matrices import find_matrices
from uniprune.models.residency.streaming import attached, open_streamed
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Wanda
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured

SMALL = {"windows": 8, "length": 32, "dtype": "float32"}
STEPS = {"tuning": {"batch_tokens": 64, "checks": 1}, "steps": 3}
LOCAL = {
    "wanda 2:4": {"sparsity": "2:4", "controller": "none"},
    "by row": {"sparsity": "0.5", "controller": "none"},
    "by matrix": {"sparsity": "0.5", "scope": "matrix", "controller": "none"},
    "by model": {"sparsity": "0.5", "scope": "model", "controller": "none"},
    "tiles": {"sparsity": "0.5@16x16", "controller": "none"},
    "magnitude": {"sparsity": "0.5", "metric": "magnitude", "controller": "none"},
    "stochria": {"sparsity": "2:4", "metric": "stochria", "controller": "none"},
    "rules": {"sparsity": "0.5", "rules": ("down_proj=dense", "q_proj=0.2..0.4"), "scope": "model", "controller": "none"},
    "allow": {"sparsity": "0.4", "allow": "2:4,dense", "controller": "none"},
    "sequential": {"sparsity": "2:4", "sequential": True},
    "refine": {"sparsity": "2:4", "refine": True},
    "refine by row": {"sparsity": "0.5", "refine": True},
}
CORRECTED = {
    "controller 2:4": {"sparsity": "2:4"},
    "controller by row": {"sparsity": "0.5", "scope": "row"},
    "controller by model": {"sparsity": "0.5"},
    "loud": {"sparsity": "2:4", "tuning": {"batch_tokens": 64, "labels": 0.5}},
}
CASES = [
    *((name, changes, "resident") for name, changes in LOCAL.items()),
    *((name, LOCAL[name], "streamed") for name in ("wanda 2:4", "by model", "sequential", "refine")),
    *(
        (name, STEPS | changes, execution)
        for name, changes in CORRECTED.items()
        for execution in ("resident", "recomputed", "offloaded", "streamed")
    ),
    ("unipruning", {"sparsity": "2:4", "controller": "unipruning", "steps": 2}, "resident"),
]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The device is one of those that the package supports."""
    monkeypatch.setattr(loading, "KINDS", (*loading.KINDS, pretend.NAME))


@pytest.fixture(scope="module")
def on_cpu(folder, tmp_path_factory):
    """The masks that a CPU makes, of each case once; the executions make the same."""
    made, place = {}, tmp_path_factory.mktemp("cpu")

    def masks(name, changes):
        if name not in made:
            with pretend.attention():
                uniprune.prune(str(folder), Recipe(**SMALL, **changes), place / str(len(made)), device="cpu")
            made[name] = MasksFile(place / str(len(made)) / "pruning/masks.safetensors")
        return made[name]

    return masks


@pytest.mark.parametrize(("name", "changes", "execution"), CASES, ids=[f"{name}, {way}" for name, _, way in CASES])
def test_masks_are_those_of_the_cpu(folder, tmp_path, on_cpu, name, changes, execution):
    expected = on_cpu(name, changes)
    with pretend.device() as counts:
        recipe = Recipe(**SMALL, **changes)
        uniprune.prune(str(folder), recipe, tmp_path / "out", device="pretend:0", execution=execution)
    assert counts.launches
    found = MasksFile(tmp_path / "out" / "pruning/masks.safetensors")
    differ = sum(int((found[one] != expected[one]).sum()) for one in expected)
    assert differ <= (0 if execution != "streamed" else 2)  # parts of a step are summed in another order


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "deepseek_v3, fused"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_weights_go_to_the_device_one_by_one(tmp_path, monkeypatch, family, dtype):
    """And are what transformers loads, on the CPU; each once, though it has several names."""
    save(family, tmp_path)
    origin = resolve(tmp_path)
    expected = load_weights(origin, dtype, torch.device("cpu"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pretend.device() as counts:
        found = load_weights(origin, dtype, pretend.DEVICE)
        up = counts.up
        assert found.state_dict().keys() == expected.state_dict().keys()
        for name, tensor in found.state_dict().items():
            assert (tensor.device, tensor.dtype) == (pretend.DEVICE, expected.state_dict()[name].dtype)
            assert torch.equal(tensor.cpu(), expected.state_dict()[name])
    assert found.generation_config == expected.generation_config
    stored = sum(4 * tensor.numel() for tensor in (*found.parameters(), *found.buffers()))
    assert up < 1.01 * stored + 1000


def test_other_commands(folder, tmp_path):
    """Scores, perplexity, closeness of two models, answers, a curve, a permuted model: as on the CPU."""
    text = {"windows": 2, "length": 32}
    recipe = Recipe(sparsity="2:4", controller="none", **SMALL)
    results = {}
    for device in ("cpu", "pretend:0"):
        place = tmp_path / device.partition(":")[0]
        with pretend.device() if device != "cpu" else pretend.attention():
            uniprune.calibrate(str(folder), recipe, place / "scores.safetensors", device=device)
            uniprune.permute(str(folder), recipe, place / "permuted", device=device)
            result = uniprune.evaluate(str(folder), against=str(folder), device=device, dtype="float32", **text)
        results[device] = (
            result.perplexity,
            (place / "scores.safetensors").read_bytes(),
            *(file.read_bytes() for file in sorted((place / "permuted").glob("*.safetensors"))),
        )
    cpu, device = results.values()
    assert device[0] == pytest.approx(cpu[0], rel=1e-5)
    assert device[1:] == cpu[1:]


def on_both(work):
    """What ``work(device)`` gives on the CPU, and on the device."""
    with pretend.attention():
        expected = work("cpu")
    with pretend.device():
        return expected, work("pretend:0")


@pytest.mark.parametrize(
    "methods", [("magnitude", "wanda", "sequential", "refine", "sparsegpt"), ("fisher", "feedback", "any")]
)
def test_tables_of_methods(folder, tmp_path, methods):
    def work(device):
        read = {"windows": 8, "length": 16, "eval_windows": 2, "eval_length": 16, "dtype": "float32"}
        sparsities = ("0.5",) if "fisher" in methods else ("2:4",)
        table = uniprune.compare(str(folder), tmp_path / device, methods=methods, sparsities=sparsities, device=device, **read)
        return [row.perplexity for row in table.rows]

    expected, found = on_both(work)
    assert len(found) == 1 + len(methods)
    assert found == pytest.approx(expected, rel=1e-4)


def test_curves_of_several_texts(folder, tmp_path):
    texts = [str(tmp_path / name) for name in ("one.txt", "two.txt")]
    for text, sentence in zip(texts, ("One two three four. ", "A cat sat on a mat, and ran. "), strict=True):
        Path(text).write_text(sentence * 100)
    recipe = Recipe(sparsity="2:4", controller="none", **SMALL)
    scores = tmp_path / "scores.safetensors"
    uniprune.calibrate(str(folder), recipe, scores, device="cpu")

    def work(device):
        read = {"text_source": texts, "windows": 2, "length": 16, "dtype": "float32"}
        curve = uniprune.sweep(str(folder), scores, tmp_path / f"{device}.json", "0.5,2:4", device=device, **read)
        return [(row.perplexity, *(text.kl for text in row.by_text.values())) for row in curve.rows]

    expected, found = on_both(work)
    assert found == [pytest.approx(row, rel=1e-3) for row in expected]


@pytest.mark.parametrize("asked", [{"rolling": True, "length": 32}, {"stride": 8, "windows": 2, "length": 32}], ids=str)
def test_ways_to_evaluate(folder, asked):
    expected, found = on_both(lambda device: uniprune.evaluate(str(folder), device=device, dtype="float32", **asked))
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert found.tokens == expected.tokens


def test_continuations_of_two_models(folder):
    def work(device):
        asked = {"prompts": ["Once"], "new_tokens": 4, "dtype": "float32"}
        return uniprune.evaluate(str(folder), against=str(folder), device=device, **asked)

    expected, found = on_both(work)
    assert found.generations == expected.generations != []


def counted(target, execution, tmp_path, layers=2):
    """What the last of a few steps has the device do, for each matrix; and the weights of a matrix."""
    tokens = torch.randint(0, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(0))
    model, seen = tiny_model(num_hidden_layers=layers), []
    with pretend.device() as counts:
        if execution == "streamed":
            model.save_pretrained(tmp_path / str(layers))
            loaded = open_streamed(resolve(tmp_path / str(layers)), None, torch.float32, pretend.DEVICE)
            matrices = attached(find_matrices(loaded.model), loaded.residency)
            calibration = Calibration(loaded.model, matrices, tokens, loaded.residency)
        else:
            model = model.to(pretend.DEVICE)
            kept = {"recompute": execution != "resident", "offload": execution == "offloaded"}
            matrices = find_matrices(model)
            calibration = Calibration(model, matrices, tokens, **kept)

        class Steps:
            def __call__(self, items, label, total):
                for item in items:
                    self.before = counts.snapshot()
                    yield item

            def note(self, text, tokens=0):
                seen.append(counts.since(self.before))

        settings = MirrorDescent(batch_tokens=32, checks=1)
        settings.calibrate(Calibration(**(vars(calibration) | {"progress": Steps()})), Wanda(), [target], 4)
    return seen[3], len(matrices), sum(matrix.size for matrix in matrices.values())


TARGETS = [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "model")]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("execution", ["resident", "recomputed"])
def test_a_step_of_a_model_in_memory(target, execution, tmp_path):
    """A matrix costs a few kernels and no wait; what a whole step waits for does not depend on how many there are."""
    found, matrices, _ = counted(target, execution, tmp_path)
    deeper, more, _ = counted(target, execution, tmp_path, layers=3)
    assert deeper["syncs"] == found["syncs"] <= 16
    assert (deeper["up"], deeper["down"]) == (found["up"], found["down"])
    assert found["up"] + found["down"] < 100_000
    cut, kernels = {"2:4": 3, "0.5 by row": 12, "0.5 by model": 3}[str(target)], (deeper["launches"] - found["launches"])
    assert kernels / (more - matrices) < (34 if execution == "resident" else 45) + cut


def test_a_step_with_states_in_host_memory(tmp_path):
    """Up: all, and so down. Masks of this step and the next one wait as bits, on the device."""
    found, matrices, weights = counted(NM(2, 4), "offloaded", tmp_path)
    assert found["up"] == pytest.approx(6 * weights, rel=0.01)
    assert found["down"] == pytest.approx(6 * weights, rel=0.01)
    assert found["syncs"] < 16 + 4 * matrices  # each state is four copies


def test_a_step_of_a_model_on_disk(tmp_path):
    """Weights twice, states as above, masks as bits down and up; hidden states on top."""
    found, matrices, weights = counted(NM(2, 4), "streamed", tmp_path)
    deeper, more, others = counted(NM(2, 4), "streamed", tmp_path, layers=3)
    up, down = (deeper[way] - found[way] for way in ("up", "down"))
    hidden = 32 * 32 * 4 * (more - matrices) / 7  # of one block, for each of those that are more
    assert 14 * (others - weights) < up < 14.3 * (others - weights) + 8 * hidden
    assert 6 * (others - weights) < down < 6.3 * (others - weights) + 8 * hidden


def test_the_script_for_a_card(capsys, monkeypatch):
    """`make gpu`: skipped with the reason where there is none; and all that it measures can be measured."""
    import gpu

    if not torch.cuda.is_available():
        gpu.main([])
        assert capsys.readouterr().out.startswith("skipped: no card here")
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "TARGETS", gpu.TARGETS[:2])
    monkeypatch.setattr(gpu, "save", None)  # only a card's figures are written
    with pretend.device():
        for part in gpu.PARTS:
            gpu.main([part, "--device", "pretend:0", "--size", "tiny"])
    said = capsys.readouterr().out
    assert "'run': 'controller, 2:4', 'differing': 0.0, 'repeated': 0.0" in said
    assert said.count("'kernel': ") == 4
    assert said.count("'execution': ") == 3
