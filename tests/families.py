"""Families of models as tiny random ones of the real architecture, and what each goes through: the table in docs/models.md.

``make models`` writes the table, ``python tests/families.py FAMILY`` one row; tests/models/test_families.py goes through every
row again and compares.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from transformers import AutoConfig

import uniprune
from small_models import EXCLUDED, FAMILIES, VOCABULARY, kind_of, save, tiny
from uniprune.artefacts import masks as masks_file
from uniprune.checkpoints.checkpoint import Files
from uniprune.data.windows import Windows, save_windows
from uniprune.errors import UniPruneError
from uniprune.models.blocks import text_alone
from uniprune.models.matrices import find_blocks, left_dense

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: written by make models -->", "<!-- /table -->"


class Walk:
    """One model through all steps; where uniprune refuses, a step raises UniPruneError, and else if something is wrong."""

    def __init__(self, model: torch.nn.Module, exclude: str | tuple[()], folder: Path) -> None:
        """model: as :meth:`source`, a checkpoint in ``folder``, would be loaded. exclude: what its recipes do."""
        self.model, self.folder, self.source = model, folder, folder / "model"
        self.ids = torch.randint(0, VOCABULARY, (9, 32), generator=torch.Generator().manual_seed(0))
        save_windows(Windows(self.ids, "random", 9, "none"), folder / "tokens.safetensors")
        common = {"sparsity": "2:4", "text": str(folder / "tokens.safetensors"), "exclude": exclude}
        self.recipes = {
            "local": uniprune.Recipe(controller="none", **common),
            "controller": uniprune.Recipe(tuning={"batch_tokens": 128}, **common),
        }
        self.outputs: dict[str, Path] = {}

    def plan(self) -> None:
        with mock.patch("uniprune.job.forecast.estimate._flops", return_value=1e9):  # this machine's speed does not matter
            check_plan(uniprune.plan(self.source, self.recipes["local"]), self.model)

    def prune(self, name: str) -> None:
        uniprune.prune(self.source, self.recipes[name], self.folder / name)
        self.outputs[name] = self.folder / name

    def mask_and_apply(self) -> None:
        scores, masks, applied = (self.folder / name for name in ("scores.safetensors", "masks.safetensors", "applied"))
        uniprune.calibrate(self.source, self.recipes["local"], scores)
        uniprune.mask(scores, "2:4", masks)
        uniprune.apply(self.source, masks, applied)
        assert same_files(applied, self.outputs["local"])

    def reload(self) -> None:
        for output in self.outputs.values():
            check_reload(self.source, output, self.ids)

    def by_key(self) -> None:
        for output in self.outputs.values():
            check_pattern(self.source, output, self.model)

    def streamed(self) -> None:
        for name, resident in self.outputs.items():
            uniprune.prune(self.source, self.recipes[name], self.folder / "streamed", overwrite=True, execution="streamed")
            assert same_files(self.folder / "streamed", resident)

    def evaluate(self) -> None:
        tokens, output = self.folder / "tokens.safetensors", self.outputs.get("local")
        found = uniprune.evaluate(output or self.source, text_source=tokens, windows=2, against=self.source, new_tokens=0)
        assert found.perplexity > 1
        assert output is None or found.sparsity > 0.4  # some are drawn with zeros (xLSTM)


STEPS = {
    "plan": Walk.plan,
    "local metric": lambda walk: walk.prune("local"),
    "controller": lambda walk: walk.prune("controller"),
    "mask and apply": Walk.mask_and_apply,
    "reload": Walk.reload,
    "N:M by key": Walk.by_key,
    "streamed": Walk.streamed,
    "evaluate": Walk.evaluate,
}


def walk(family: str, folder: Path) -> dict[str, str]:
    """What happened to a family at each step."""
    save(family, folder / "model")
    return steps(Walk(tiny(family), EXCLUDED.get(family, ()), folder))


def steps(walk: Walk) -> dict[str, str]:
    """What happened at each step: ``yes``, or why uniprune refused it. A family without a plan goes no further."""
    found: dict[str, str] = {}
    for name, step in STEPS.items():
        try:
            step(walk)
            found[name] = "yes"
        except UniPruneError as error:
            found[name] = str(error).replace(str(walk.source), "M")
            if name == "plan":
                break
    return found


def check_plan(plan, model):
    """Of the parameters in the blocks that have two dimensions or more, those neither planned nor shown as left are few."""
    assert plan.fits
    assert plan.execution == "resident"
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    blocks = find_blocks(model)[1]
    inside = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
    assert plan.prunable == sum(rows * columns for rows, columns in plan.matrices.values())
    left = left_dense(model)
    assert plan.prunable + sum(rows * columns for (rows, columns), _ in left.values()) >= 0.9 * inside
    assert list(plan.left_dense.values()).count("a router") == len(routers(blocks))


def routers(blocks):
    """Written down by name here, to tell on what is found by structure."""
    pattern = r"(^|\.)(gate|shared_expert_gate|router|router\.(classifier|proj)|gate\.wg)\.weight$"
    return [p for name, p in blocks.named_parameters() if re.search(pattern, name) and p.dim() == 2]


def check_reload(source, output, ids):
    """Plain transformers loads the output, misses nothing, passes over no more than of the source, and it computes."""
    kind = kind_of(AutoConfig.from_pretrained(source))
    model, info = kind.from_pretrained(output, output_loading_info=True)
    if beside := info.pop("unexpected_keys"):  # of the parts that see images
        assert beside == kind.from_pretrained(source, output_loading_info=True)[1]["unexpected_keys"]
    assert not any(info.values()), info
    with text_alone(model):
        assert bool(torch.isfinite(model.eval()(input_ids=ids[:1], use_cache=False).logits).all())


def check_pattern(source, output, model=None):
    """In the output's own files: under each key 2:4 zeros and the kept bits of the source; all else is the source's.

    model: whose layout says of which tensors a matrix is made that has no key of its own.
    """
    masks = masks_file.MasksFile(output / "pruning" / "masks.safetensors")
    before, after = tensors(source), tensors(output)
    assert before.keys() == after.keys()
    files, pruned = [Files(source), Files(output)], set()
    for name, mask in masks.items():
        keep = mask.T if name in masks.transposed else mask
        rows, columns = mask.shape
        assert bool((mask.reshape(rows, columns // 4, 4).sum(-1) == 2).all())
        keys, dense = matrix_in(before, name, files[0], model)
        assert torch.equal(matrix_in(after, name, files[1], model)[1], torch.where(keep, dense, 0))
        pruned |= keys
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - pruned)


def matrix_in(found, name, files, model):
    """The keys that a matrix lies under, alone, as one of a stack of experts, or in pieces, and the matrix."""
    for key in (f"{name}.weight", f"{name.partition('.')[2]}.weight"):
        if key in found:
            return {key}, found[key]
    stack, _, number = name.rpartition(".")
    key = stack if stack in found else f"{stack}.weight"
    if key in found:
        return {key}, found[key][int(number)]
    files.layout(model)
    pieces = files.region(name).pieces
    return {piece.key for piece in pieces}, files.read_matrix(name, found[pieces[0].key].dtype, torch.device("cpu"))


def tensors(folder):
    found = {}
    for file in Files(folder).shards:
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def same_files(one, other):
    files = sorted(path.name for path in one.glob("*.safetensors"))
    return files and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


# ------------------------------------------------------------------------------------------------------------ the table


def row(family: str, found: dict[str, str]) -> str:
    """A line of the table; why something was refused stands in its last column."""
    cells = [found.get(step, "") if found.get(step, "yes") == "yes" else "refused" for step in STEPS]
    notes = [f"with `--exclude {EXCLUDED[family]}`"] if family in EXCLUDED else []
    notes += dict.fromkeys(reason for reason in found.values() if reason != "yes")
    return f"| {family} | {' | '.join(cells)} | {'; '.join(notes).replace('|', '/')} |"


def rows() -> dict[str, str]:
    """The table as it is committed."""
    table = TABLE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    return {line.split("|")[1].strip(): line for line in lines}


def main(wanted: list[str]) -> None:
    """wanted: families whose rows are written again; by default all."""
    lines, known = [f"| family | {' | '.join(STEPS)} | why |", f"| --- |{' :-: |' * len(STEPS)} --- |"], rows()
    for family in FAMILIES:
        if wanted and family not in wanted and family in known:
            lines.append(known[family])
            continue
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(family, walk(family, Path(folder))))
    page = TABLE.read_text(encoding="utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    table = "\n".join(lines)
    TABLE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
