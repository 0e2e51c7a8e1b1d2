"""Recipe files: the settings of a command as YAML, or a report that has them; read as strictly as a stranger's file must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from uniprune.errors import InputError
from uniprune.storage import strict_json
from uniprune.storage.files import path_of

SIZE, DEPTH = 1 << 20, 4  # of a recipe: bytes, collections in each other; at most
ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0xFEFF)}  # characters that YAML does not take as they are
REPORT = 64 << 20  # bytes of a report, at most, whose recipe is looked for
NULL = {"", "~", "null", "Null", "NULL"}  # in YAML 1.2, unquoted


def read(path: str | Path) -> dict[str, Any]:
    """The settings that a recipe file gives, scalars as text. Raises InputError that names the file."""
    path = path_of(path)
    if not path.is_file():
        raise InputError(f"recipe {path} is not a file; give a YAML file with settings, or a pruning.json")
    try:
        return _parsed(_replayed(path.read_bytes()))
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"recipe {path} is not a recipe: {' '.join(str(error).split())[:300]}") from None


def _replayed(content: bytes) -> bytes:
    """Of a report (pruning.json), the recipe that replays its run; any other content as it is."""
    if len(content) > REPORT or not content.lstrip().startswith(b"{"):
        return content
    try:
        report = strict_json.parse(content)
    except ValueError:
        return content
    inner = report.get("recipe") if "kind" in report else None
    if not isinstance(inner, dict):
        return content
    return json.dumps(inner, ensure_ascii=False).translate(ESCAPED).encode()


def _parsed(content: bytes) -> dict[str, Any]:
    """The settings in a recipe file. Raises ValueError or YAMLError for anything but one mapping with each name once.

    BaseLoader keeps scalars as they are spelled: YAML 1.1 would read 2:4 as the sexagesimal number 124. It makes no objects.
    Aliases are refused before they are resolved: a few lines of them stand for more than any memory holds.
    """
    if len(content) > SIZE:
        raise ValueError(f"it has {len(content)} bytes, more than {SIZE}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has an alias (*name), which a recipe may not; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError("it is nested too deep")
    node = yaml.compose(text, Loader=yaml.BaseLoader)
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("it is not a mapping of settings")
    _check_names(node)
    defaults = {key.value for key, value in node.value if _is_null(value)}
    return {name: value for name, value in yaml.load(text, Loader=yaml.BaseLoader).items() if name not in defaults}


def _check_names(node: yaml.Node) -> None:
    """Raises ValueError for a mapping, here or inside, that has a name twice, or something else in the place of one."""
    inside = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else []
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(names) < len(node.value) or len({*names}) < len(names):
            raise ValueError(f"it has a setting twice, or one without a name: {', '.join(names)}")
    for part in node.value if isinstance(node, yaml.SequenceNode) else inside:
        _check_names(part)


def _is_null(node: yaml.Node) -> bool:
    """Whether a setting has no value, and so its default: null as YAML spells it, and as the recipe in a pruning.json does."""
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULL
