"""The command line. It parses, calls one verb of the pipeline and prints; the rest is loaded only when a verb runs."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from uniprune.cli import bench as cli_bench
from uniprune.cli import evaluate as cli_evaluate
from uniprune.cli import masks as cli_masks
from uniprune.cli import report as cli_report
from uniprune.cli.options import (
    Allow,
    AsJson,
    BudgetTokens,
    Config,
    Controller,
    Device,
    Dtype,
    Exclude,
    Hardware,
    Include,
    Length,
    MaxMemory,
    Metric,
    MisfitsOption,
    Model,
    Output,
    Overwrite,
    PushToHub,
    Refine,
    Resume,
    Rules,
    SaveTokens,
    ScopeOption,
    Seed,
    Sequential,
    Size,
    Sparsity,
    Steps,
    Text,
    WindowsOption,
)
from uniprune.cli.terminal import Bars, quiet, show
from uniprune.errors import InputError, UniPruneError

if TYPE_CHECKING:
    from uniprune.job.recipe import Recipe


# What is wrong with a path, not with a machine.
PATHS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS}

app = typer.Typer(
    name="uniprune",
    help="Prunes language models after training: calibrate once, cut masks of any sparsity, keep every kept weight's bits.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def plan(
    model: Model,
    sparsity: Sparsity = None,
    size: Size = None,
    scope: ScopeOption = None,
    allow: Allow = None,
    rules: Rules = None,
    hardware: Hardware = None,
    misfits: MisfitsOption = None,
    windows: WindowsOption = None,
    length: Length = None,
    dtype: Dtype = None,
    device: Device = None,
    max_memory: MaxMemory = None,
    include: Include = None,
    exclude: Exclude = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show what would be pruned, what fits the pattern, and what it would take; touch nothing."""
    recipe = _recipe(**locals())
    from uniprune.cli import tables
    from uniprune.entrypoints import plan as entry_plan

    found = entry_plan.plan(model, recipe, device=device, max_memory=_bytes(max_memory))
    show(found.record(), as_json, tables.plan_table(found), *tables.plan_lines(found))


@app.command()
def calibrate(
    model: Model,
    output: Output,
    sparsity: Sparsity = None,
    scope: ScopeOption = None,
    allow: Allow = None,
    rules: Rules = None,
    hardware: Hardware = None,
    misfits: MisfitsOption = None,
    metric: Metric = None,
    controller: Controller = None,
    steps: Steps = None,
    budget_tokens: BudgetTokens = None,
    text: Text = None,
    windows: WindowsOption = None,
    length: Length = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    include: Include = None,
    exclude: Exclude = None,
    config: Config = None,
    save_tokens: SaveTokens = None,
    max_memory: MaxMemory = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score every prunable weight: for any sparsity, or better for one if --sparsity names it."""
    recipe = _recipe(**locals())
    from uniprune.entrypoints import calibrate as entry_calibrate

    with Bars() as progress:
        facts = entry_calibrate.calibrate(
            model,
            recipe,
            output,
            overwrite=overwrite,
            resume=resume,
            max_memory=_bytes(max_memory),
            device=device,
            save_tokens=save_tokens,
            progress=progress,
        )
    if not facts:  # another process of the run has them
        return
    result = {"output": str(output), **{key: value for key, value in facts.items() if key != "transposed"}}
    show(result, as_json, f"{output}: scores of {facts['base_name']} by {facts['recipe']['metric']}")


@app.command()
def mask(
    scores: Annotated[Path, typer.Argument(help="Scores, as calibrate writes them.")],
    sparsity: Annotated[str, typer.Option("--sparsity", "-s", help="A level to remove (0.6), or N:M kept (2:4).")],
    output: Output,
    scope: ScopeOption = None,
    allow: Allow = None,
    rules: Rules = None,
    hardware: Hardware = None,
    misfits: MisfitsOption = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Cut masks of one sparsity from scores."""
    from uniprune.entrypoints import mask as entry_mask

    budget = {"allow": allow, "rules": rules, "hardware": hardware, "misfits": misfits}
    given = {key: value for key, value in budget.items() if value}
    result = entry_mask.mask(scores, sparsity, output, scope=scope, overwrite=overwrite, **given)  # type: ignore[arg-type]
    show({"output": str(output), **result}, as_json, f"{output}: {result['pattern']}, sparsity {result['sparsity']:.4f}")


@app.command()
def apply(
    model: Model,
    masks: Annotated[Path, typer.Argument(help="Masks, as mask writes them.")],
    output: Output,
    dtype: Dtype = None,
    force: Annotated[bool, typer.Option("--force", help="Apply masks that were made for other weights.")] = False,
    push_to_hub: PushToHub = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the pruned checkpoint of a model from masks."""
    from uniprune.entrypoints import apply as entry_apply

    push = _push(push_to_hub, overwrite)
    result = entry_apply.apply(model, masks, output, overwrite=overwrite, force=force, dtype=dtype)
    _show_pruned(output, result | push(output), as_json)


@app.command()
def prune(
    model: Model,
    output: Output,
    sparsity: Sparsity = None,
    size: Size = None,
    scope: ScopeOption = None,
    allow: Allow = None,
    rules: Rules = None,
    hardware: Hardware = None,
    misfits: MisfitsOption = None,
    metric: Metric = None,
    controller: Controller = None,
    steps: Steps = None,
    budget_tokens: BudgetTokens = None,
    sequential: Sequential = None,
    refine: Refine = None,
    text: Text = None,
    windows: WindowsOption = None,
    length: Length = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    include: Include = None,
    exclude: Exclude = None,
    config: Config = None,
    save_tokens: SaveTokens = None,
    max_memory: MaxMemory = None,
    push_to_hub: PushToHub = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Calibrate, cut masks and write the pruned checkpoint, in one go."""
    recipe = _recipe(**locals())
    from uniprune.entrypoints import prune as entry_prune

    push = _push(push_to_hub, overwrite)
    with Bars() as progress:
        result = entry_prune.prune(
            model,
            recipe,
            output,
            overwrite=overwrite,
            resume=resume,
            max_memory=_bytes(max_memory),
            device=device,
            save_tokens=save_tokens,
            progress=progress,
        )
    _show_pruned(output, result | push(output) if result else result, as_json)


@app.command()
def permute(
    model: Model,
    output: Output,
    sparsity: Annotated[str, typer.Option("--sparsity", "-s", help="The N:M pattern that the order is to suit.")] = "2:4",
    metric: Metric = None,
    text: Text = None,
    windows: WindowsOption = None,
    length: Length = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    include: Include = None,
    exclude: Exclude = None,
    max_memory: MaxMemory = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the same dense model with its hidden channels in an order that suits N:M, to prune that one."""
    recipe = _recipe(None, **locals())
    from uniprune.entrypoints import permute as entry_permute

    with Bars() as progress:
        result = entry_permute.permute(
            model, recipe, output, overwrite=overwrite, max_memory=_bytes(max_memory), device=device, progress=progress
        )
    before, after = (fmean(found[key] for found in result["permuted"].values()) for key in ("kept_before", "kept_after"))
    line = f"{output}: {len(result['permuted'])} MLPs; {result['pattern']} keeps {after:.4f} of their scores, not {before:.4f}"
    show({"output": str(output), **result}, as_json, line)


app.command()(cli_evaluate.evaluate)
app.command()(cli_evaluate.sweep)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, as prune writes it.")],
    output: Output,
    level: Annotated[int, typer.Option(help="Level of zstandard, for files that are no weights.")] = 3,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Pack a pruned checkpoint, without loss, into one smaller file (.upz)."""
    from uniprune.artefacts import archive

    with Bars() as progress:
        result = archive.pack(folder, output, overwrite=overwrite, level=level, progress=progress)
    line = f"{output}: {result['archive_bytes'] / 1e6:.1f} MB, {result['ratio']:.3f} of {folder}"
    show({"output": str(output), **result}, as_json, line)


@app.command()
def unpack(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Archive, as pack writes it.")],
    output: Output,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Unpack an archive into the folder it was made of, and verify every file."""
    from uniprune.artefacts import archive

    with Bars() as progress:
        result = archive.unpack(path, output, overwrite=overwrite, progress=progress)
    line = f"{output}: {result['files']} files, {result['bytes'] / 1e6:.1f} MB, verified"
    show({"output": str(output), **result}, as_json, line)


@app.command("card")
def card_(
    folder: Annotated[Path, typer.Argument(help="Output folder of prune or apply.")],
    results: Annotated[list[Path] | None, typer.Argument(help="Results of evaluate for it, to show in the card.")] = None,
    push_to_hub: PushToHub = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's model card anew, with results; and upload the folder if asked to."""
    from uniprune.reporting import model_card

    push = _push(push_to_hub, overwrite)
    text = model_card.rewrite(folder, results or [], overwrite=overwrite)
    result = {"card": str(folder / model_card.CARD), "text": text, **push(folder)}
    lines = [f"{result['card']}: written", *([f"uploaded to {result['uploaded']}"] if "uploaded" in result else [])]
    show(result, as_json, *lines)


app.command()(cli_bench.bench)
app.command()(cli_report.report)
app.add_typer(cli_masks.app, name="masks")


def main() -> NoReturn:
    """Runs the command line: exit code 0 done, 2 bad input (one line on stderr), 1 anything else."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 1)
    except InputError as error:
        _fail(str(error), 2)
    except UniPruneError as error:
        _fail(str(error), 1)
    except OSError as error:  # a full disk, a folder that may not be written
        if error.strerror is None:
            raise
        if error.errno in PATHS:
            _fail(f"{str(error.filename)[-200:]}: {error.strerror}; give another path", 2)
        _fail(f"{error.filename or 'the disk'}: {error.strerror}; what was complete is kept, and --resume goes on", 1)
    except Exception as error:
        # typer has its own copy of click's usage errors, and exports no base class of them.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message() or "a verb is missing; see uniprune --help", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _recipe(config: Path | None, **arguments: Any) -> Recipe:
    """The recipe of a verb's arguments: those that are settings and were given, over what the recipe file says."""
    quiet()
    from uniprune.job.recipe import Recipe

    given = {key: arguments[key] for key in Recipe.model_fields.keys() & arguments if arguments[key] not in (None, [])}
    return Recipe.load(config, **given) if config else Recipe(**given)


def _bytes(size: str | None) -> int | None:
    from uniprune.common.formatting import parse_size

    return None if size is None else parse_size(size)


def _show_pruned(output: Path, result: dict[str, Any], as_json: bool) -> None:
    from uniprune.common import formatting

    if not result:  # another process of the run has them
        return
    lines = [f"{output}: {result['pattern']}, sparsity {result['sparsity']:.4f} in {len(result['matrices'])} matrices"]
    lines += [f"uploaded to {result['uploaded']}"] if "uploaded" in result else []
    show({"output": str(output), **result}, as_json, *lines, formatting.NOTE)


def _push(repository: str | None, overwrite: bool) -> Callable[[Path], dict[str, Any]]:
    """What uploads an output folder, if that was asked for; it is checked now whether that can succeed."""
    if repository is None:
        return lambda folder: {}
    from uniprune.reporting import model_card

    model_card.check_push(repository)
    return lambda folder: {"uploaded": model_card.push(folder, repository, overwrite=overwrite)}


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write("error: " + " ".join(message.split())[:2000] + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
