"""The arguments and options of the command line, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Zero-shot accuracy on these, by comma: piqa, arc_easy, ... or .jsonl files, whose fields tell the format."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Ask the first so many questions of each task. [default: all]")]
Against = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Compare with this model's answers and predictions: the dense one, say.")
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="With --against: let both go on with this; may be repeated. [default: three from the text]"),
]
NewTokens = Annotated[int | None, typer.Option(help="With --against: length of what both write; 0 for nothing. [default: 40]")]
Check = Annotated[
    Path | None, typer.Option(metavar="RESULT", help="Measure again what this result says; exit code 1 if it differs.")
]
ResultFile = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result, as JSON.")]
LmEval = Annotated[
    str | None, typer.Option("--lm-eval", help="Run these tasks, by comma, through lm-evaluation-harness, if it is installed.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Type to compute in: auto, float32, bfloat16 or float16. [default: auto, the model's if that is fast here]"
    ),
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
PushToHub = Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Then upload the output folder there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run, if there is one.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory to use, e.g. 8GB; a model that needs more is read block by block. [default: what is free]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
