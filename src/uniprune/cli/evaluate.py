"""The verbs that measure how good models are: ``uniprune evaluate`` and ``uniprune sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from uniprune.cli.options import (
    Against,
    AsJson,
    Check,
    Device,
    Dtype,
    EvaluationLength,
    EvaluationWindows,
    Limit,
    LmEval,
    Model,
    NewTokens,
    Output,
    Overwrite,
    Prompts,
    ResultFile,
    Resume,
    ScopeOption,
    Tasks,
    Text,
)
from uniprune.cli.terminal import Bars, quiet, show
from uniprune.errors import InputError

SPARSITIES = "0.3,0.4,0.5,0.6,0.7,2:4,4:8"


def evaluate(
    model: Annotated[str | None, typer.Argument(help="Model: a folder, a .gguf file, or a hub name.")] = None,
    text: Text = None,
    length: EvaluationLength = None,
    windows: EvaluationWindows = None,
    tasks: Tasks = None,
    limit: Limit = None,
    against: Against = None,
    prompts: Prompts = None,
    new_tokens: NewTokens = None,
    lm_eval: LmEval = None,
    check: Check = None,
    dtype: Dtype = None,
    device: Device = None,
    output: ResultFile = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure the token perplexity or the zero-shot accuracy of a model or of an output folder."""
    quiet()
    from uniprune.cli import tables
    from uniprune.entrypoints import evaluate as entry_evaluate
    from uniprune.storage.files import check_output_file, write_json

    asked: dict[str, Any] = {
        "text_source": text,
        "windows": windows,
        "length": length,
        "tasks": _listed(tasks),
        "limit": limit,
        "prompts": prompts or [],
        "new_tokens": new_tokens,
        "lm_eval": _listed(lm_eval),
        "dtype": dtype,
    }
    if check and any(value not in (None, []) for value in asked.values()):
        raise InputError("--check asks what its result was asked; give beside it no more than MODEL, --against and --device")
    if model is None and not check:
        raise InputError("the argument MODEL is missing; only with --check the result names it")
    if output:
        check_output_file(output, overwrite, suffix=".json")
    with Bars() as progress:
        if check:
            result = entry_evaluate.check(check, model, against=against, device=device, progress=progress)
        else:
            assert model is not None
            result = entry_evaluate.evaluate(model, against=against, device=device, progress=progress, **asked)
    if output:
        write_json(output, result)
    if check:
        show(result, as_json, *tables.check_lines(result))
        if not result["reproduced"]:
            raise typer.Exit(1)
    else:
        show(result, as_json, *tables.evaluation_tables(result))


def sweep(
    model: Model,
    scores: Annotated[Path, typer.Argument(help="Scores file, as calibrate writes it.")],
    output: Output,
    sparsities: Annotated[str, typer.Option("--sparsities", "-s", help="Levels and N:M, by comma.")] = SPARSITIES,
    scope: ScopeOption = None,
    text: Text = None,
    length: EvaluationLength = None,
    windows: EvaluationWindows = None,
    dtype: Dtype = None,
    device: Device = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Cut masks of many sparsities from one scores file, and measure perplexity and packed size of each."""
    quiet()
    from uniprune.cli import tables
    from uniprune.entrypoints import sweep as entry_sweep

    with Bars() as progress:
        result = entry_sweep.sweep(
            model,
            scores,
            output,
            _listed(sparsities),
            scope=scope,  # type: ignore[arg-type]
            text_source=text or "builtin",
            length=length,
            windows=windows,
            dtype=dtype,
            device=device,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    show(result, as_json, tables.sweep_table(result))


def _listed(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]
