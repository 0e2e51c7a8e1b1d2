"""The shape of the package itself."""

import ast
import re
from pathlib import Path

import pytest

import uniprune

RANK = {
    "errors": 0,
    "layout": 0,
    "experts": 0,
    "routing": 1,
    "objects": 0,
    "progress": 0,
    "significance": 0,
    "saliency": 0,
    "selection": 1,
    "ranks": 1,
    "rows": 1,
    "patterns": 2,
    "matrices": 1,
    "metrics": 1,
    "executor": 1,
    "shards": 1,
    "models": 2,
    "prox": 3,
    "straight_through": 2,
    "starvation": 2,
    "mirror_descent": 2,
    "refine": 3,
    "masks": 2,
    "loss": 2,
    "tasks": 2,
    "scoring": 2,
    "zeroshot": 3,
    "harness": 3,
    "forecast": 4,
    "passes": 3,
    "streaming": 3,
    "artefacts": 3,
    "archive": 5,
    "sharding": 4,
    "permutation": 4,
    "mask_files": 5,
    "budget": 3,
    "hardware": 4,
    "checkpoint": 4,
    "kernels": 5,
    "semi_structured": 6,
    "probe": 6,
    "speed": 7,
    "words": 0,
    "results": 1,
    "summary": 2,
    "findings": 3,
    "grids": 3,
    "plots": 3,
    "sections": 4,
    "tables": 5,
    "page": 8,
    "text": 4,
    "runs": 1,
    "store": 2,
    "calibration": 4,
    "duals": 5,
    "paper": 5,
    "baselines": 5,
    "evaluation": 5,
    "descent": 6,
    "size": 6,
    "recipe": 6,
    "job": 7,
    "pipeline": 8,
    "reordering": 8,
    "assessment": 9,
    "curve": 9,
    "evaluation_cli": 10,
    "subject": 8,
    "closeness": 5,
    "generation": 5,
    "protocol": 2,
    "card": 5,
    "record": 5,
    "terminal": 8,
    "options": 8,
    "masks_cli": 9,
    "speed_cli": 9,
    "cli": 11,
    "report_cli": 9,
}
MODULES = {path.stem: path for path in Path(uniprune.__file__).parent.glob("*.py") if not path.stem.startswith("__")}


def test_every_module_has_a_rank():
    assert MODULES.keys() == RANK.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "uniprune":
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uniprune."):
            names = [node.module.split(".")[1]]
        for name in names:
            assert RANK[name] < RANK[module], name


@pytest.mark.parametrize("name", uniprune.__all__)
def test_public_names_exist_and_are_documented(name):
    value = getattr(uniprune, name)
    assert name == "__version__" or value.__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        _ = uniprune.prnue


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_short_and_do_not_print(module):
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= 420
    assert not re.search(r"(?<![.\w])print\(", text)
