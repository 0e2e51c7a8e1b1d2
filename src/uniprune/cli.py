"""The command line. It parses, calls one verb of the pipeline and prints; the rest is loaded only when a verb runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from uniprune import masks_cli
from uniprune.errors import InputError, UniPruneError
from uniprune.terminal import Bars, quiet, show

if TYPE_CHECKING:
    from uniprune.recipe import Recipe

app = typer.Typer(
    name="uniprune",
    help="Prunes language models after training: calibrate once, cut masks of any sparsity, keep every kept weight's bits.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Model: a folder, a .gguf file, or a hub name.")]
Sparsity = Annotated[
    str | None,
    typer.Option("--sparsity", "-s", help="A level to remove (0.6; 0.8@16x16: tiles), or N:M, N of every M inputs kept (2:4)."),
]
Size = Annotated[
    str | None, typer.Option(help="Instead of a level the most that the packed model may take, e.g. 120MB; see uniprune pack.")
]
ScopeOption = Annotated[
    str | None,
    typer.Option(help="Budget group of a level: row, matrix, block or model. [default: model with the controller, else row]"),
]
Allow = Annotated[
    list[str] | None, typer.Option(help="Choose one of several N:M for each matrix, to remove a level in all: 2:4,dense.")
]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", help="REGEX=WHAT for some matrices: dense, 2:4, a level, or a range 0.3..0.7; may be repeated."),
]
Hardware = Annotated[
    str | None, typer.Option(help="Kernels that each matrix must suit: any, nvidia-semi-structured or block. [default: any]")
]
MisfitsOption = Annotated[
    str | None,
    typer.Option("--misfits", help="What a matrix gets that does not fit: refuse, dense or unstructured. [default: refuse]"),
]
Metric = Annotated[
    str | None,
    typer.Option(help="magnitude, wanda, ria:a=0.5 or stochria:a=0.5,beta=0.1. [default: wanda]"),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="builtin, wikitext2, c4, a .txt, .jsonl, .parquet or token file, or a folder of them. [default: builtin]"
    ),
]
WindowsOption = Annotated[int | None, typer.Option(help="Number of calibration windows. [default: 128]")]
Length = Annotated[int | None, typer.Option(help="Tokens per calibration window. [default: 512]")]
EvaluationWindows = Annotated[int | None, typer.Option("--windows", help="So many windows, spread evenly. [default: all]")]
EvaluationLength = Annotated[
    int | None, typer.Option("--length", help="Tokens per window. [default: 2048, or the model's context]")
]
Seed = Annotated[int | None, typer.Option(help="Draws the windows, and the metric's samples. [default: 0]")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Type to compute in: auto, float32, bfloat16 or float16. [default: auto, the model's]"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda where there is one]")]
Include = Annotated[list[str] | None, typer.Option(help="Prune only matrices whose name matches; may be repeated.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave matrices whose name matches dense; may be repeated.")]
Sequential = Annotated[
    bool | None,
    typer.Option("--sequential", help="Score each block on what the pruned blocks before it put out.", show_default=False),
]
Refine = Annotated[
    bool | None,
    typer.Option("--refine", help="Exchange weights by each matrix's reconstruction error, too.", show_default=False),
]
Controller = Annotated[
    str | None,
    typer.Option(help="Corrects the local saliency by the pruned model's loss: feedback, paper or none. [default: feedback]"),
]
Steps = Annotated[int | None, typer.Option(help="Steps of the controller, of 1024 tokens each. [default: by --budget-tokens]")]
BudgetTokens = Annotated[
    int | None, typer.Option(help="Tokens for the controller, repeats included. [default: each calibration window once]")
]
Config = Annotated[Path | None, typer.Option(help="Recipe file (YAML) with these settings; flags override it.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
SaveTokens = Annotated[Path | None, typer.Option(help="Also write the calibration windows, as a token file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run, if there is one.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory to use, e.g. 8GB; a model that needs more is read block by block. [default: what is free]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


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
    from uniprune import pipeline, report

    found = pipeline.plan(model, recipe, device=device, max_memory=_bytes(max_memory))
    show(found.record(), as_json, report.plan_table(found), *report.plan_lines(found))


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
    from uniprune import pipeline

    with Bars() as progress:
        facts = pipeline.calibrate(
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
    from uniprune import pipeline

    budget = {"allow": allow, "rules": rules, "hardware": hardware, "misfits": misfits}
    given = {key: value for key, value in budget.items() if value}
    result = pipeline.mask(scores, sparsity, output, scope=scope, overwrite=overwrite, **given)  # type: ignore[arg-type]
    show({"output": str(output), **result}, as_json, f"{output}: {result['pattern']}, sparsity {result['sparsity']:.4f}")


@app.command()
def apply(
    model: Model,
    masks: Annotated[Path, typer.Argument(help="Masks, as mask writes them.")],
    output: Output,
    dtype: Dtype = None,
    force: Annotated[bool, typer.Option("--force", help="Apply masks that were made for other weights.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the pruned checkpoint of a model from masks."""
    from uniprune import pipeline

    result = pipeline.apply(model, masks, output, overwrite=overwrite, force=force, dtype=dtype)
    _show_pruned(output, result, as_json)


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
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Calibrate, cut masks and write the pruned checkpoint, in one go."""
    recipe = _recipe(**locals())
    from uniprune import pipeline

    with Bars() as progress:
        result = pipeline.prune(
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
    _show_pruned(output, result, as_json)


@app.command()
def evaluate(
    model: Model,
    text: Text = None,
    length: EvaluationLength = None,
    windows: EvaluationWindows = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the token perplexity of a model or of an output folder."""
    quiet()
    from uniprune import pipeline, report

    with Bars() as progress:
        result = pipeline.evaluate(
            model,
            text_source=text or "builtin",
            windows=windows,
            length=length,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    show(result, as_json, report.evaluation_table({model: result}))


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, as prune writes it.")],
    output: Output,
    level: Annotated[int, typer.Option(help="Level of zstandard, for files that are no weights.")] = 3,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Pack a pruned checkpoint, without loss, into one smaller file (.upz)."""
    from uniprune import archive

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
    from uniprune import archive

    with Bars() as progress:
        result = archive.unpack(path, output, overwrite=overwrite, progress=progress)
    line = f"{output}: {result['files']} files, {result['bytes'] / 1e6:.1f} MB, verified"
    show({"output": str(output), **result}, as_json, line)


app.add_typer(masks_cli.app, name="masks")


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
    from uniprune.recipe import Recipe

    given = {key: arguments[key] for key in Recipe.model_fields.keys() & arguments if arguments[key] not in (None, [])}
    return Recipe.load(config, **given) if config else Recipe(**given)


def _bytes(size: str | None) -> int | None:
    from uniprune.forecast import parse_size

    return None if size is None else parse_size(size)


def _show_pruned(output: Path, result: dict[str, Any], as_json: bool) -> None:
    from uniprune import report

    if not result:  # another process of the run has them
        return
    lines = f"{output}: {result['pattern']}, sparsity {result['sparsity']:.4f} in {len(result['matrices'])} matrices"
    show({"output": str(output), **result}, as_json, lines, report.NOTE)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
