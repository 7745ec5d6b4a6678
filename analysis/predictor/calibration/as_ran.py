"""How much memory did a published row need?  Its plan with what the tables leave out: offloading,
and its stack.

The predictor prices rows as the tables state them (`rows`).  Memory depends on more: how many
layers' activations wait in host memory (reference/offloaded_layers.csv, from the scripts that made
the tables), and what the versions of the row's container do (conf/stack: whether SwiGLU's input is
offloaded, whether parameters are kept in MXFP8).
"""

from __future__ import annotations

import csv
import functools

from analysis.predictor.calibration.published_steps import Row
from analysis.runs.published import REFERENCE
from recipes.compose.tree import compose_plan
from recipes.plan import Plan, Stack

# Containers by the stack whose properties they have: the newest one of conf/stack that is not
# newer.  Megatron-Bridge (25.09 and later, src/megatron/bridge/training/mixed_precision.py) keeps
# NeMo 25.07's FP8 parameters, and Megatron-Core its offloading.
STACKS = {"25.07": "nemo_25_07", "25.04": "nemo_25_04"}
OLDEST = "nemo_25_04"


def plan_as_ran(row: Row) -> Plan:
    """Return a published row's plan with the offloading and the stack with which it ran."""
    plan, stack = row.plan, _stack(row.release)
    offloaded = _offloaded(row)
    update: dict[str, object] = {"stack": stack}
    if offloaded:
        update["mapping"] = plan.mapping.model_copy(
            update={"offload_layers": offloaded, "recompute_layers": 0}
        )
    fp8 = plan.precision.fp8
    if fp8 and fp8.scaling == "mxfp8":
        kept = stack.scripts.mxfp8_parameters and not plan.mapping.fsdp
        update["precision"] = plan.precision.model_copy(
            update={"fp8": fp8.model_copy(update={"param_gather": kept})}
        )
    return plan.model_copy(update=update)


def _stack(release: str) -> Stack:
    name = next((name for first, name in STACKS.items() if _since(release, first)), OLDEST)
    return _composed(name)


@functools.cache
def _composed(name: str) -> Stack:
    return compose_plan([f"stack={name}", "model=llama3_8b", "precision=bf16", "gpu=h100"]).stack


def _offloaded(row: Row) -> int:
    """Return the layers that the scripts of a row's release offload; 0 where they name none."""
    if not row.plan.mapping.fsdp:
        return 0
    cell = (row.model, row.gpu, row.plan.precision.name, str(row.plan.num_gpus))
    found = (
        each
        for each in _offloading()
        if tuple(each[key] for key in ("model", "gpu", "precision", "num_gpus")) == cell
    )
    return next(
        (
            int(each["offload_layers"])
            for each in found
            if _since(row.release, each["release_from"])
        ),
        0,
    )


@functools.cache
def _offloading() -> list[dict[str, str]]:
    """Return the lines of offloaded_layers.csv, the newest release of a cell first."""
    with (REFERENCE / "offloaded_layers.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _since(release: str, first: str) -> bool:
    """Whether a NeMo container is `first` or newer."""
    return tuple(map(int, release.split(".")[:2])) >= tuple(map(int, first.split(".")))
