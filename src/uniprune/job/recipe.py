"""What a run is to do, as data: the flags of the command line, the keys of a recipe file, the record in every report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr, ValidationError

from uniprune.common import fields
from uniprune.common.formatting import parse_size
from uniprune.common.options import fault
from uniprune.controller import controllers
from uniprune.controller.protocol import LOCAL, Controller, Cost
from uniprune.data import sources
from uniprune.errors import InputError
from uniprune.job.settings import Method, Settings
from uniprune.saliency import metrics
from uniprune.saliency.metrics import Metric
from uniprune.saliency.refine import check
from uniprune.sparsity.hardware import parse
from uniprune.sparsity.patterns import spelling
from uniprune.sparsity.patterns.mixed import Mixed, choice
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.patterns.ruled import Rule, Ruled
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.structure import settings as settings_of
from uniprune.storage import recipe_file

if TYPE_CHECKING:
    from typing_extensions import Self


def check_recipe(recipe: object) -> None:
    """Raises InputError for what is no recipe."""
    if not isinstance(recipe, Recipe):
        raise InputError(f"the recipe is a {type(recipe).__name__}; give a Recipe, e.g. Recipe(sparsity=0.5), or Recipe(**it)")


PATTERN = (
    "sparsity",
    "local",
    "by_row",
    "sample_group",
    "pattern_of",
    "unsupported",
    "removes",
    "prepare",
    "prepare_from_sample",
)  # what an object has that is one


class Recipe(Settings):
    """All settings of a pruning run, as ``settings`` describes them; a value that is left out has its default.

    ``sparsity``, ``metric`` and ``controller`` may be objects instead of their spelling, also of classes of your own:
    ``NM(2, 4)``, ``RIA(a=0.3)``, ``MirrorDescent(step_size=0.006)``.
    Raises InputError that names the setting at fault, also for settings that do not go together.
    """

    _metric: Metric = PrivateAttr()
    _controller: Controller | None = PrivateAttr()

    def __init__(self, **settings: Any) -> None:
        if "refine" in settings:  # and nobody's no to sequential is overridden
            settings = {"sequential": Method.of(refine=settings["refine"]).refine} | settings
        try:
            super().__init__(**_in_words(_without_type(self.named(settings))))
        except ValidationError as error:
            raise InputError(fault(error, type(self))) from None
        self._parse()
        if self.tuning and not isinstance(self.controller, str | None):
            raise InputError("tuning (--set) is for a controller that is given by name; set the fields of the object instead")
        if self.refine and not self.sequential:
            raise InputError("--refine works block after block, but sequential is set to false; leave one of them out")
        if self.sequential and self.uses_controller:
            flag = "--refine" if self.refine else "--sequential"
            name = controllers.name_of(self._controller)
            raise InputError(f"{flag} and --controller {name} exclude each other; use one of them")
        parse(self.hardware)
        sources.parse(self.text)
        self._check_experts()
        if self.size is not None:
            self._check_size()
        elif self.sparsity is None and (given := self._given("scope", "allow", "rules", "hardware", "unsupported")):
            raise InputError(f"{', '.join(given)}: these shape a budget; give it with --sparsity, e.g. 0.45, or --size")
        if self.sparsity is not None:
            pattern = self.pattern()
            if self.refine:
                check(pattern)
            if self.sequential and not pattern.local:
                raise InputError(f"--sequential cuts block after block, but {pattern} needs all scores; use another --scope")

    def _parse(self) -> None:
        """Makes metric and controller of their spelling, once. Raises InputError for what is neither."""
        self._metric = metrics.parse(self.metric, self.seed) if isinstance(self.metric, str) else self.metric
        metrics.check(self._metric)
        name = self.controller
        if name is None:
            name = "none" if self.sequential or isinstance(self._metric, metrics.REAP) else "feedback"
        self._controller = controllers.parse(name, self.tuning) if isinstance(name, str) else name
        if self._controller is not None:
            controllers.check(self._controller)

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> Recipe:
        """A recipe from a YAML file; ``overrides`` win over what the file says. Raises InputError that names the file."""
        data, overrides = cls.named(recipe_file.read(path)), cls.named(overrides)
        if isinstance(tuning := data.get("tuning"), dict) and "tuning" in overrides:
            overrides["tuning"] = tuning | overrides["tuning"]  # setting by setting
        try:
            return cls(**(data | overrides))
        except InputError as error:
            raise InputError(f"recipe {path}: {error}") from None

    def _check_experts(self) -> None:
        """Raises InputError for settings that do not go with whole experts, or go with nothing else."""
        if isinstance(self._metric, metrics.REAP) and (self.experts is None or self.uses_controller):
            raise InputError("--metric reap scores whole experts by themselves; give it with --experts and --controller none")
        if self.experts is None:
            return
        budgets = ("sparsity", "size", "scope", "allow", "rules", "hardware", "unsupported")
        if given := self._given(*budgets, "sequential", "refine", "include", "exclude"):
            raise InputError(
                f"--experts removes whole experts of all layers and nothing else; leave out {', '.join(given)}, and prune its "
                "output afterwards"
            )

    def _given(self, *names: str) -> list[str]:
        """Those of the settings that are not as they are by default."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) not in (False, fields[name].default)]

    def _check_size(self) -> None:
        parse_size(str(self.size))
        if self.sparsity is None:
            self.at(self.lowest)  # what does not go with a sparsity does not go with a size
        elif not isinstance(self.sparsity, str) or ":" in self.sparsity:
            raise InputError(f"--size does not go with --sparsity {self.sparsity}: a fixed pattern has one size; drop --size")
        else:
            raise InputError(f"--size {self.size} and --sparsity {self.sparsity} are two budgets; drop --sparsity, or --size")

    def replace(self, **changes: Any) -> Recipe:
        """The recipe with other settings. Raises InputError as a new one does."""
        return type(self)(**self.given() | changes)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, which checks nothing; :meth:`replace` does."""
        copy = super().model_copy(update=update, deep=deep)
        copy._parse()
        return copy

    def at(self, sparsity: float) -> Recipe:
        """The recipe with a sparsity in place of the size."""
        return self.replace(size=None, sparsity=f"{sparsity:g}")

    @property
    def lowest(self) -> float:
        """The lowest sparsity that could be asked for."""
        return min((pattern.sparsity for pattern in self._choices), default=0.0)

    @property
    def _allowed(self) -> list[str]:
        return [spec.strip() for text in self.allow for spec in text.split(",")]

    @property
    def _choices(self) -> tuple[NM, ...]:
        return tuple(map(choice, self._allowed))

    def pattern(self, comparable: bool | None = None) -> Pattern:
        """The sparsity pattern; InputError if none was asked for.

        comparable: whether the scores of all matrices are on one scale, of scores that are there already.
        """
        if self.sparsity is None:
            raise InputError("no sparsity given; use --sparsity 0.5, --sparsity 2:4 or --size 120MB")
        default = spelling.default_scope(self.comparable if comparable is None else comparable)
        base = spelling.parse(self.sparsity, self.scope, default)
        if self.allow:
            if self.scope is not None or not isinstance(base, Unstructured):
                raise InputError(f"--allow goes with a fraction such as 0.45 and no scope, not with {base}")
            base = Mixed(base.sparsity, self._choices)
        return Ruled(base, tuple(map(Rule.parse, self.rules))) if self.rules else base

    def parsed_controller(self) -> Controller | None:
        """The controller with its settings; None where the metric is all."""
        return self._controller

    @property
    def uses_controller(self) -> bool:
        """Whether a controller runs."""
        return self._controller is not None

    @property
    def comparable(self) -> bool:
        """Whether the scores of all matrices will be on one scale."""
        return self._controller is not None and self._controller.comparable

    @property
    def cost(self) -> Cost:
        """What the calibration takes."""
        return self._controller.cost if self._controller else LOCAL

    def step_tokens(self, length: int) -> int:
        """Tokens of a step of the controller on windows of ``length``."""
        return max(length, self._controller.step_tokens(length)) if self._controller else length

    def logits(self, vocabulary: int) -> int:
        """Of a vocabulary of so many tokens, how many a step of the controller computes logits of; without one, all."""
        return self._controller.logits(vocabulary) if self._controller else vocabulary

    def steps_within(self, length: int) -> int | None:
        """How many steps of the controller were asked for, on windows of ``length``; None: each window once."""
        if self.budget_tokens is None:
            return self.steps
        within = max(1, self.budget_tokens // self.step_tokens(length))
        return min(self.steps or within, within)

    def parsed_metric(self) -> Metric:
        return self._metric

    def record(self) -> dict[str, Any]:
        """The settings as JSON data, defaults included; ``Recipe(**record)`` is the same recipe, and recipes that are the same
        have the same record, however they were spelled.

        Unless it has an object of a class that is in none of the tables: of those, class and fields are recorded.
        """
        plain = self.model_dump(mode="json", exclude={"sparsity", "metric", "controller", "tuning"})
        plain["allow"] = self._allowed
        if isinstance(self.sparsity, str):
            sparsity: Any = spelling.canonical(self.sparsity)
        else:
            sparsity = None if self.sparsity is None else fields.record(self.sparsity)
        controller = controllers.record(self._controller)
        settings = {"sparsity": sparsity, "metric": metrics.record(self._metric), **plain, **controller}
        return {name: settings[name] for name in type(self).model_fields if name in settings}


def _in_words(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with patterns in words where there are any: ``NM(2, 4)`` -> ``2:4``.

    Raises InputError for an object that is no pattern, or that does not go with another setting.
    """
    sparsity = settings.get("sparsity")
    if sparsity is None or (isinstance(sparsity, (str, int, float)) and not isinstance(sparsity, bool)):
        return settings
    fields.check_object(sparsity, "sparsity", PATTERN)
    words = settings_of(sparsity) or {"sparsity": sparsity, "scope": None}
    for name, value in words.items():
        if name != "sparsity" and settings.get(name) and (value or name == "scope"):
            raise InputError(f"{name} = {settings[name]!r} does not go with {sparsity}, which has its own; drop {name}")
    return settings | words


def _without_type(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which sparsity says all: with the sparsity_type of Wanda's scripts, it is a fraction beside it."""
    kind = settings.pop("sparsity_type", None)
    if kind is None:
        return settings
    given = settings.get("sparsity")
    if kind != "unstructured":
        pattern = spelling.parse(kind) if isinstance(kind, str) and ":" in kind else None
        if not isinstance(pattern, NM):
            raise InputError(f"--sparsity-type {kind!r:.200} is neither unstructured nor N:M; use e.g. 2:4 or 4:8")
        if given is None or spelling.parse(given) in (pattern, Unstructured(pattern.sparsity)):
            return settings | {"sparsity": kind}
        removed = f"which removes {pattern.sparsity:g} of the weights"
        raise InputError(f"--sparsity {given} and --sparsity-type {kind}, {removed}, contradict each other; leave one out")
    if given is not None and not isinstance(spelling.parse(given), Unstructured):
        raise InputError(f"--sparsity {given} and --sparsity-type unstructured contradict each other; leave one out")
    return settings
