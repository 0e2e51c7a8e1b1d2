"""What goes with the weights into an output made of a checkpoint's files: config, tokenizer, chat templates and the like."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.origin import TEMPLATES, Origin, module_folders
from uniprune.checkpoints.weight_files import has_weights
from uniprune.storage import strict_json
from uniprune.storage.files import FILE, REPORT

INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")  # of weights; between its endings may be a variant (fp16)
LEFT = {REPORT, "README.md", ".gitattributes"}  # not true of the pruned model


def companions(files: Files) -> list[Path]:
    """The files of a checkpoint folder that go with the weights into a pruned one: config, tokenizer and the like.

    Of sentence-transformers they are also all files of its other modules, whose weights are not the model's.
    An index of weights that are not those of the model would be one of files that are not there, whatever their format.
    """

    def goes(file: Path) -> bool:
        index = INDEX.fullmatch(file.name) and file != files.weights
        return file.is_file() and file.name not in LEFT and not has_weights(file.name) and not index

    there = [*files.folder.iterdir(), *files.folder.glob(TEMPLATES)]
    modules = [file for name in module_folders(files.folder) for file in files.folder.glob(f"{name}/*") if file.is_file()]
    return sorted([*filter(goes, there), *modules])


def copy_companions(files: Files, folder: Path, index: bool = True) -> None:
    """Copies these files into an existing folder; index: also that of the weights, if there is one.

    They are as they were, but for settings that name code which is not among them.
    """
    for file in companions(files):
        if index or file != files.weights:
            target = folder / file.relative_to(files.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
            target.chmod(FILE)
    for file in folder.glob("*config.json"):
        _drop_absent_code(file)


def copy_terms(origin: Origin | None, folder: Path) -> None:
    """Copies the licences that lie elsewhere than the checkpoint's files into an output folder that has none by their names."""
    for file in origin.terms if origin is not None else ():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
            (folder / file.name).chmod(FILE)


def _drop_absent_code(file: Path) -> None:
    """Takes out of settings the classes whose code is not beside them: told to trust it, transformers would not find it.

    Of a model on the Hub no code is downloaded. Code that lies in a repository (``owner/name--file.Class``) stays named.
    """
    try:
        settings = strict_json.parse(file.read_bytes())
    except ValueError:  # whoever needs them says what is wrong with them
        return
    named = settings.get("auto_map")
    if not isinstance(named, dict):
        return
    there = {kind: classes for kind, classes in named.items() if all(_is_there(file.parent, one) for one in _listed(classes))}
    if there != named:
        settings |= {"auto_map": there}
        if not there:
            del settings["auto_map"]
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _listed(classes: Any) -> list[Any]:
    """A class, or those of a slow and a fast tokenizer."""
    return classes if isinstance(classes, list) else [classes]


def _is_there(folder: Path, name: Any) -> bool:
    """Whether there may be code of a class; a tokenizer has None in the place of one that it has not."""
    return not isinstance(name, str) or "--" in name or (folder / f"{name.partition('.')[0]}.py").is_file()
