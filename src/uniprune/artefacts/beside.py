"""What goes with the weights into an output made of a checkpoint's files: config, tokenizer, chat templates and the like."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.origin import TEMPLATES
from uniprune.storage.files import REPORT

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")  # of weights; between its endings may be a variant (fp16)
LEFT = {REPORT, "README.md", ".gitattributes"}  # not true of the pruned model


def beside(files: Files) -> list[Path]:
    """The files of a checkpoint folder that go with the weights into a pruned one: config, tokenizer and the like.

    An index of weights that are not those of the model would be one of files that are not there, whatever their format.
    """

    def goes(file: Path) -> bool:
        index = INDEX.fullmatch(file.name) and file != files.weights
        return file.is_file() and file.name not in LEFT and file.suffix not in WEIGHTS and not index

    there = [*files.folder.iterdir(), *files.folder.glob(TEMPLATES)]
    return [file for file in sorted(there) if goes(file)]


def copy_beside(files: Files, folder: Path, index: bool = True) -> None:
    """Copies these files into an existing folder; index: also that of the weights, if there is one."""
    for file in beside(files):
        if index or file != files.weights:
            target = folder / file.relative_to(files.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
            target.chmod(0o644)
