"""Which plan did an imported run have?  Here what its log states, --set, and what is asked for
meet.

The log is asked first.  What it states goes into the plan; a --set that says otherwise is refused
with both values. What neither gives is asked for where the log alone cannot be read without it
(model, GPU, precision), and else is listed as assumed: a table leaves out what depends on it.  No
rule that estimates is asked: the run ran.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.importers.facts import ALL_LAYERS
from analysis.importers.log import Log, distinct
from recipes.compose.layout_rules import (
    batch_divides,
    heads_divide,
    layers_per_stage,
    tensor_parallel_divides,
)
from recipes.compose.rules import cell_is_supported
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.plan import Model, Plan

AXES = ("model", "precision", "gpu")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# What a layout is where neither the log nor --set says, and the recommended one cannot be it
LAYOUT = {
    "mapping.tp": "1",
    "mapping.pp": "1",
    "mapping.cp": "1",
    "mapping.vp": "1",
    "mapping.micro_batch": "1",
    "mapping.cuda_graphs": "false",
    "mapping.fsdp": "false",
    "mapping.recompute_layers": "0",
    "mapping.offload_layers": "0",
}
SCALE = ("num_gpus", "mapping.global_batch")  # a rate per GPU depends on them
SHAPES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
NOTED = (
    "model.activation",
    "model.tied_embeddings",
    "model.rotary_base",
    "model.vocab_size",
)  # printed also where they are not used
AFTER = (
    "model.",
    "precision.",
    "mapping.recompute_layers",
)  # keys that are set, or compared, when the plan is composed
MAY_CHANGE = ("train.",)  # what a resumed run may have otherwise


@dataclass(frozen=True)
class Planned:
    """The plan of an imported run, what the log stated of it, and the keys that neither the log nor
    --set gave.
    """

    plan: Plan
    stated: dict[str, str]
    assumed: list[str]


def replicas_divide(plan: Plan) -> str | None:
    """Megatron-Core parallel_state.py: the world size is a multiple of tp*pp*cp."""
    m = plan.mapping
    if plan.num_gpus % (m.tp * m.pp * m.cp):
        return (
            f"num_gpus={plan.num_gpus} is no multiple of tp*pp*cp={m.tp * m.pp * m.cp}; set those"
            " that ran"
        )
    return None


RAN = (cell_is_supported, heads_divide, replicas_divide, tensor_parallel_divides, batch_divides)


def plan_of(log: Log, overrides: Sequence[str], out: Path) -> Planned:
    """Return the plan of an imported run; InputError for what is missing or contradicts the log."""
    if not NAME.fullmatch(out.name):
        raise InputError(
            f"{out.name[:80]!r} is no name for a run; use letters, digits, '.', '_' and '-' in"
            " --out"
        )
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    stated, words, several = _stated(log, given)
    _ask_for_axes(stated, given)
    early = {
        key: value
        for key, value in stated.items()
        if key not in given and not key.startswith(AFTER)
    }
    assumed = [
        key
        for key in (*SCALE, "seq_length", *LAYOUT)
        if key not in {*stated, *given} and not (key.startswith("mapping.") and "mapping" in given)
    ]
    early.setdefault("train.max_steps", f"{int(log.steps['step'][-1])}")
    plan = _composed([*(f"{key}={value}" for key, value in early.items()), *overrides], assumed)
    plan = _completed(plan, stated, given)
    if plan.precision.fp8 is None and (fp8 := log.facts.fp8_is_on()):
        raise InputError(
            f"the log states FP8 ({fp8}), --set precision={plan.precision.name}; set the precision"
            " that ran"
        )
    for key, value in stated.items():
        _agrees(log, plan, key, value, words[key], given)
    for key, values in several.items():
        _is_one_of(plan, key, values)
        log.said.append(
            f"the log states {key} as {' and '.join(values)}: --set chooses, and part of the log is"
            " of another plan"
        )
    if plan.train.max_steps < log.steps["step"][-1]:
        raise InputError(
            f"the log goes to step {int(log.steps['step'][-1])}, the plan to"
            f" {plan.train.max_steps}; set train.max_steps to the run's"
        )
    return Planned(
        plan.model_copy(update={"run_name": out.name, "runs_dir": str(out.parent)}), stated, assumed
    )


def _stated(
    log: Log, given: set[str]
) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    """Return one value for each key that the log states, its words for it, and the values among
    which --set chooses.
    """
    found = log.facts.stated()
    if log.total:
        found["train.max_steps"] = {f"{log.total}": f"{log.total} steps"}
    for key, value, what in _from_columns(log):
        if others := [other for other in found.get(key, {}) if other != value]:
            log.said.append(
                f"the log's settings state {key} as {' and '.join(others)}, its lines {value}: the"
                " lines count"
            )
        found[key] = {value: what}
    for key, values in list(found.items()):
        if len(values) > 1 and key.startswith(MAY_CHANGE) and key not in given:
            del found[key]
            log.said.append(f"the log states {key} as {' and '.join(values)}; the plan has neither")
        elif len(values) > 1 and key not in given:
            raise InputError(
                f"the log states {key} as {' and '.join(values)} ({'; '.join(values.values())});"
                f" choose one with --set {key}=…"
            )
    chosen = {key: next(iter(values)) for key, values in found.items() if len(values) == 1}
    several = {key: list(values) for key, values in found.items() if len(values) > 1}
    return chosen, {key: next(iter(found[key].values())) for key in chosen}, several


def _from_columns(log: Log) -> list[tuple[str, str, str]]:
    """Return what the training lines themselves state: the sequence length, and the global
    batch.
    """
    lengths = distinct(log.steps.get("seq_length", np.zeros(0)))
    length = (
        [("seq_length", f"{int(lengths[0])}", f"sequence length {int(lengths[0])}")]
        if lengths.size == 1 and lengths[0] >= 1
        else []
    )
    return [*length, *_batch_of(log)]


def _batch_of(log: Log) -> list[tuple[str, str, str]]:
    batches = distinct(log.steps.get("global_batch", np.zeros(0)))
    batches = batches[np.isfinite(batches)]
    if batches.size > 1:
        log.said.append(
            "the global batch changes during the run; the plan holds one, and tokens are those of"
            " the samples where they are printed"
        )
    if batches.size == 1 and batches[0] >= 1:
        return [
            ("mapping.global_batch", f"{int(batches[0])}", f"global batch size {int(batches[0])}")
        ]
    samples = log.steps.get("samples", np.zeros(0))
    if batches.size or samples.size < 2:
        return []
    each = np.unique(np.diff(samples) / np.diff(log.steps["step"]))
    if each.size == 1 and each[0] >= 1 and each[0] == int(each[0]):
        return [
            ("mapping.global_batch", f"{int(each[0])}", f"{int(each[0])} consumed samples a step")
        ]
    return []


def _ask_for_axes(stated: dict[str, str], given: set[str]) -> None:
    unsaid = (
        [] if "experiment" in given else [axis for axis in AXES if axis not in {*given, *stated}]
    )
    if unsaid:
        hint = " ".join(f"{axis}=…" for axis in unsaid)
        raise InputError(
            f"the log does not state which {', '.join(unsaid)} it is of; name it: --set {hint}"
        )


def _composed(overrides: Sequence[str], assumed: Sequence[str]) -> Plan:
    """Return the plan; with no model parallelism where the recommended layout, which nothing
    states, cannot have run.
    """
    try:
        return compose_plan(overrides, rules=RAN)
    except InputError:
        plain = [f"{key}={value}" for key, value in LAYOUT.items() if key in assumed]
        if not plain:
            raise
        return compose_plan([*overrides, *plain], rules=RAN)


def _completed(plan: Plan, stated: dict[str, str], given: set[str]) -> Plan:
    """Return the plan with what depends on other parts of it: recomputed layers, and the details of
    FP8.
    """
    if "mapping.recompute_layers" in stated:
        value = stated["mapping.recompute_layers"]
        stated["mapping.recompute_layers"] = (
            f"{layers_per_stage(plan) // plan.mapping.vp}" if value == ALL_LAYERS else value
        )
    update: dict[str, Any] = {}
    if "mapping.recompute_layers" in stated and "mapping.recompute_layers" not in given:
        layers = int(stated["mapping.recompute_layers"])
        graphs = plan.mapping.cuda_graphs and (not layers or "mapping.cuda_graphs" in given)
        update["mapping"] = plan.mapping.model_copy(
            update={"recompute_layers": layers, "cuda_graphs": graphs}
        )
    fp8 = plan.precision.fp8
    if fp8 is not None:
        details = {
            key.rpartition(".")[2]: value
            for key, value in stated.items()
            if key.startswith("precision.fp8.") and key not in given
        }
        typed = {name: _as(getattr(fp8, name), value) for name, value in details.items()}
        update["precision"] = plan.precision.model_copy(
            update={"fp8": fp8.model_copy(update=typed)}
        )
    return plan.model_copy(update=update)


def _as(like: object, value: str) -> object:
    """Return a stated value with the type of a plan's field."""
    if isinstance(like, bool):
        return value == "true"
    return int(value) if isinstance(like, int) else value


def _agrees(log: Log, plan: Plan, key: str, value: str, words: str, given: set[str]) -> None:
    """Raise InputError where the plan says otherwise than the log."""
    ours = _scaling_name(plan, value) if key == "precision" else _value(plan, key)
    if ours is None or _same(key, value, ours, plan):
        return
    if key in NOTED and key not in given:
        log.said.append(f"the log states {words}, and {plan.model.name} has {key}={ours}")
        return
    if key.startswith("model.") and key not in NOTED:
        remedy = (
            f"name the model that ran{_model_of(log)}, or set {key}={value} for one that was"
            " changed"
        )
        raise InputError(
            f"the log states {key}={value} ({words}), the plan {key}={ours}"
            f" (model={plan.model.name}); {remedy}"
        )
    wrong = f"--set {key}={ours}" if key in given else f"the plan {key}={ours}"
    raise InputError(
        f"the log states {key}={value} ({words}), {wrong}; leave it out of --set, or name the log"
        " that belongs to it"
    )


def _is_one_of(plan: Plan, key: str, stated: Sequence[str]) -> None:
    """Raise InputError where --set chooses a value that the log, which states several, does not."""
    if ALL_LAYERS in stated:
        return
    found = {
        value: _scaling_name(plan, value) if key == "precision" else _value(plan, key)
        for value in stated
    }
    if not any(ours is None or _same(key, value, ours, plan) for value, ours in found.items()):
        ours = next(iter(found.values()))
        raise InputError(
            f"the log states {key} as {' and '.join(stated)}, --set {key}={ours}; choose one of the"
            " log's"
        )


def _scaling_name(plan: Plan, value: str) -> str:
    """Return the name that a stated precision is compared with: the log's own for a precision file
    of the user's with its scaling.
    """
    scaling = plan.precision.fp8.scaling if plan.precision.fp8 else "bf16"
    return value if value.removeprefix("fp8_") == scaling else plan.precision.name


def _value(plan: Plan, key: str) -> object:
    """Return a plan's value under a dotted key; None where it has none."""
    found: object = plan
    for name in key.split("."):
        found = getattr(found, name, None)
    return found


def _same(key: str, stated: str, ours: object, plan: Plan) -> bool:
    if isinstance(ours, bool):
        return stated == str(ours).lower()
    if isinstance(ours, int | float):
        near = (
            1024.0 * plan.mapping.tp if key == "model.vocab_size" else 0.0
        )  # vocabularies are padded
        return math.isclose(float(stated), ours, rel_tol=1e-6, abs_tol=near)
    return stated == str(ours)


def _model_of(log: Log) -> str:
    """Return the model of conf/model that has the sizes that the log states, as a hint."""
    stated = log.facts.stated()
    sizes = {
        name: next(iter(stated[f"model.{name}"])) for name in SHAPES if f"model.{name}" in stated
    }
    found = [
        model.name
        for model in _models()
        if all(str(getattr(model, name)) == size for name, size in sizes.items())
    ]
    return f" ({', '.join(found)}: its sizes)" if len(sizes) > 2 and 0 < len(found) < 4 else ""


def _models() -> list[Model]:
    from recipes.compose.tree import CONF

    names = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    return [compose_plan([f"model={name}", "gpu=cpu"], rules=()).model for name in names]
