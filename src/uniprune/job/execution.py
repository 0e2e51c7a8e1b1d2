"""How a run executes its model: the way that was asked for, or the fastest whose forecast of memory fits (``memory``)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from uniprune.checkpoints.origin import Origin
from uniprune.common import distributed, formatting
from uniprune.controller import controllers
from uniprune.errors import InputError
from uniprune.job.forecast import machine, memory
from uniprune.job.options import EXECUTIONS, Execution, RunOptions, saved_as
from uniprune.job.recipe import Recipe
from uniprune.job.samples import check_can_generate, self_generated
from uniprune.models.loading import Loaded
from uniprune.storage import runs

logger = logging.getLogger(__name__)

TRAFFIC = 10_000_000_000  # bytes read and written per step from which on a warning is due
UNSUITABLE = {
    "recomputed": "only --controller feedback has activations to compute again, where blocks do not share keys and values",
    "offloaded": "it is for a controller on a GPU",
    "sharded": "it takes several processes (torchrun), and blocks that share nothing and are passed once",
    "streamed": "blocks of this model share weights, or keys and values, or a pass comes to them several times",
}


def choose(
    origin: Origin, needs: memory.Needs, options: RunOptions, device: torch.device, output: Path | None = None
) -> Execution:
    """The execution of a model that is yet to be loaded: the one that was asked for, or the fastest that fits.

    needs: the forecast of each execution. output: an interrupted run that is resumed there keeps the execution it began with.
    All processes choose the same, by the one with the least memory.
    Raises InputError, with the numbers, if nothing fits.
    """
    asked = options.execution
    limit = options.max_memory or machine.free_memory(device)
    if asked is not None and asked not in needs:
        raise InputError(f"--execution {asked} is not to be had here: {UNSUITABLE[asked]}; {' or '.join(needs)} is")
    able = {
        name: needed for name, needed in needs.items() if asked in (None, name) and (origin.files or EXECUTIONS[name].in_memory)
    }
    begun = (runs.identity_of(output) or {}).get("execution") if options.resume and output is not None else None
    if begun in needs:
        same = {name: needed for name, needed in able.items() if saved_as(name) == begun}
        return _fitting(same, limit) or asked or begun
    if (fastest := _fitting(able, limit)) is not None:
        return fastest
    takes = ", ".join(f"{formatting.size(needed.memory)} {name}" for name, needed in needs.items() if asked in (None, name))
    steps = needs["resident"].parts.get("masks", 0) > 0  # of a controller
    remedy = "lower the tokens of a step" if steps else "give shorter samples (--length)"
    if not origin.files:
        remedy = "convert it: only safetensors files are read block by block"
    raise InputError(f"model {origin} needs {takes} of memory; {_there(options, limit)}; raise --max-memory, or {remedy}")


def _there(options: RunOptions, limit: int) -> str:
    """How much memory there is."""
    least = f"{limit} bytes" if limit < 10**6 else formatting.size(limit)  # of a number that was given without a unit
    return f"{least} are there" if options.max_memory is None else f"--max-memory allows {least}"


def choose_for_loaded(loaded: Loaded, work: memory.Work, options: RunOptions) -> Execution:
    """The execution of a model that the caller has loaded.

    Where nothing fits, it is run as it is: its weights are in memory already. Raises InputError for an execution that was asked
    for and is not one of a model in memory.
    """
    limit = options.max_memory or machine.free_memory(work.device) + memory.PROCESS + work.parameters * work.dtype.itemsize
    in_memory = {name: needed for name, needed in memory.needs(work).items() if EXECUTIONS[name].in_memory}
    if options.execution is not None and options.execution not in in_memory:
        raise InputError(
            f"--execution {options.execution} is not for a model that is in memory; one of {', '.join(in_memory)} is"
        )
    return options.execution or _fitting(in_memory, limit) or "resident"


def check_execution(recipe: Recipe, execution: Execution) -> None:
    """Raises InputError if the recipe's controller, or text that the model is to generate, rules out this execution."""
    traits = EXECUTIONS[execution]
    check_can_generate(self_generated(recipe), traits.in_memory)
    controller = recipe.parsed_controller()
    if controller is None:
        return
    name = controllers.name_of(controller)
    others = "use another controller, or --controller none"
    if controller.one_process and distributed.count() > 1:
        raise InputError(f"--controller {name} runs in one process; start it without torchrun, or {others}")
    if controller.in_memory and not (traits.in_memory and traits.states == "device"):
        raise InputError(f"--controller {name} needs the whole model in memory; raise --max-memory, or {others}")


def _fitting(able: memory.Needs, limit: int) -> Execution | None:
    """The fastest execution that fits into the memory of every process."""
    host = machine.free_memory(torch.device("cpu"))
    return next((name for name, needed in able.items() if _everywhere(needed.memory <= limit and needed.host <= host)), None)


def _everywhere(condition: bool) -> bool:
    """Whether a condition holds in all processes; all of them must ask."""
    return distributed.total_of(float(condition)) == distributed.count()


def warn_of_traffic(work: memory.Work, execution: Execution, needed: memory.Bytes) -> None:
    """Warns if small steps will read and write the states more often than larger steps would."""
    moved = needed.read + needed.written
    small = work.recipe.step_tokens(work.length) < memory.LARGE_STEP
    if EXECUTIONS[execution].states == "disk" and work.recipe.uses_controller and small and moved > TRAFFIC:
        logger.warning(
            "each step of the controller reads %s from the disk and writes %s, however many tokens it has; larger "
            "steps are fewer: --set batch_tokens=%d",
            formatting.size(needed.read),
            formatting.size(needed.written),
            memory.LARGE_STEP,
        )
