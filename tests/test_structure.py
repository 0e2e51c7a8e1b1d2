"""The shape of the package itself."""

import ast
import re
from pathlib import Path

import pytest

import uniprune

RANK = {
    "errors": 0,
    "progress": 0,
    "patterns": 1,
    "text": 4,
    "matrices": 1,
    "metrics": 1,
    "masks": 2,
    "executor": 1,
    "artefacts": 3,
    "models": 1,
    "calibration": 4,
    "mirror_descent": 5,
    "straight_through": 2,
    "prox": 2,
    "paper": 5,
    "checkpoint": 3,
    "baselines": 5,
    "evaluation": 5,
    "forecast": 2,
    "loss": 3,
    "recipe": 6,
    "refine": 2,
    "report": 3,
    "pipeline": 7,
    "cli": 8,
}
MODULES = {path.stem: path for path in Path(uniprune.__file__).parent.glob("*.py") if path.stem != "__init__"}


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
