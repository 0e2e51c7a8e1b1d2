"""Any input: a catalogue of broken, absurd and malicious ones, each given to the command line as a user would.

Every case must end with one line on stderr that says what is wrong and where, exit code 2, no traceback, and a folder that is,
byte for byte, what it was.
"""

import json
import os
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_model
from uniprune.artefacts.mask_conversion import export_masks
from uniprune.cli import main

SECONDS = 20  # no case takes one; a read that never ends is ended here
SMALL = "--windows 2 --length 32"
PRUNE = f"prune model -s 2:4 {SMALL} -o out"
SINGLE = f"prune single -s 2:4 {SMALL} -o out"
MASK = "mask scores.safetensors -s 2:4 -o out.safetensors"
VERIFY = "masks verify masks.safetensors"
APPLY = "apply single masks.safetensors -o out"
UNPACK = "unpack packed.upz -o out"
IMPORT = "masks import plain.npz --model single -o out.safetensors"
RECIPE = f"prune single --config recipe.yaml {SMALL} -o out"
TOKENS = "prune single -s 2:4 --text tokens.safetensors -o out"
TEXT = f"prune single -s 2:4 --text text.txt {SMALL} -o out"
LINES = f"prune single -s 2:4 --text text.jsonl {SMALL} -o out"
EVALUATE = "evaluate single --windows 2 --length 32"
TASKS = "evaluate single --tasks task.jsonl"
WEIGHTS = "single/model.safetensors"
INDEX = "model/model.safetensors.index.json"
MATRIX = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="session")
def world(tmp_path_factory, folder):
    """One valid file of every kind. Cases damage copies."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(folder, root / "model")
    tiny_model().to(torch.bfloat16).save_pretrained(root / "single")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, root / "single")
    (root / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    (root / "text.jsonl").write_text('{"text": "%s"}\n' % ("All the world's a stage. " * 40))
    (root / "task.jsonl").write_text('{"goal": "to see", "sol1": "look", "sol2": "sleep", "label": 0}\n')
    (root / "recipe.yaml").write_text("sparsity: 2:4\n")
    here = Path.cwd()
    os.chdir(root)
    try:
        for command in (
            f"prune single -s 2:4 --controller none {SMALL} --save-tokens tokens.safetensors -o pruned",
            f"calibrate single --metric wanda --controller none {SMALL} -o scores.safetensors",
            "pack pruned -o packed.upz",
        ):
            assert call(command) == 0
        shutil.copy("pruned/pruning/masks.safetensors", "masks.safetensors")
        export_masks(Path("masks.safetensors"), Path("plain.safetensors"))
        np.savez("plain.npz", **{key: tensor.numpy() for key, tensor in load_file("plain.safetensors").items()})
    finally:
        os.chdir(here)
    return root


def call(command, argv=None):
    """The exit code of a command line in this process."""
    argv, sys.argv = sys.argv, ["uniprune", *(argv or command.split())]
    try:
        main.main()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv


def snapshot(root):
    """Everything below a folder: kind, mode, content."""
    found = {}
    for path in sorted(root.rglob("*")):
        about = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(about.st_mode) else None
        found[str(path.relative_to(root))] = about.st_mode, content
    return found


# -------------------------------------------------------------------------------------------------------------- damages
# Each returns what does the damage in the current folder.


def write(path, content):
    def damage():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def remove(*patterns):
    def damage():
        found = [path for pattern in patterns for path in Path().glob(pattern)]
        assert found
        for path in found:
            path.unlink()

    return damage


def cut(path, keep):
    """Leaves a fraction of a file."""
    return lambda: os.truncate(path, int(keep * os.path.getsize(path)))


def flip(path, position, bits=0xFF):
    def damage():
        content = bytearray(Path(path).read_bytes())
        content[position] ^= bits
        Path(path).write_bytes(content)

    return damage


def edit(path, change):
    """Changes a JSON file; ``change`` gets the object."""

    def damage():
        content = json.loads(Path(path).read_text())
        change(content)
        Path(path).write_text(json.dumps(content))

    return damage


def config(**values):
    return edit("single/config.json", lambda content: content.update(values))


def without(key, path="single/config.json"):
    return edit(path, lambda content: content.pop(key))


def header(path, change, length=None):
    """Changes a safetensors header: ``change`` gets the object, or its text and returns text. length: what it claims to be."""

    def damage():
        content = Path(path).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        text = content[8 : 8 + size].decode()
        if isinstance(change, str):
            text = change
        else:
            parsed = json.loads(text)
            changed = change(text if change is doubled else parsed)
            text = changed if isinstance(changed, str) else json.dumps(parsed)
        encoded = text.encode()
        Path(path).write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + content[8 + size :])

    return damage


def facts(path, change):
    """Changes what an artefact of ours says of itself."""

    def inside(parsed):
        said = json.loads(parsed["__metadata__"]["uniprune"])
        parsed["__metadata__"]["uniprune"] = json.dumps(change(said) or said)

    return header(path, inside)


def tensors(path, change):
    """Saves a safetensors file again with other tensors and the same metadata."""

    def damage():
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = file.metadata()
        found = load_file(path)
        change(found)
        save_file(found, path, metadata=about)

    return damage


def put(name, value):
    """Sets a tensor, or some of its entries."""

    def change(found):
        found[name] = value(found[name]) if callable(value) else value

    return change


def fill(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[3] = value
    return tensor


def doubled(text):
    """The first entry of a JSON object a second time."""
    name = next(name for name in json.loads(text) if name != "__metadata__")
    return text.rstrip()[:-1] + f', "{name}": {json.dumps(json.loads(text)[name])}}}'


def pipe(path):
    def damage():
        Path(path).unlink(missing_ok=True)
        os.mkfifo(path)

    return damage


def link(path, target):
    def damage():
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink(missing_ok=True)
        place.symlink_to(target)

    return damage


def both(*damages):
    return lambda: [damage() for damage in damages]


def npz(**arrays):
    return lambda: np.savez("plain.npz", **arrays)


def lying_npz():
    """An array whose header declares 2**60 bytes."""
    import io
    import zipfile

    with np.load("plain.npz") as file:
        name = file.files[0]
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (1 << 30, 1 << 30)})
    with zipfile.ZipFile("plain.npz", "w") as archive:
        archive.writestr(f"{name}.npy", head.getvalue() + b"\0" * 64)


def index_of(change):
    """Changes an archive's index, and makes its header agree with it."""

    def damage():
        import hashlib

        from uniprune.artefacts.archive import FORMAT, HEADER, MAGIC

        content = Path("packed.upz").read_bytes()
        _, _, offset, size, _ = HEADER.unpack(content[: HEADER.size])
        index = json.loads(content[offset : offset + size])
        change(index["files"])
        text = json.dumps(index).encode()
        head = HEADER.pack(MAGIC, FORMAT, offset, len(text), hashlib.sha256(text).digest())
        Path("packed.upz").write_bytes(head + content[HEADER.size : offset] + text)

    return damage


def named(name, number=0):
    return index_of(lambda files: files[number].update(path=name))


def deep(depth=100_000):
    return "[" * depth + "]" * depth


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)

# ------------------------------------------------------------------------------------------------------------ the table
# name: damage (None: none), command, what the line says

CASES = {
    # arguments
    "sparsity is not a number": (None, PRUNE.replace("2:4", "nan"), "sparsity nan"),
    "sparsity is infinite": (None, PRUNE.replace("2:4", "inf"), "sparsity inf"),
    "sparsity is negative": (None, PRUNE.replace("-s 2:4", "--sparsity=-0.5"), "sparsity -0.5 is not between 0 and 1"),
    "sparsity above one": (None, PRUNE.replace("2:4", "1.5"), "sparsity 1.5 is not between 0 and 1"),
    "groups of nothing": (None, PRUNE.replace("2:4", "2:0"), "2:0"),
    "more kept than there are": (None, PRUNE.replace("2:4", "5:4"), "5:4"),
    "a group of absurd size": (None, PRUNE.replace("2:4", "1:999999999"), "not divisible"),
    "a group that is no number of inputs": (None, PRUNE.replace("2:4", "1:99999999999999999999"), "is neither"),
    "tiles of nothing": (None, PRUNE.replace("2:4", "0.5@0x4"), "0x4"),
    "sparsity is a word": (None, PRUNE.replace("2:4", "half"), "'half' is neither"),
    "an exponent of a metric is not a number": (None, f"{PRUNE} --metric ria:a=nan", "a = nan"),
    "an exponent of a metric is infinite": (None, f"{PRUNE} --metric ria:a=inf", "a = inf"),
    "an unknown metric": (None, f"{PRUNE} --metric wnada", "use one of magnitude, wanda"),
    "an unknown dtype": (None, "evaluate model --dtype int4", "dtype 'int4'"),
    "an unknown device": (None, f"{PRUNE} --device meta", "device 'meta'"),
    "windows are no number": (None, "prune model -s 2:4 -o out --windows many", "--windows"),
    "a negative seed": (None, f"{PRUNE} --seed=-1", "seed"),
    "an absurd number of windows": (None, "prune model -s 2:4 -o out --windows 999999999999 --length 32", "999999999999"),
    "an absurd length": (None, "prune model -s 2:4 -o out --windows 2 --length 999999999999", "999999999999"),
    "one-token windows": (None, "prune model -s 2:4 -o out --windows 2 --length 1", "length"),
    "memory is no size": (None, f"{PRUNE} --max-memory nan", "'nan' is not a size"),
    "memory is nothing": (None, f"{PRUNE} --max-memory 0", "'0' is not a size"),
    "a size out of range": (None, f"prune model --size {'9' * 400}GB {SMALL} -o out", "size"),
    "a rule without a budget": (None, f"{PRUNE} --rule x", "x"),
    "a rule that is no expression": (None, f"{PRUNE} --rule (=dense", "("),
    "an expression that is none": (None, f"{PRUNE} --include [", "regular expression"),
    "sparsities of speed are no numbers": (None, "bench model --sparsity a", "--sparsity"),
    "sparsities of speed beyond one": (None, "bench model --sparsity 7", "7"),
    "batches of nothing": (None, "bench model --batch 0", "0"),
    "an impossible level of compression": (None, "pack pruned -o p.upz --level 99", "level 99"),
    "a model of a name with NUL": (None, ["prune", "mo\0del", "-s", "2:4", "-o", "out"], "model"),
    "a model of a very long name": (None, f"prune {'m' * 5000} -s 2:4 -o out", "too long"),
    # recipes
    "recipe: a bomb of aliases": (write("recipe.yaml", BOMB + "sparsity: *l\n"), RECIPE, "alias"),
    "recipe: an alias to itself": (write("recipe.yaml", "sparsity: &a [*a]\n"), RECIPE, "alias"),
    "recipe: nested without end": (write("recipe.yaml", "sparsity: " + deep()), RECIPE, "recipe.yaml"),
    "recipe: a Python object": (
        write("recipe.yaml", "sparsity: !!python/object/apply:os.system [touch x]\n"),
        RECIPE,
        "sparsity",
    ),
    "recipe: wrong type": (write("recipe.yaml", "sparsity: 0.5\nwindows: [1]\n"), RECIPE.replace(SMALL, ""), "windows"),
    "recipe: unknown key": (write("recipe.yaml", "sparsty: 0.5\n"), RECIPE, "sparsty"),
    "recipe: a key twice": (write("recipe.yaml", "sparsity: 0.5\nsparsity: 0.6\n"), RECIPE, "sparsity"),
    "recipe: a key twice inside": (write("recipe.yaml", "sparsity: 0.5\ntuning: {a: 1, a: 2}\n"), RECIPE, "a setting twice"),
    "recipe: a key that is a list": (write("recipe.yaml", "? [a]\n: b\n"), RECIPE, "recipe.yaml"),
    "recipe: not UTF-8": (write("recipe.yaml", b"text: \xff\xfe\xfd\n"), RECIPE, "UTF-8"),
    "recipe: NUL": (write("recipe.yaml", b"text: \0\n"), RECIPE, "recipe.yaml"),
    "recipe: a list": (write("recipe.yaml", "- 1\n"), RECIPE, "not a mapping"),
    "recipe: empty": (write("recipe.yaml", ""), RECIPE, "not a mapping"),
    "recipe: a folder": (remove("recipe.yaml"), RECIPE.replace("recipe.yaml", "model"), "recipe model"),
    "recipe: a pipe": (pipe("recipe.yaml"), RECIPE, "recipe.yaml"),
    "recipe: a device": (None, RECIPE.replace("recipe.yaml", "/dev/zero"), "/dev/zero"),
    "recipe: two documents": (write("recipe.yaml", "sparsity: 0.5\n---\nsparsity: 0.6\n"), RECIPE, "recipe.yaml"),
    "recipe: tuning is not a number": (write("recipe.yaml", "sparsity: 0.5\ntuning: {step_size: .nan}\n"), RECIPE, "step_size"),
    "recipe: tuning is NaN": (write("recipe.yaml", "sparsity: 0.5\ntuning: {step_size: nan}\n"), RECIPE, "step_size"),
    "recipe: tuning is a fraction of steps": (
        write("recipe.yaml", "sparsity: 0.5\ntuning: {batch_tokens: inf}\n"),
        RECIPE,
        "batch_tokens",
    ),
    # models
    "model: an empty folder": (lambda: Path("empty").mkdir(), "prune empty -s 2:4 -o out", "no config.json"),
    "model: a file": (None, "prune text.txt -s 2:4 -o out", "is a file"),
    "model: no config": (remove("single/config.json"), SINGLE, "no config.json"),
    "model: config is not JSON": (write("single/config.json", "{"), SINGLE, "config.json"),
    "model: config is a list": (write("single/config.json", "[]"), SINGLE, "config.json"),
    "model: config is not UTF-8": (write("single/config.json", b'{"a": "\xff"}'), SINGLE, "config.json"),
    "model: config nested without end": (write("single/config.json", '{"a": ' + deep() + "}"), SINGLE, "config.json"),
    "model: config without a type": (both(without("model_type"), without("architectures")), SINGLE, "single"),
    "model: config of an unknown type": (config(model_type="martian"), SINGLE, "martian"),
    "model: config with a word for a width": (config(hidden_size="wide"), SINGLE, "hidden_size"),
    "model: config with a fraction of layers": (config(num_hidden_layers=2.5), SINGLE, "num_hidden_layers"),
    "model: config without layers": (config(num_hidden_layers=0), SINGLE, "no list of decoder blocks"),
    "model: config with negative layers": (config(num_hidden_layers=-3), SINGLE, "no list of decoder blocks"),
    "model: config with a billion layers": (config(num_hidden_layers=10**9), SINGLE, "1000000000 layers"),
    "model: config with an absurd width": (config(hidden_size=2**62), SINGLE, "single"),
    "model: config with an absurd vocabulary": (config(vocab_size=2**40), SINGLE, "single"),
    "model: config with another width": (config(intermediate_size=128), SINGLE, "single"),
    "model: config with another width, evaluated": (config(intermediate_size=128), EVALUATE, "single"),
    "model: config with no heads": (config(num_attention_heads=0), SINGLE, "single"),
    "model: config with an unknown activation": (config(hidden_act="nope"), SINGLE, "nope"),
    "model: config of an encoder": (config(model_type="bert"), SINGLE, "is an encoder: without a causal mask"),
    "model: its own code": (
        config(model_type="martian", auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}),
        SINGLE,
        "its own code",
    ),
    "model: an adapter": (write("single/adapter_config.json", "{}"), SINGLE, "adapter"),
    "model: a pipe beside the weights": (pipe("single/generation_config.json"), SINGLE, "generation_config.json"),
    "model: no weights": (remove(WEIGHTS), SINGLE, "no weights"),
    "model: pickled weights": (
        both(remove(WEIGHTS), write("single/pytorch_model.bin", b"cos\nsystem\n(S'touch x'\ntR.")),
        SINGLE,
        "convert",
    ),
    "model: pickled weights, named by an index": (
        both(
            write("single/pytorch_model.bin", b"cos\nsystem\n(S'touch x'\ntR."),
            remove(WEIGHTS),
            write("single/model.safetensors.index.json", '{"weight_map": {"a": "pytorch_model.bin"}}'),
        ),
        SINGLE,
        "",
    ),
    "model: a missing shard": (remove("model/model-00002*"), PRUNE, "model-00002"),
    "model: an index that is not JSON": (write(INDEX, "{"), PRUNE, "index.json"),
    "model: an index that is a list": (write(INDEX, "[]"), PRUNE, "index.json"),
    "model: an index without a map": (write(INDEX, "{}"), PRUNE, "index.json"),
    "model: an index with numbers": (write(INDEX, '{"weight_map": {"a": 1}}'), PRUNE, "index.json"),
    "model: an index of an absent file": (
        edit(INDEX, lambda index: index["weight_map"].update(x="absent.safetensors")),
        PRUNE,
        "absent.safetensors",
    ),
    "model: an index that leads out": (
        both(
            lambda: shutil.copy(WEIGHTS, "outside.safetensors"),
            edit(INDEX, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], "../outside.safetensors"))),
        ),
        PRUNE,
        "../outside.safetensors",
    ),
    "model: an index with an absolute path": (
        edit(INDEX, lambda index: index["weight_map"].update(x="/etc/passwd")),
        PRUNE,
        "/etc/passwd",
    ),
    "model: an index nested without end": (write(INDEX, '{"weight_map": ' + deep() + "}"), PRUNE, "index.json"),
    "model: weights cut off": (cut(WEIGHTS, 0.9), SINGLE, "cut off"),
    "model: weights cut off in the header": (cut(WEIGHTS, 0.01), SINGLE, "model.safetensors"),
    "model: weights empty": (write(WEIGHTS, b""), SINGLE, "model.safetensors"),
    "model: a flipped bit in the header": (flip(WEIGHTS, 8), SINGLE, "model.safetensors"),
    "model: a flipped bit in a tensor's type": (
        header(
            WEIGHTS,
            lambda found: found["model.norm.weight"].update(dtype="BF61"),
        ),
        SINGLE,
        "SafetensorError",
    ),
    "model: a header without end": (header(WEIGHTS, "{}", length=2**63), SINGLE, "model.safetensors"),
    "model: a header of a terabyte": (header(WEIGHTS, "{}", length=2**40), SINGLE, "model.safetensors"),
    "model: a header that is a list": (header(WEIGHTS, "[]"), SINGLE, "model.safetensors"),
    "model: a header nested without end": (header(WEIGHTS, '{"a": ' + deep() + "}"), SINGLE, "model.safetensors"),
    "model: a tensor twice in the header": (header(WEIGHTS, doubled), SINGLE, "twice"),
    "model: a tensor of absurd shape": (
        header(WEIGHTS, lambda found: found["model.norm.weight"].update(shape=[2**30, 2**30])),
        SINGLE,
        "model.norm.weight",
    ),
    "model: a tensor of negative shape": (
        header(WEIGHTS, lambda found: found["model.norm.weight"].update(shape=[-32])),
        SINGLE,
        "model.norm.weight",
    ),
    "model: a tensor of zero size": (
        tensors(WEIGHTS, put(f"{MATRIX}.weight", torch.zeros(0, 32, dtype=torch.bfloat16))),
        SINGLE,
        "single",
    ),
    "model: a tensor missing": (tensors(WEIGHTS, lambda found: found.pop(f"{MATRIX}.weight")), SINGLE, MATRIX),
    "model: a tensor missing, evaluated": (
        tensors(WEIGHTS, lambda found: found.pop("model.norm.weight")),
        EVALUATE,
        "model.norm.weight",
    ),
    "model: tensors on top of each other": (
        header(
            WEIGHTS,
            lambda found: found[f"{MATRIX}.weight"].update(
                data_offsets=found["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
            ),
        ),
        SINGLE,
        "model.safetensors",
    ),
    "model: a weight is NaN": (tensors(WEIGHTS, put(f"{MATRIX}.weight", lambda t: fill(t, torch.nan))), SINGLE, MATRIX),
    "model: a weight is infinite": (tensors(WEIGHTS, put(f"{MATRIX}.weight", lambda t: fill(t, torch.inf))), SINGLE, MATRIX),
    "model: a weight is NaN, evaluated": (
        tensors(WEIGHTS, put(f"{MATRIX}.weight", lambda t: fill(t, torch.nan))),
        EVALUATE,
        "finite",
    ),
    "model: quantised integers": (tensors(WEIGHTS, put(f"{MATRIX}.weight", lambda t: t.to(torch.int8))), SINGLE, "I8"),
    "model: a GGUF file that is none": (
        write("gguf/m.gguf", b"GGUF" + b"\xff" * 64),
        f"prune gguf/m.gguf -s 2:4 {SMALL} -o out",
        "m.gguf",
    ),
    "model: an empty GGUF file": (write("gguf/m.gguf", b""), f"prune gguf/m.gguf -s 2:4 {SMALL} -o out", "m.gguf"),
    # tokenizers
    "tokenizer: absent": (remove("single/tokenizer*"), SINGLE, "no tokenizer"),
    "tokenizer: absent, asked": (remove("single/tokenizer*"), TASKS, "no tokenizer"),
    "tokenizer: not JSON": (write("single/tokenizer.json", "{"), SINGLE, "tokenizer"),
    "tokenizer: an empty object": (write("single/tokenizer.json", "{}"), SINGLE, "tokenizer"),
    "tokenizer: its config is not JSON": (write("single/tokenizer_config.json", "{"), SINGLE, "tokenizer"),
    "tokenizer: its config is a list": (write("single/tokenizer_config.json", "[]"), SINGLE, "tokenizer"),
    "tokenizer: its own code": (
        edit(
            "single/tokenizer_config.json",
            lambda found: found.update(tokenizer_class="Martian", auto_map={"AutoTokenizer": ["x.T", None]}),
        ),
        SINGLE,
        "tokenizer",
    ),
    "tokenizer: tokens beyond the vocabulary": (
        both(config(vocab_size=100), tensors(WEIGHTS, put("model.embed_tokens.weight", lambda t: t[:100].clone()))),
        SINGLE,
        "vocabulary",
    ),
    "tokenizer: tokens beyond the vocabulary, evaluated": (
        both(config(vocab_size=100), tensors(WEIGHTS, put("model.embed_tokens.weight", lambda t: t[:100].clone()))),
        "evaluate single --length 32 --windows 2",
        "vocabulary",
    ),
    "tokenizer: tokens beyond the vocabulary, asked": (
        both(config(vocab_size=100), tensors(WEIGHTS, put("model.embed_tokens.weight", lambda t: t[:100].clone()))),
        TASKS,
        "vocabulary",
    ),
    # texts
    "text: empty": (write("text.txt", ""), TEXT, "is empty"),
    "text: too short": (write("text.txt", "Too short."), TEXT, "less than one window"),
    "text: not UTF-8": (write("text.txt", b"caf\xe9 " * 400), TEXT, "not UTF-8"),
    "text: an unknown kind": (write("text.doc", "x"), TEXT.replace("text.txt", "text.doc"), ".doc"),
    "text: a folder without texts": (None, TEXT.replace("text.txt", "single"), "holds no file"),
    "text: a pipe": (pipe("text.txt"), TEXT, "text.txt"),
    "text: a folder with a pipe": (
        both(lambda: Path("texts").mkdir(), pipe("texts/a.txt")),
        TEXT.replace("text.txt", "texts"),
        "texts",
    ),
    "text: a device": (None, TEXT.replace("text.txt", "/dev/zero"), "/dev/zero"),
    "text: lines that are no JSON": (write("text.jsonl", "{]\n"), LINES, "line 1"),
    "text: lines nested without end": (write("text.jsonl", '{"text": ' + deep() + "}\n"), LINES, "line 1"),
    "text: half a character": (write("text.jsonl", '{"text": "%s"}\n' % ("\\ud800 " * 400)), LINES, "line 1"),
    "text: a field that is no text": (write("text.jsonl", '{"text": 7}\n'), LINES, "line 1"),
    "text: a number of a million digits": (write("text.jsonl", '{"text": %s}\n' % ("9" * 10**6)), LINES, "line 1"),
    "text: a table that is none": (
        write("t.parquet", b"PAR1" + b"\xff" * 64 + b"PAR1"),
        TEXT.replace("text.txt", "t.parquet"),
        "t.parquet",
    ),
    # tasks
    "tasks: an unknown name": (None, "evaluate single --tasks piqaa", "piqaa"),
    "tasks: no known format": (write("task.jsonl", '{"a": 1}\n'), TASKS, "no known format"),
    "tasks: a label out of range": (
        write("task.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 9}\n'),
        TASKS,
        "label 9",
    ),
    "tasks: a label that is infinite": (
        write("task.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c", "label": Infinity}\n'),
        TASKS,
        "line 1",
    ),
    "tasks: an answer that is a number": (
        write("task.jsonl", '{"question": "a", "choices": {"text": 5, "label": ["A"]}, "answerKey": "A"}\n'),
        TASKS,
        "line 1",
    ),
    "tasks: choices that are numbers": (
        write("task.jsonl", '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": [1, 2], "label": 0}\n'),
        TASKS,
        "line 1",
    ),
    "tasks: half a character": (
        write("task.jsonl", '{"goal": "\\ud800", "sol1": "b", "sol2": "c", "label": 0}\n'),
        TASKS,
        "line 1",
    ),
    "tasks: empty": (write("task.jsonl", ""), TASKS, "empty"),
    # masks
    "masks: absent": (remove("masks.safetensors"), VERIFY, "does not exist"),
    "masks: a pipe": (pipe("masks.safetensors"), VERIFY, "masks.safetensors"),
    "masks: cut off": (cut("masks.safetensors", 0.8), VERIFY, "masks.safetensors"),
    "masks: not ours": (None, "masks verify plain.safetensors", "plain.safetensors"),
    "masks: scores": (None, "masks verify scores.safetensors", "holds scores"),
    "masks: facts are a list": (facts("masks.safetensors", lambda said: [1]), VERIFY, "masks.safetensors"),
    "masks: facts are a number": (facts("masks.safetensors", lambda said: 5), VERIFY, "masks.safetensors"),
    "masks: a format that is a word": (
        facts("masks.safetensors", lambda said: said.update(format="x")),
        VERIFY,
        "masks.safetensors",
    ),
    "masks: no kind": (facts("masks.safetensors", lambda said: said.pop("kind") and None), VERIFY, "masks.safetensors"),
    "masks: facts nested without end": (
        header("masks.safetensors", lambda found: found["__metadata__"].update(uniprune=deep())),
        VERIFY,
        "masks.safetensors",
    ),
    "masks: a shape of 2**60 weights": (
        facts("masks.safetensors", lambda said: said["shapes"].update({MATRIX: [2**30, 2**30]})),
        VERIFY,
        MATRIX,
    ),
    "masks: a tensor of 2**60 bytes": (
        header("masks.safetensors", lambda found: found[MATRIX].update(shape=[2**60])),
        VERIFY,
        "masks.safetensors",
    ),
    "masks: of the wrong type": (
        tensors("masks.safetensors", put(MATRIX, lambda t: t.to(torch.int16))),
        VERIFY,
        MATRIX,
    ),
    "masks: one missing": (tensors("masks.safetensors", lambda found: found.pop(MATRIX)), VERIFY, "names"),
    "masks: one too many": (tensors("masks.safetensors", put("extra", torch.zeros(4, dtype=torch.uint8))), VERIFY, "names"),
    "masks: another model's": (tensors(WEIGHTS, put(f"{MATRIX}.weight", lambda t: fill(t, 1))), APPLY, "another model"),
    "masks: a flipped bit": (flip("masks.safetensors", -1, 1), VERIFY, "masks.safetensors"),
    "masks: a name that leads out": (
        facts("masks.safetensors", lambda said: said.update(shapes={"../../x": [4, 4]}, digests={"../../x": ""})),
        VERIFY,
        "masks.safetensors",
    ),
    "masks: compared with nothing": (None, "masks intersect masks.safetensors -o out.safetensors", "two or more"),
    "plain masks: none": (remove("plain.npz"), IMPORT, "plain.npz"),
    "plain masks: not an archive": (write("plain.npz", b"PK\3\4" + b"\xff" * 50), IMPORT, "plain.npz"),
    "plain masks: pickled": (npz(**{f"{MATRIX}.weight": np.array([{}], dtype=object)}), IMPORT, "plain.npz"),
    "plain masks: 2**60 of them": (lying_npz, IMPORT, "plain.npz"),
    "plain masks: fractions": (npz(**{f"{MATRIX}.weight": np.full((64, 32), 0.5)}), IMPORT, "plain.npz"),
    "plain masks: of another shape": (npz(**{f"{MATRIX}.weight": np.ones((3, 3), bool)}), IMPORT, "plain.npz"),
    "plain masks: of no matrix": (npz(x=np.ones((3, 3), bool)), IMPORT, "plain.npz"),
    # scores
    "scores: NaN": (tensors("scores.safetensors", put(MATRIX, lambda t: fill(t, torch.nan))), MASK, MATRIX),
    "scores: infinite": (tensors("scores.safetensors", put(MATRIX, lambda t: fill(t, torch.inf))), MASK, MATRIX),
    "scores: infinite, one budget": (
        tensors("scores.safetensors", put(MATRIX, lambda t: fill(t, -torch.inf))),
        MASK.replace("2:4", "0.5 --scope model"),
        MATRIX,
    ),
    "scores: of the wrong type": (tensors("scores.safetensors", put(MATRIX, lambda t: t.to(torch.int32))), MASK, MATRIX),
    "scores: half precision": (tensors("scores.safetensors", put(MATRIX, lambda t: t.half())), MASK, MATRIX),
    "scores: of the wrong shape": (tensors("scores.safetensors", put(MATRIX, lambda t: t.flatten())), MASK, MATRIX),
    "scores: one missing": (tensors("scores.safetensors", lambda found: found.pop(MATRIX)), MASK, "not of the same names"),
    "scores: one too many": (tensors("scores.safetensors", put("extra", torch.zeros(4, 4))), MASK, "not of the same names"),
    "scores: of no matrix": (facts("scores.safetensors", lambda said: said.update(matrices=[])), MASK, "scores.safetensors"),
    "scores: a matrix twice": (
        facts("scores.safetensors", lambda said: said.update(matrices=said["matrices"] * 2)),
        MASK,
        "scores.safetensors",
    ),
    "scores: no digests": (facts("scores.safetensors", lambda said: said.update(digests={})), MASK, "scores.safetensors"),
    "scores: digests are a number": (
        facts("scores.safetensors", lambda said: said.update(digests=5)),
        MASK,
        "scores.safetensors",
    ),
    "scores: no scale": (facts("scores.safetensors", lambda said: said.pop("comparable") and None), MASK, "comparable"),
    "scores: cut off": (cut("scores.safetensors", 0.5), MASK, "scores.safetensors"),
    "scores: masks": (None, MASK.replace("scores", "masks"), "holds masks"),
    # token files
    "tokens: none": (remove("tokens.safetensors"), TOKENS, "does not exist"),
    "tokens: flat": (tensors("tokens.safetensors", put("tokens", lambda t: t.flatten())), TOKENS, "tokens.safetensors"),
    "tokens: none of them": (
        tensors("tokens.safetensors", put("tokens", lambda t: t[:0].clone())),
        TOKENS,
        "tokens.safetensors",
    ),
    "tokens: under another name": (
        tensors("tokens.safetensors", lambda found: found.update(other=found.pop("tokens"))),
        TOKENS,
        "tokens",
    ),
    "tokens: fractions": (
        tensors("tokens.safetensors", put("tokens", lambda t: t.float() + 0.5)),
        TOKENS,
        "tokens.safetensors",
    ),
    "tokens: negative": (tensors("tokens.safetensors", put("tokens", lambda t: fill(t, -1))), TOKENS, "-1"),
    "tokens: beyond the vocabulary": (
        tensors("tokens.safetensors", put("tokens", lambda t: fill(t, 512))),
        TOKENS,
        "vocabulary",
    ),
    "tokens: windows of one": (tensors("tokens.safetensors", put("tokens", lambda t: t[:, :1].clone())), TOKENS, "length 1"),
    "tokens: no source": (facts("tokens.safetensors", lambda said: said.pop("source") and None), TOKENS, "tokens.safetensors"),
    # archives
    "archive: absent": (remove("packed.upz"), UNPACK, "does not exist"),
    "archive: a pipe": (pipe("packed.upz"), UNPACK, "packed.upz"),
    "archive: not one": (write("packed.upz", b"PK"), UNPACK, "not an archive"),
    "archive: cut off": (cut("packed.upz", 0.7), UNPACK, "cut off"),
    "archive: a flipped bit in a piece": (flip("packed.upz", 4000), UNPACK, "damaged"),
    "archive: a flipped bit in the index": (flip("packed.upz", -40), UNPACK, "damaged"),
    "archive: an absolute path": (named("/tmp/evil"), UNPACK, "/tmp/evil"),
    "archive: a path out": (named("../evil"), UNPACK, "../evil"),
    "archive: a path out from within": (named("a/../../evil"), UNPACK, "evil"),
    "archive: a path of Windows": (named("C:\\evil"), UNPACK, "evil"),
    "archive: a name of nothing": (named(""), UNPACK, "''"),
    "archive: a name that is a number": (named(5), UNPACK, "damaged"),
    "archive: a name with NUL": (named("a\0b"), UNPACK, "a"),
    "archive: a name too long": (named("n" * 5000), UNPACK, "nnn"),
    "archive: a name twice": (named("config.json", 2), UNPACK, "config.json"),
    "archive: a file that is a folder": (
        index_of(lambda files: (files[0].update(path="a"), files[1].update(path="a/b"))),
        UNPACK,
        "a/b",
    ),
    "archive: a file of 2**60 bytes": (index_of(lambda files: files[0].update(size=2**60)), UNPACK, "damaged"),
    "archive: a chunk of 2**60 bytes": (index_of(lambda files: files[0]["chunks"][0].__setitem__(2, 2**60)), UNPACK, "damaged"),
    "archive: a size that is true": (index_of(lambda files: files[0].update(size=True)), UNPACK, "damaged"),
    # outputs
    "output: the input": (None, f"prune single -s 2:4 {SMALL} -o single", "overlap"),
    "output: the input, to be replaced": (None, f"prune pruned -s 2:4 {SMALL} -o pruned --overwrite", "overlap"),
    "output: inside the input": (None, f"prune single -s 2:4 {SMALL} -o single/out", "overlap"),
    "output: the input by a link": (link("alias", "single"), f"prune single -s 2:4 {SMALL} -o alias", "alias"),
    "output: around the input": (None, f"prune single -s 2:4 {SMALL} -o .", "overlap"),
    "output: a file": (None, SINGLE.replace("-o out", "-o text.txt"), "is a file"),
    "output: below a file": (None, SINGLE.replace("-o out", "-o text.txt/out"), "text.txt"),
    "output: somebody's folder": (
        write("mine/x", ""),
        SINGLE.replace("-o out", "-o mine --overwrite"),
        "not written by uniprune",
    ),
    "output: a link to nowhere": (link("out", "nowhere"), SINGLE, "link"),
    "output: a link to another output": (link("out", "pruned"), f"{SINGLE} --overwrite", "link"),
    "output: a run's folder that is a link": (link(".run-out", "single"), SINGLE, ".run-out"),
    "output: a run's file that is a link": (link(".run-out/identity.json.partial", "../text.txt"), SINGLE, ".run-out"),
    "output: a run's lock that is a link": (link(".run-out/lock", "../text.txt"), SINGLE, ".run-out"),
    "output: an identity nested without end": (
        write(".run-out/identity.json", '{"a": ' + deep() + "}"),
        SINGLE,
        "identity.json",
    ),
    "output: a commit that is a list": (
        both(
            write(".run-out/lock", ""),
            write(".run-out/identity.json", '{"uniprune": "run", "identity": {}}'),
            write(".run-out/sweep.json", "[]"),
        ),
        SINGLE,
        "--resume",
    ),
    "output: a finished run's report is no JSON": (write("out/pruning.json", "{"), f"{SINGLE} --resume", "pruning.json"),
    "output: a finished run's report is a list": (write("out/pruning.json", "[]"), f"{SINGLE} --resume", "pruning.json"),
    "output: scores over themselves": (
        None,
        "mask scores.safetensors -s 2:4 -o scores.safetensors --overwrite",
        "scores.safetensors",
    ),
    "output: scores inside the model": (None, f"calibrate single {SMALL} -o single/scores.safetensors", "single"),
    "output: the model's weights": (None, f"calibrate single {SMALL} -o {WEIGHTS} --overwrite", "single"),
    "output: tokens inside the model": (None, f"{SINGLE} --save-tokens single/tokens.safetensors", "single"),
    "output: a device": (None, MASK.replace("out.safetensors", "/dev/null"), "/dev/null"),
    "output: archive over a folder": (None, "pack pruned -o model", "model"),
    "output: archive inside its folder": (None, "pack pruned -o pruned/p.upz", "lies in, the input"),
    "output: the evaluation that is checked": (
        write("e.json", "{}"),
        "evaluate --check e.json -o e.json --overwrite",
        "the input e.json",
    ),
    "output: a report over its source": (
        write("e.json", "{}"),
        "report e.json -o e.json --format json --overwrite",
        "the input e.json",
    ),
    "output: a sweep over its text": (
        write("t.json", '[{"text": "To be, or not to be"}]'),
        "sweep single scores.safetensors -s 0.5 --text t.json -o t.json --overwrite",
        "the input t.json",
    ),
    "output: masks over their parts": (
        None,
        "masks union masks.safetensors masks.safetensors -o masks.safetensors --overwrite",
        "the input masks.safetensors",
    ),
    "output: scores over the tokens": (
        None,
        "calibrate single --text tokens.safetensors --controller none -o tokens.safetensors --overwrite",
        "the input tokens.safetensors",
    ),
    "output: tokens over themselves": (
        None,
        f"{TOKENS} --save-tokens tokens.safetensors --overwrite",
        "the input tokens.safetensors",
    ),
    "output: scores and tokens in one file": (
        None,
        f"calibrate single {SMALL} -o both.safetensors --save-tokens both.safetensors",
        "both scores and tokens",
    ),
    "output: around the masks": (
        None,
        "apply single pruned/pruning/masks.safetensors -o pruned --overwrite",
        "the input pruned/pruning/masks.safetensors",
    ),
    # options that nothing would come of
    "option: a type for weights that keep theirs": (None, f"{APPLY} --dtype bfloat16", "leave --dtype out"),
    "option: a type for no model": (
        None,
        "masks export masks.safetensors --dtype float16 -o out.safetensors",
        "give it with --model",
    ),
    "option: settings of no controller": (None, f"{SINGLE} --controller none --set step_size=1", "tuning (--set)"),
    "option: no sparsity for masks": (None, MASK.replace("-s 2:4 ", ""), "use --sparsity 0.5 or --sparsity 2:4"),
}


def test_there_are_cases_of_every_kind():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_hostile_input(name, world, tmp_path, monkeypatch, capfd):
    damage, command, message = CASES[name]
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if damage:
        damage()
    before = snapshot(tmp_path)
    code, errors = bounded(command, capfd)
    assert errors.count("\n") == 1, errors
    assert errors.startswith("error: ")
    assert "Traceback" not in errors
    assert message in errors
    assert code == 2, errors
    assert len(errors) < 1000
    assert snapshot(tmp_path) == before


def bounded(command, capfd):
    """Exit code and stderr of a command line that may take SECONDS."""

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(os.environ.get("CASE_SECONDS", SECONDS)))
    try:
        code = call("", command) if isinstance(command, list) else call(command)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return code, capfd.readouterr().err


# ----------------------------------------------------------------------------------------------- what the machine forbids


@pytest.fixture
def mounted(tmp_path):
    """A file system of its own: a function that mounts one of so many bytes, or read-only, or skips."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        if (
            os.geteuid()
            or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode
        ):
            pytest.skip("mounting takes root")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True)


@pytest.mark.parametrize("options", ["size=8k", "ro"], ids=["a full disk", "a read-only disk"])
@pytest.mark.parametrize(
    "command", [SINGLE, APPLY, MASK, UNPACK, "pack pruned -o out.upz", IMPORT], ids=lambda command: command.split()[0]
)
def test_disks_that_take_nothing(world, mounted, monkeypatch, capfd, options, command):
    """Exit code 2 where it is seen before the work, 1 where the disk fills meanwhile; nothing is left either way."""
    place = mounted(options)
    monkeypatch.chdir(world)
    code, errors = bounded(command.replace("-o out", f"-o {place}/out"), capfd)
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert str(place) in errors
    early = options == "ro" or command in (SINGLE, APPLY, UNPACK) or command.startswith("pack ")
    assert code == (2 if early else 1)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "command", [SINGLE, APPLY, MASK, UNPACK, "pack pruned -o out.upz"], ids=lambda command: command.split()[0]
)
def test_a_write_that_fails_leaves_nothing(world, tmp_path, monkeypatch, capfd, command):
    """As a disk that fills meanwhile: no file may be longer than 8 kB. A run keeps its progress, and no more."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, limits[1]))
    try:
        code, errors = bounded(command, capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert {name: about for name, about in snapshot(tmp_path).items() if not name.startswith(".run-out")} == before


def test_links_in_an_old_output_are_not_followed(world, tmp_path, monkeypatch):
    """An output that is replaced may hold links; what they point to is neither written nor deleted."""
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "masks.safetensors").write_text("precious")
    assert call(APPLY) == 0
    shutil.rmtree("out/pruning")
    Path("out/pruning").symlink_to(outside)
    Path("out/model.safetensors").unlink()
    Path("out/model.safetensors").symlink_to(outside / "masks.safetensors")
    Path("mine.safetensors").symlink_to(outside / "masks.safetensors")
    assert call(APPLY + " --overwrite") == 0
    assert call(MASK.replace("out.safetensors", "mine.safetensors --overwrite")) == 0
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"masks.safetensors": "precious"}
    assert not any(path.is_symlink() for path in (*Path("out").rglob("*"), Path("mine.safetensors")))


def test_temporary_files_are_private_and_new(world, tmp_path, monkeypatch):
    """While a command works, no other user can read what it writes, nor have put anything there before."""
    monkeypatch.chdir(world)
    seen = {}

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(str(tmp_path)):
            seen.update({str(path): path.lstat().st_mode for path in tmp_path.iterdir()})

    watching.append(watch)
    try:
        assert call(SINGLE.replace("-o out", f"-o {tmp_path}/out")) == 0
        assert call(MASK.replace("-o out", f"-o {tmp_path}/masks")) == 0
    finally:
        watching.clear()
    passing = {path: mode for path, mode in seen.items() if not Path(path).exists()}
    assert any(".run-" in path for path in passing)
    assert any(".partial-" in path for path in passing)
    for path, mode in passing.items():
        assert not mode & 0o077, path
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


watching = []  # an audit hook cannot be taken back, so there is one, which asks these
sys.addaudithook(lambda event, arguments: [watch(event, arguments) for watch in watching])
