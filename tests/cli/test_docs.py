"""The documents are run: every command in the order in which it stands there, every Python block, on a tiny model.

Names of hubs, data sets and tasks stand for local files here; sizes are made small. Nothing else is changed.
"""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import made_up_tasks
import reference
import uniprune
from command import run
from conftest import VOCABULARY
from pictures import llava, write_model, write_rows
from small_models import tiny
from task_rows import ROWS
from uniprune import Recipe
from uniprune.artefacts.mask_conversion import export_masks
from uniprune.controller.controllers import CONTROLLERS
from uniprune.data import text
from uniprune.saliency.metrics import METRICS
from uniprune.tasks.catalogue import NAMES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TASKS = ("getting-started.md", "compare.md", "gpu.md", "scaling.md", "metric.md", "text.md", "tasks.md")
HUB = ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.1-70B")
TABLES = METRICS, CONTROLLERS, text.NAMED  # that examples add to
SEES = "Qwen/Qwen2.5-VL-3B-Instruct"
SMALL = {"--windows": "2", "--length": "32"}
SIZES = {
    **dict.fromkeys(("plan", "calibrate", "prune", "permute", "sweep"), SMALL),
    "compare": {**SMALL, "--eval-windows": "2", "--eval-length": "32"},
    "bench": {"--batch": "1", "--sparsity": "0.9", "--dtype": "float32"},
}


def commands(page):
    """The indented lines that call uniprune, without their comments."""
    for line in page.read_text().splitlines():
        if re.match(r"    (torchrun .*-m )?uniprune ", line):
            yield line.strip().partition(" #")[0].split("-m uniprune ")[-1].removeprefix("uniprune ").strip()


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def made_up_rows(path, what, **options):
    """Rows of the format of a data set on the hub."""
    name = next(name for name, listed in NAMES.items() if listed.path == path)
    make = made_up_tasks.Maker(0)
    return iter([made_up_tasks.MAKERS["arc" if name.startswith("arc") else name](make) for _ in range(6)])


@pytest.fixture(scope="module")
def furnished(folder, tmp_path_factory):
    """A working directory that has what the documents speak of, and beside it a hub cache with the models that they name."""
    path = tmp_path_factory.mktemp("docs")
    write_model(llava, path / "sees")
    for name in (*HUB, SEES):
        repository = path / "hub" / ("models--" + name.replace("/", "--"))
        shutil.copytree(path / "sees" if name == SEES else folder, repository / "snapshots" / "0")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
    work = path / "work"
    shutil.copytree(folder, work / "MODEL")
    shutil.copytree(folder, work / "MOE", ignore=shutil.ignore_patterns("*.safetensors*"))
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128}
    tiny("mixtral", **moe, vocab_size=VOCABULARY).save_pretrained(work / "MOE")
    prose = text.read("builtin", "calibration")[:200_000]
    for name in ("corpus.txt", "evaluation.txt", "code.txt"):
        (work / name).write_text(prose)
    write_rows(work / "pairs.jsonl")
    (work / "my_corpus.jsonl").write_text(json.dumps({"text": prose}))
    for name in ("questions", "my_questions"):
        (work / f"{name}.jsonl").write_text(json.dumps(ROWS["piqa"]) + "\n")
    (work / "recipe.yaml").write_text("sparsity: 2:4\ntuning:\n  batch_tokens: 64\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        small = {"windows": 2, "length": 32, "controller": "none"}
        uniprune.prune("MODEL", Recipe(sparsity="2:4", **small), Path("pruned"))
        uniprune.calibrate("MODEL", Recipe(**small), Path("scores.safetensors"))
        uniprune.mask(Path("scores.safetensors"), "2:4", Path("masks.safetensors"))
        export_masks(Path("masks.safetensors"), Path("mask_compressed.npz"), "maskllm")
    return path


@pytest.fixture
def place(furnished, tmp_path, monkeypatch):
    """Such a directory, of the test's own; a few windows are enough for what asks for no number."""
    monkeypatch.setattr("uniprune.job.samples.WINDOWS", 16)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(furnished / "hub"))
    for name in ("c4", "wikitext2"):
        monkeypatch.setitem(text.NAMED, name, text.NAMED["builtin"])
    monkeypatch.setattr("uniprune.tasks.loading.read_hub", made_up_rows)
    shutil.copytree(furnished / "work", tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def runnable(command):
    """The command's words, small, its output not in the way."""
    words = shlex.split(command)
    reads = "--text" in words or not {"--check", "--lm-eval", "--tasks", "--suite", "--prompt"} & set(words)
    sizes = SIZES.get(words[0], SMALL if words[0] == "evaluate" and reads else {})
    words += [word for flag, value in sizes.items() if flag not in words for word in (flag, value)]
    for flag in ("-o", "--output"):
        if flag in words and (output := Path(words[words.index(flag) + 1])).exists() and "--resume" not in words:
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    return words


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.stem)
def test_commands(place, capsys, monkeypatch, page):
    for command in commands(page):
        capsys.readouterr()
        code, _, errors = run(capsys, monkeypatch, *runnable(command))
        if "--lm-eval" in command:  # an extra, and its tasks are the hub's
            assert "lm-eval" in errors
        else:
            assert code == 0, f"{command}: {errors}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_python_blocks(place, page):
    """Each as a program of its own: a file without imports from ``__future__``, in which only ``Path`` is there already."""
    for index, block in enumerate(blocks(page)):
        if 'device="cuda"' in block and not torch.cuda.is_available():
            continue
        for name in re.findall(r'(?:Path\(|recipe, )"([\w-]+)"', block):  # outputs of commands before it
            shutil.rmtree(name, ignore_errors=True)
        file = place / f"{page.stem}_{index}.py"
        file.write_text(block)
        before = [dict(table) for table in TABLES]
        runpy.run_path(str(file), {} if page.stem == "extending" else {"Path": Path}, "__main__")
        for table, names in zip(TABLES, before, strict=True):
            table.clear()
            table.update(names)


def test_the_notebook(place):
    """Its cells one after the other, as a kernel runs them."""
    book = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert not any(cell["outputs"] for cell in book["cells"] if cell["cell_type"] == "code")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"notebook.ipynb, cell {number}", "exec"), names)


def test_pages_by_task_are_short():
    for name in TASKS:
        assert len((ROOT / "docs" / name).read_text().splitlines()) < 150, name
        assert f"(docs/{name})" in (ROOT / "README.md").read_text()


def test_links_and_files_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} -> {target}"
        for target in re.findall(r"`((?:src|tests|benchmarks|examples|docs)/[\w./-]+\.\w+)`", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name} names {target}"


def test_make_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text()
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        content = page.read_text()
        for target in re.findall(r"(?:^    |`)make ([\w-]+)", content, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
        for names in re.findall(r"pip install '\.\[([\w,-]+)\]'", content):
            assert set(names.split(",")) <= set(extras), f"{page.name}: {names}"


def test_every_public_name_is_on_the_page_for_python():
    page = (ROOT / "docs" / "python.md").read_text()
    assert not [name for name in uniprune.__all__ if f"`{name}" not in page]


def test_the_reference_and_the_table_of_settings_are_current():
    assert reference.CLI.read_text() == reference.reference(), "run `make reference`"
    assert reference.README.read_text() == reference.with_settings(reference.README.read_text()), "run `make reference`"
