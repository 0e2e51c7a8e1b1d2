"""What other commands wrote, read back: output folders of ``prune``, ``apply``, ``compare``, ``pack``, and JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniprune.artefacts.reports import ExpertRemoval, Permutation, Pruning
from uniprune.comparison.results import COMPARISON, Comparison
from uniprune.errors import InputError
from uniprune.evaluation.results import Evaluation, Sweep
from uniprune.runtime.layout import Packing
from uniprune.speed.results import Speeds
from uniprune.storage import strict_json
from uniprune.storage.files import REPORT

Result = Pruning | Evaluation | Sweep | Comparison | Speeds | Packing
KINDS: dict[str, type[Result]] = {kind.kind_name(): kind for kind in (Pruning, Evaluation, Sweep, Comparison, Speeds, Packing)}

MEASURED = ("perplexity", "tasks", "lm_eval", "closeness", "generations")


@dataclass(frozen=True)
class ResultFile:
    """A file and what it says: ``data`` as it is written, ``result`` checked. ``path``: the folder, if it was one."""

    path: Path
    data: dict[str, Any]
    result: Result

    @property
    def kind(self) -> str:
        return self.result.kind


def read(path: Path) -> ResultFile:
    """A source of a report: an output folder or a JSON file. Raises InputError that names the file if it is neither."""
    if path.name in (REPORT, COMPARISON):
        path = path.parent
    file: Path | None
    if path.is_dir():
        file = next((path / name for name in (REPORT, COMPARISON) if (path / name).is_file()), None)
        if file is None:
            raise InputError(f"{path} has no {REPORT}; give an output folder of prune or apply, or a JSON file of evaluate")
    else:
        file = path
    try:
        data = strict_json.parse(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except strict_json.NoObject:
        raise _no_result(file, "no object") from None
    except ValueError as error:
        why = str(error).removeprefix("not JSON ").strip("()")
        raise InputError(
            f"{file} is not JSON ({why}); give what uniprune evaluate --json prints, or an output folder"
        ) from None
    result: Result = _kind(file, data).checked(file, data)
    if isinstance(result, Sweep) and not result.rows:
        raise InputError(f"{file} is damaged: rows: there are none yet; go on with it, uniprune sweep --resume")
    return ResultFile(path, data, result)


def read_all(paths: Sequence[Path]) -> list[ResultFile]:
    """Every source once, in the order given."""
    if not paths:
        raise InputError("a report needs sources; give output folders of prune or apply, or JSON files of evaluate")
    return list({source.path.resolve(): source for source in map(read, paths)}.values())


def _kind(file: Path, data: Mapping[str, Any]) -> type[Result]:
    """What a file says that it is; or if it is from before files said so, what its fields tell."""
    if "kind" in data:
        if isinstance(data["kind"], str) and data["kind"] in KINDS:
            return KINDS[data["kind"]]
        if data["kind"] == Permutation.kind_name():
            raise InputError(f"{file} has channels in another order and no zeros; prune it, and give that output")
        if data["kind"] == ExpertRemoval.kind_name():
            raise InputError(f"{file} has fewer experts, which a report of sparsity does not show; give results of evaluate")
    elif {"sweep", "rows"} <= data.keys():
        return Sweep
    elif {"model", "pattern", "matrices"} <= data.keys():
        return Pruning
    elif "model" in data and any(name in data for name in MEASURED):
        return Evaluation
    raise _no_result(file, f"an object with {', '.join(map(repr, list(data)[:4])) or 'nothing'}")


def _no_result(file: Path, seen: str) -> InputError:
    return InputError(f"{file} is no result of prune, apply, evaluate, sweep, compare, bench or pack: it is {seen[:300]}")
