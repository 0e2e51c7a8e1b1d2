"""The command ``apply``: a masks file and a model -> a pruned checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from uniprune.artefacts import writer
from uniprune.artefacts.binding import check_shapes, fingerprint
from uniprune.artefacts.mask_tools import CheckedMasks, check_keeps_type, check_orientation
from uniprune.artefacts.masks import write_masks
from uniprune.artefacts.reports import ModelFacts, Pruning, realised
from uniprune.checkpoints.origin import Origin, called, resolve
from uniprune.checkpoints.tokenizer import load_tokenizer
from uniprune.common.provenance import Stopwatch, sha256, versions
from uniprune.models.loading import Loaded, find_names, load_weights, parse_dtype
from uniprune.models.matrices import find_matrices
from uniprune.reporting import model_card
from uniprune.sparsity.structure import claimed
from uniprune.speed.outlook import with_speed
from uniprune.storage import files, runs


def apply(
    source: str | Path,
    masks: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    force: bool = False,
    dtype: str | None = None,
) -> Pruning:
    """Writes the pruned checkpoint of a model from a masks file; returns the report.

    dtype: only for sources that are not safetensors already (GGUF).
    Raises MismatchError if the masks were made for another model. force: apply them all the same, if its matrices have the
    shapes; the report then names those whose weights differ, and the masks file in the output is bound to this model.
    """
    masks, output = files.path_of(masks), files.path_of(output)
    watch, asked = Stopwatch(), parse_dtype(dtype)
    origin = resolve(source)
    check_keeps_type(origin, dtype)
    files.check_output_folder(output, overwrite, origin.path, inputs=[masks])
    file = CheckedMasks(masks)
    with watch("prepare"):
        loaded: Loaded | Origin = origin
        if origin.files:
            _check_shapes(origin, file)
            if force:  # else the weights themselves must be the same
                check_orientation(origin, file)
        else:
            weights = load_weights(origin, asked, torch.device("cpu"))
            loaded = Loaded(weights, load_tokenizer(origin), origin)
            file.facts.check_matrices(file.shapes, find_matrices(weights), masks, origin)
        size = sum(parameter.nbytes for parameter in loaded.model.parameters()) if isinstance(loaded, Loaded) else 0
        needed = writer.checkpoint_bytes(origin, size) + masks.stat().st_size
        files.check_disk_space(output, needed, runs.held(output))
    found: dict[str, str] = {}

    def check(name: str, digest: str) -> None:
        found[name] = digest
        if not force:
            file.facts.check_digests({name: digest}, masks, origin, "give that model, or --force")

    with (
        runs.open_run(output, {"command": "apply"}, overwrite=overwrite) as run,
        files.new_folder(output, run.folder) as folder,
    ):
        with watch("write"):
            (folder / writer.MASKS).parent.mkdir()
            shutil.copyfile(masks, folder / writer.MASKS)
            writer.write_checkpoint(loaded, file, folder, check)
            differs = sorted(name for name in found if found[name] != file.facts.digests[name])
            if differs:  # from now on they are this model's
                own = {"base": fingerprint(found), "base_name": called(str(origin)), "digests": found}
                facts = file.facts.model_copy(update=own)
                write_masks(folder / writer.MASKS, file.items(), file.shapes, facts, file.facts.pattern)
        removed = file.removed()
        report = Pruning(
            model=ModelFacts.of(origin, fingerprint(found)),
            pattern=file.facts.pattern,
            structure=claimed(file.facts.pattern),
            **realised(removed, file.shapes),
            masks_sha256=sha256(folder / writer.MASKS),
            prunable=file.facts.prunable,
            differs=differs,
            versions=versions(),
            seconds=watch.seconds,
        )
        with watch("time"):
            report = with_speed(report, loaded, torch.device("cpu"))
        report = report.model_copy(update={"seconds": watch.seconds})
        model_card.complete(folder, report, origin)
    return report


def _check_shapes(origin: Origin, file: CheckedMasks) -> None:
    """Raises MismatchError unless the files have tensors of the masks' names and shapes: for that no model is made.

    InputError if they are quantised in a way that is not understood.
    """
    assert origin.files is not None
    missing = find_names(origin, file)
    there = {name: origin.files.region(name).shape for name in file if name not in missing}
    wanted = {name: file.stored(name) for name in file}
    if there != wanted:
        origin.files.check_understood()
    check_shapes(wanted, there, file.path, origin)
