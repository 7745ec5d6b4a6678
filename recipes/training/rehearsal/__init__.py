"""What NeMo and Megatron-Core build for a rank of a plan, at true size and without memory.

`rehearse` is the one way in.  It must come before NeMo is imported in a process: Transformer
Engine's stand-ins are what NeMo then finds.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.errors import InputError, one_line
from recipes.estimate.rank_facts import RankFacts
from recipes.plan import Data, Logger, Plan

UPSTREAM = ("megatron", "nemo", "lightning", "nemo_run", "fiddle", "transformer_engine")


def rehearse(plan: Plan, rank: int) -> RankFacts:
    """Build `rank` of the plan's job and return what it is; InputError where NeMo or Megatron-Core
    refuses it.

    Data and loggers are left out.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        ""  # before PyTorch looks: nothing is put on a GPU that may be here
    )
    from recipes.training.rehearsal import stand_ins

    stand_ins.install(plan.stack.versions["transformer_engine"])
    from recipes.training import cpu

    cpu.activate()
    from recipes.training.rehearsal.build import built
    from recipes.training.rehearsal.facts import read

    logger = Logger(wandb="disabled", wandb_project=plan.logger.wandb_project, tensorboard=False)
    plan = plan.model_copy(
        update={"data": Data(kind="mock", seed=plan.data.seed), "logger": logger}
    )
    with _quiet(), _refusals(plan, rank), built(plan, rank) as trainer:
        return read(trainer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what NeMo logs for each rank."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _refusals(plan: Plan, rank: int) -> Iterator[None]:
    """Turn what NeMo and Megatron-Core raise into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cell = f"{plan.model.name} in {plan.precision.name} on {plan.num_gpus} {plan.gpu.name}"
        line = str(error).strip().split("\n")[0].partition(" when instantiating ")[0]
        text = one_line(line)[:300] or type(error).__name__
        remedy = "change what it names in the plan; the job would end with it on the cluster"
        raise InputError(
            f"{cell}: rank {rank} cannot be built: {text} ({_where(error)}); {remedy}"
        ) from error


def _where(error: BaseException) -> str:
    """Return file and line of the innermost frame of NeMo or Megatron-Core, without the machine's
    folders.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        parts = Path(frame.filename).parts
        for package in UPSTREAM:
            if package in parts:
                return f"{'/'.join(parts[parts.index(package) :])}:{frame.lineno}"
    return type(error).__name__
