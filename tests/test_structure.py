"""The shape of the package itself; the directions of its imports are import-linter's (pyproject.toml, ``make check``)."""

import ast
import re
from pathlib import Path

import pytest

import uniprune

PACKAGE = Path(uniprune.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = sorted({path.parent for path in MODULES.values()})
LINES, FILES, PARAMETERS = 400, 12, 8


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
    assert len(text.splitlines()) <= LINES
    assert not re.search(r"(?<![.\w])print\(", text)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folders_can_be_read_at_a_glance(folder):
    assert len([*folder.glob("*.py")]) <= FILES


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("cli")])
def test_functions_have_few_parameters(module):
    """A command's are its options; every other function has few, or takes a value that holds them together. What runs on a GPU
    takes numbers and addresses one by one."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        kernel = any(ast.unparse(one).startswith("triton.jit") for one in getattr(node, "decorator_list", []))
        if isinstance(node, ast.FunctionDef) and not kernel:
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            assert len(names) <= PARAMETERS, f"{node.name}: {', '.join(names)}"


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them without their folders; two of a name cannot both be collected."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py")]
    assert sorted(names) == sorted({*names})


def test_a_sub_package_loads_nothing_by_itself():
    """``uniprune --help`` must not load PyTorch."""
    assert all(not (folder / "__init__.py").read_text() for folder in FOLDERS if folder != PACKAGE)
