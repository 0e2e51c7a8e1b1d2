"""One model spread over several processes, against the same model streamed from disk and against one process.

The processes are started once for many tests; what they found lies in files.
"""

import json
from contextlib import contextmanager

import pytest
import torch

import families
import processes
import uniprune
from conftest import VOCABULARY, Stopped, Stops, tiny_model
from uniprune import Recipe
from uniprune.checkpoints.origin import resolve
from uniprune.common import distributed
from uniprune.controller.descent.loss import Loss
from uniprune.controller.passes.streamed import Streamed
from uniprune.controller.straight_through import StraightThrough
from uniprune.models import loading
from uniprune.models.matrices import find_blocks, find_matrices
from uniprune.models.replay.replay import Replay
from uniprune.models.residency.sharding import Sharder, open_sharded
from uniprune.models.residency.streaming import attached, open_streamed
from uniprune.storage import runs

CPU = torch.device("cpu")
PROCESSES = 2
WINDOWS = 8  # one of which is held out: only one process has a window to judge
MODELS = {
    "tied": {"num_hidden_layers": 5, "tie_word_embeddings": True},
    "untied": {"num_hidden_layers": 5, "tie_word_embeddings": False, "intermediate_size": 65},  # no two share 65 rows
    "gpt2": {},
    "qwen3_moe": {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": 128},
}
WAYS = {
    "local": ("tied", {"controller": "none"}),
    "local, untied": ("untied", {"controller": "none", "sparsity": 0.5}),
    "experts": ("qwen3_moe", {"controller": "none"}),
    "refine": ("tied", {"refine": True}),
    "controller": ("tied", {"steps": 2, "tuning": {"checks": 1}}),
}
LOCAL = [way for way in WAYS if way != "controller"]


def prune(folders, way, output, execution, **more):
    model, changes = WAYS[way]
    recipe = Recipe(**({"sparsity": "2:4", "dtype": "float32", "windows": WINDOWS, "length": 32} | changes))
    return uniprune.prune(str(folders / model), recipe, output, execution=execution, **more)


# ---------------------------------------------------------------------------------------------------- one process of many


def work(folders, out):
    with distributed.joined(CPU):
        order = recorded(Sharder)
        found = {name: parts(folders / name) for name in MODELS}
        found["reports"] = {way: prune(folders, way, out / way, "sharded").record() for way in LOCAL}
        prune(folders, "controller", out / "streamed", "streamed")
        found["begun"] = interrupted(folders, out / "sharded")
        (out / f"found-{distributed.rank()}.json").write_text(json.dumps(found | {"order": order}))


def recorded(kind):
    """The blocks that are entered from now on."""
    order, enter = [], kind.__call__

    def entered(self, index):
        order.append(index)
        return enter(self, index)

    kind.__call__ = entered
    return order


def parts(folder):
    """What this process holds between the blocks' turns, and whether parameters are right in them, and dropped after them."""
    origin = resolve(folder)
    loaded, streamed = (kind(origin, None, torch.float32, CPU) for kind in (open_sharded, open_streamed))
    prefix, blocks = find_blocks(loaded.model)
    matrices = attached(find_matrices(loaded.model), loaded.residency)
    right = []
    for _ in range(2):
        for index, block in enumerate(blocks):
            with loaded.residency(index), streamed.residency(index):
                expected = dict(find_blocks(streamed.model)[1][index].named_parameters())
                inside = dict(block.named_parameters())
                right += [type(p) is torch.nn.Parameter and torch.equal(p, expected[name]) for name, p in inside.items()]
            right += [p.untyped_storage().size() == 0 for p in inside.values()]
    right += [torch.equal(m.stored, streamed.residency.read_matrix(name)) for name, m in matrices.items()]
    held = {f"{prefix}.{name}": list(p.to_local().shape) for name, p in blocks.named_parameters()}
    return {"right": all(right), "held": held, "bytes": sum(p.to_local().untyped_storage().size() for p in blocks.parameters())}


def interrupted(folders, output):
    """How a run was executed that was stopped half way; it is then taken up again, as it began."""
    try:
        prune(folders, "controller", output, "sharded", progress=Stops(1))
    except Stopped:
        begun = runs.identity_of(output)
        distributed.barrier()
        prune(folders, "controller", output, None, resume=True)
    return begun["execution"]


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models")
    for name, changes in MODELS.items():
        make = families.tiny if name == "qwen3_moe" else tiny_model
        model = make(name if name in families.FAMILIES else "llama", **changes)
        model.save_pretrained(path / name, max_shard_size="50KB")
        tokenizer.save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def out(folders, tmp_path_factory):
    """What the processes wrote."""
    path = tmp_path_factory.mktemp("out")
    for done in processes.together(PROCESSES, work, folders, path):
        assert done.code == 0, done.err
    return path


def found_by(out, rank):
    return json.loads((out / f"found-{rank}.json").read_text())


def masks(output):
    return uniprune.artefacts.masks.MasksFile(output / "pruning" / "masks.safetensors")


def assert_same(one, other):
    one, other = masks(one), masks(other)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", MODELS)
def test_each_process_holds_its_part_of_the_blocks(out, folders, name):
    """Half of the rows of each parameter and nothing else; a block is whole in its turn, and dropped after it."""
    prefix, blocks = find_blocks(loading.load(folders / name, "float32", "cpu").model)
    padded = sum(parameter.chunk(PROCESSES)[0].nbytes for parameter in blocks.parameters())
    for rank in range(PROCESSES):
        found = found_by(out, rank)[name]
        shapes = {f"{prefix}.{inner}": list(p.chunk(PROCESSES)[rank].shape) for inner, p in blocks.named_parameters()}
        assert found == {"right": True, "held": shapes, "bytes": padded}


@pytest.mark.parametrize("way", LOCAL)
def test_local_masks_are_those_of_one_process(out, folders, tmp_path, way):
    prune(folders, way, tmp_path / "one", "resident")
    assert_same(out / way, tmp_path / "one")


@pytest.mark.parametrize("way", LOCAL)
def test_every_process_returns_the_report(out, way):
    for rank in range(PROCESSES):
        assert found_by(out, rank)["reports"][way] == json.loads((out / way / "pruning.json").read_text())


def test_the_controller_finds_the_masks_of_streaming_processes(out):
    """Bit for bit, interrupted or not: the arithmetic is the same, only the weights come from elsewhere."""
    assert found_by(out, 0)["begun"] == "sharded"
    assert_same(out / "sharded", out / "streamed")
    assert not list(out.glob(".*"))


def test_all_processes_enter_the_same_blocks(out):
    """Blocks of one size would otherwise be taken for each other, and no error said so."""
    order, *others = (found_by(out, rank)["order"] for rank in range(PROCESSES))
    assert len(order) > 50
    assert all(other == order for other in others)


def test_a_process_without_windows_runs_all_blocks(folders):
    """It has its part of the weights, which the others need."""
    loaded = open_streamed(resolve(folders / "tied"), None, torch.float32, CPU)
    entered = []

    @contextmanager
    def residency(index):
        entered.append(index)
        with loaded.residency(index):
            yield

    blocks = find_blocks(loaded.model)[1]
    network = StraightThrough(attached(find_matrices(loaded.model), loaded.residency))
    ids = torch.randint(0, VOCABULARY, (2, 16))
    passes = Streamed(loaded.model, Replay.probed(loaded.model, blocks, ids, residency), network)
    loss, up = Loss(passes.head(ids)), list(range(len(blocks)))
    with network, network.training({}, lambda name, gradient: None):
        for mine in (ids, ids[:0]):
            entered.clear()
            student, teacher = passes.forward(mine)
            kl, gradient = loss.gradient(student, teacher, mine)
            passes.backward(gradient)
            assert (kl >= 0, entered) == (True, up + up[::-1])
            entered.clear()
            for batch in passes.in_batches(mine, 1024):
                loss.kl(*passes.infer(batch), batch)
            assert entered == up
