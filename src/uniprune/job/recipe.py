"""What a run is to do, as data: the flags of the command line, the keys of a recipe file, the record in every report."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from uniprune.common.formatting import parse_size
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.published import Paper
from uniprune.errors import InputError
from uniprune.saliency import metrics
from uniprune.saliency import refine as refine_module
from uniprune.sparsity import hardware as hardware_module
from uniprune.sparsity import patterns
from uniprune.sparsity.constraints import Mixed, Rule, Ruled, choice
from uniprune.sparsity.hardware import Misfits
from uniprune.sparsity.patterns import NM, Pattern, Scope

Controller = Literal["none", "feedback", "paper"]
WINDOWS, LENGTH = 128, 512
SIZE, DEPTH = 1 << 20, 4  # of a recipe: bytes, collections in each other; at most


class Recipe(BaseModel):
    """All settings of a pruning run; a value that is left out is the default of the command line.

    Raises InputError that names the setting at fault.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: str | None = None
    """A level (``0.6``: the fraction to remove) or a pattern (``2:4``: N of every M inputs are kept)."""
    size: str | None = None
    """Instead of a level the most bytes that the model's archive may have (``120MB``), see uniprune.artefacts.archive_size."""
    scope: Scope | None = None
    """Budget group of a level: ``row``, ``matrix``, ``block`` or ``model`` (the default with the controller, else ``row``)."""
    allow: tuple[str, ...] = ()
    """N:M patterns, and ``dense``, to choose from for each matrix, so that together they remove the level ``sparsity``."""
    rules: tuple[str, ...] = ()
    """What holds for some matrices, ``REGEX=WHAT``, the first that matches: ``dense``, a pattern, a level, or a range
    ``0.3..0.7`` of what the common budget may remove."""
    hardware: str = "any"
    """The profile of kernels that every pruned matrix must suit, see uniprune.sparsity.hardware."""
    misfits: Misfits = "refuse"
    """What a matrix gets that cannot have the pattern: ``refuse`` is an error, or ``dense``, or ``unstructured``."""
    metric: str = "wanda"
    """Local saliency, with hyper-parameters if wanted: ``ria:a=0.5``."""
    controller: Controller | None = None
    """What corrects the local saliency: mirror descent on the loss of the pruned model (``feedback``, the default), the
    published objective (``paper``), or ``none`` (the default with ``sequential``)."""
    tuning: dict[str, float] = {}
    """Settings of the controller by name: fields of ``mirror_descent.MirrorDescent`` or ``paper.Paper``."""
    steps: int | None = Field(None, ge=1)
    """Steps of the controller, 1024 tokens (``paper``: one window) each; by default as many as ``budget_tokens`` allows."""
    budget_tokens: int | None = Field(None, ge=1024)
    """Tokens that the controller descends on, repeats included; by default each calibration window once."""
    refine: bool = False
    """Then exchange weights by each matrix's reconstruction error; implies ``sequential``."""
    sequential: bool = False
    """Score each block on the outputs of the pruned blocks before it."""
    text: str = "builtin"
    """Calibration text: a name or a path, see uniprune.data.text."""
    windows: int | None = Field(None, ge=1)
    """Number of calibration windows; by default 128, or all of a token file."""
    length: int | None = Field(None, ge=2)
    """Tokens per window; by default 512, or what a token file has."""
    seed: int = Field(0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type to compute in; the output keeps the checkpoint's own."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @field_validator("sparsity", "size", mode="before")
    @classmethod
    def _spelled(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    @field_validator("include", "exclude", "allow", "rules", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def __init__(self, **settings: Any) -> None:
        if "refine" in settings:  # as it is spelled, and nobody's no to sequential is overridden
            settings = {"sequential": settings["refine"]} | settings
        try:
            super().__init__(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "recipe"
            known = f"; known settings: {', '.join(type(self).model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise InputError(f"{where} = {first['input']!r:.200}: {first['msg']}{known}") from None
        self.parsed_metric()
        if self.refine and not self.sequential:
            raise InputError("--refine works block after block, but sequential is set to false; leave one of them out")
        if self.sequential and self.corrected:
            flag = "--refine" if self.refine else "--sequential"
            raise InputError(f"{flag} and --controller {self.controller} exclude each other; use one of them")
        self.parsed_tuning()
        hardware_module.parse(self.hardware)
        if self.size is not None:
            self._check_size()
        elif self.sparsity is None and (self.allow or self.rules):
            raise InputError("--allow and --rule shape a budget; give it with --sparsity, e.g. 0.45, or --size")
        if self.sparsity is not None:
            pattern = self.pattern()
            if self.refine:
                refine_module.check(pattern)
            if self.sequential and not pattern.local:
                raise InputError(f"--sequential cuts block after block, but {pattern} needs all scores; use another --scope")

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> Recipe:
        """A recipe from a YAML file; ``overrides`` win over what the file says."""
        if not path.is_file():
            raise InputError(f"recipe {path} is not a file; give a YAML file with settings")
        try:
            data = _read_yaml(path.read_bytes())
        except OSError as error:
            raise InputError(f"recipe {path} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"recipe {path} is not a recipe: {' '.join(str(error).split())[:300]}") from None
        return cls(**{**data, **overrides})

    def _check_size(self) -> None:
        parse_size(str(self.size))
        if self.sparsity is None:
            self.at(self.lowest)  # what does not go with a level does not go with a size
        elif ":" in self.sparsity:
            raise InputError(f"--size does not go with --sparsity {self.sparsity}: a fixed pattern has one size; drop --size")
        else:
            raise InputError(f"--size {self.size} and --sparsity {self.sparsity} are two budgets; drop --sparsity, or --size")

    def at(self, level: float) -> Recipe:
        """The recipe with a level in place of the size."""
        return Recipe(**self.model_dump(exclude={"size"}) | {"sparsity": f"{level:g}"})

    @property
    def lowest(self) -> float:
        """The lowest level that could be asked for."""
        return min((pattern.sparsity for pattern in self._choices), default=0.0)

    @property
    def _choices(self) -> tuple[NM, ...]:
        return tuple(choice(spec.strip()) for text in self.allow for spec in text.split(","))

    def pattern(self) -> Pattern:
        """The sparsity pattern; InputError if none was asked for."""
        if self.sparsity is None:
            raise InputError("no sparsity given; use --sparsity 0.5, --sparsity 2:4 or --size 120MB")
        base = patterns.parse(self.sparsity, self.scope, default="model" if self.comparable else "row")
        if self.allow:
            if self.scope is not None or not isinstance(base, patterns.Unstructured):
                raise InputError(f"--allow goes with a level such as 0.45 and no scope, not with {base}")
            base = Mixed(base.sparsity, self._choices)
        return Ruled(base, tuple(map(Rule.parse, self.rules))) if self.rules else base

    @property
    def resolved_controller(self) -> Controller:
        return self.controller or ("none" if self.sequential else "feedback")

    @property
    def corrected(self) -> bool:
        """Whether a controller runs."""
        return self.resolved_controller != "none"

    @property
    def comparable(self) -> bool:
        """Whether the scores of all matrices will be on one scale."""
        return self.resolved_controller == "feedback"

    def parsed_tuning(self) -> MirrorDescent | Paper:
        """The settings of the controller."""
        kind: type[MirrorDescent] | type[Paper] = Paper if self.resolved_controller == "paper" else MirrorDescent
        defaults: dict[str, Any] = dataclasses.asdict(kind())
        for name in self.tuning:
            if name not in defaults:
                raise InputError(f"tuning: {name!r} is not a setting of {kind.__name__}; it has: {', '.join(defaults)}")
        for name, value in self.tuning.items():
            if not math.isfinite(value) or value != type(defaults[name])(value):
                raise InputError(f"tuning: {name} = {value} is not a {type(defaults[name]).__name__}")
        return kind(**{name: type(defaults[name])(value) for name, value in self.tuning.items()})

    def step_tokens(self, length: int) -> int:
        """Tokens of a step of the controller on windows of ``length``."""
        return max(length, self.parsed_tuning().step_tokens(length))

    def parsed_metric(self) -> metrics.Metric:
        return metrics.parse(self.metric, self.seed)

    def record(self) -> dict[str, Any]:
        """The settings as JSON data, defaults included; ``Recipe(**record)`` is the same recipe."""
        resolved = {"metric": metrics.spell(self.parsed_metric()), "controller": self.resolved_controller}
        return self.model_dump(mode="json") | resolved


def _read_yaml(content: bytes) -> dict[str, Any]:
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
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if len(names) < len(node.value) or len({*names}) < len(names):
        raise ValueError(f"it has a setting twice, or one without a name: {', '.join(names)}")
    return dict(yaml.load(text, Loader=yaml.BaseLoader))
