"""Does this project ask of NeMo what NVIDIA's performance scripts ask for?

    python -m recipes.upstream.nvidia_scripts
        compare every cell's plan with the values of the list
    python -m recipes.upstream.nvidia_scripts model=llama3_8b settings.check_gradients=false
        some cells, with overrides
    python -m recipes.upstream.nvidia_scripts --nemo SOURCE
        execute the scripts of a NeMo source tree, compare recipes
    python -m recipes.upstream.nvidia_scripts --nemo SOURCE --write
        and write the list and the differences

The list (recipes/reference/nvidia_settings.csv) holds, by NeMo's version, what the scripts set of
the fields that follow from a plan alone; comparing with it needs no NeMo.  `--nemo` compares every
field of the two recipe objects, and needs the NeMo of that version installed.  Cells are those of
scripts/performance: each model with a script and a file in conf/model, each GPU with a table of
layouts, each number format of the stack.  A difference that is meant stands in
recipes/reference/nvidia_differences.yaml, with its reason, and as found in nvidia_differences.csv.
The exit code is 1 where there is any other.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter
from yaml import safe_load  # type: ignore[import-untyped]

from recipes.cli import ArgumentParser, command
from recipes.compose.rules import capability
from recipes.compose.tree import CONF, compose_plan
from recipes.environment import variables
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.nemo_recipes import NEMO_NAMES
from recipes.overlap import overlaps_tp
from recipes.paths import REFERENCE
from recipes.plan import Frozen, Name, Plan, Text
from recipes.upstream.nemo_source import numbers

SETTINGS = REFERENCE / "nvidia_settings.csv"
DIFFERENCES = REFERENCE / "nvidia_differences.csv"
DELIBERATE = REFERENCE / "nvidia_differences.yaml"
DIFFERENT = 1
ABSENT = "-"  # a field that one side has not
CLASS = ".__fn__"  # the field that holds what a config calls
CELLS = "cells"  # the row of the list that names all cells of a version
AXES = ("stack", "model", "precision", "gpu")
STEPS = 50  # of a script's run; conf/experiment/throughput.yaml
SCRIPT_RECIPES = {
    "bf16": "ds",
    "fp8_delayed": "ds",
    "fp8_current": "cs",
    "mxfp8": "mxfp8",
    "fp8_subchannel": "ss",
}  # --fp8_recipe
Values = dict[str, dict[str, str]]  # cell -> field -> value


class Deliberate(Frozen):
    """Differences that are meant, and why.

    `fields` and `cells` are patterns (`*`); a cell is model.precision.gpu.  `theirs` and `ours`:
    only from this value to that.
    """

    name: Name
    why: Text
    fields: tuple[Text, ...] = Field(strict=False)
    cells: tuple[Text, ...] = Field(default=("*",), strict=False)
    nemo: Text | None = None
    theirs: Text | None = None
    ours: Text | None = None

    def covers(self, difference: Difference) -> bool:
        """Whether a difference is one of these."""
        return (
            self.nemo in (None, difference.nemo)
            and self.theirs in (None, difference.theirs)
            and self.ours in (None, difference.ours)
            and any(
                fnmatch.fnmatchcase(difference.field, pattern.replace("[", "[[]"))
                for pattern in self.fields
            )
            and any(fnmatch.fnmatchcase(difference.cell, pattern) for pattern in self.cells)
        )


@dataclass(frozen=True)
class Difference:
    """A field of a cell that NVIDIA's script of a NeMo version sets to `theirs`, and this project
    to `ours`.
    """

    nemo: str
    cell: str
    field: str
    theirs: str
    ours: str


@functools.cache
def deliberate() -> tuple[Deliberate, ...]:
    """Return the differences that are meant."""
    return TypeAdapter(tuple[Deliberate, ...]).validate_python(
        safe_load(DELIBERATE.read_text(encoding="utf-8"))
    )


def reason(difference: Difference) -> str | None:
    """Return the name of the first entry that covers a difference; None where none does."""
    return next((entry.name for entry in deliberate() if entry.covers(difference)), None)


# ------------------------------------------------------------------------------- what a plan states


def stated(plan: Plan) -> dict[str, str]:
    """Return the fields of NeMo's recipe and of the job that follow from a plan alone, as text."""
    m, s, fp8 = plan.mapping, plan.settings, plan.precision.fp8
    strategy: dict[str, Any] = {
        "tensor_model_parallel_size": m.tp,
        "pipeline_model_parallel_size": m.pp,
        "context_parallel_size": m.cp,
        "virtual_pipeline_model_parallel_size": m.vp if m.vp > 1 else None,
        "sequence_parallel": m.tp > 1,
        "use_te_rng_tracker": m.cuda_graphs,
        "fsdp": "megatron" if m.fsdp else None,
        "ddp.check_for_nan_in_grad": s.check_gradients,
        **(
            {"num_distributed_optimizer_instances": plan.optimizer_instances}
            if plan.stack.scripts.optimizer_instances
            else {}
        ),
    }
    plugins = {
        "grad_reduce_in_fp32": s.grad_reduce_in_fp32,
        "fp8": fp8.format if fp8 else None,
        "first_last_layers_bf16": bool(fp8 and fp8.first_layers_bf16 + fp8.last_layers_bf16),
        **(
            {"fp8_recipe": NEMO_NAMES[fp8.scaling], "fp8_param_gather": fp8.param_gather}
            if fp8
            else {}
        ),
    }
    model = {
        name: getattr(plan.model, name)
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
        )
    }
    config = {
        **model,
        "seq_length": plan.seq_length,
        "enable_cuda_graph": m.cuda_graphs,
        "recompute_num_layers": m.recompute_layers or None,
        "cpu_offloading_num_layers": m.offload_layers,
        "cross_entropy_fusion_impl": s.cross_entropy_fusion,
    }
    adam = {
        name: getattr(plan.train, name)
        for name in ("adam_beta1", "adam_beta2", "weight_decay", "clip_grad")
    }
    parts: dict[str, dict[str, Any]] = {
        "trainer": {
            "num_nodes": -(-plan.num_gpus // plan.gpu.devices_per_node),
            "max_steps": plan.train.max_steps,
        },
        "trainer.strategy": strategy,
        "trainer.plugins": plugins,
        "trainer.callbacks[MegatronCommOverlapCallback]": {
            "tp_comm_overlap": overlaps_tp(plan),
            "overlap_param_gather_with_optimizer_step": s.overlap_param_gather_with_optimizer_step,
        },
        "data": {
            "micro_batch_size": m.micro_batch,
            "global_batch_size": m.global_batch,
            "seq_length": plan.seq_length,
        },
        "model.config": config,
        "optim.config": {**adam, "use_precision_aware_optimizer": s.precision_aware_optimizer},
    }
    fields = {
        f"{part}.{name}": as_text(value)
        for part, values in parts.items()
        for name, value in values.items()
    }
    return {**fields, **job(plan)}


def job(plan: Plan) -> dict[str, str]:
    """Return what a plan says of its job."""
    c = plan.cluster
    beside = {
        "cluster.mpi": c.mpi,
        "cluster.vboost": c.vboost,
        "gpu.gpus_per_numa_node": plan.gpu.gpus_per_numa_node,
    }
    return {
        **{key: as_text(value) for key, value in beside.items()},
        **{f"environment.{v.name}": v.value for v in variables(plan)},
    }


def as_text(value: Any) -> str:
    """Return a value as the lists have it: whole numbers without a fraction."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value)


# -------------------------------------------------------------------------------------------- cells


def plan_of(cell: str, stack: str, overrides: Sequence[str]) -> Plan:
    """Return the plan of a cell as NVIDIA measures speed."""
    model, precision, gpu = cell.split(".")
    return compose_plan(
        [
            f"stack={stack}",
            f"model={model}",
            f"precision={precision}",
            f"gpu={gpu}",
            "experiment=throughput",
            *overrides,
        ]
    )


def stack_of(version: str) -> str:
    """Return the stack whose container holds a version of NeMo; InputError where there is none."""
    for path in sorted((CONF / "stack").glob("*.yaml")):
        stack = safe_load(path.read_text(encoding="utf-8"))
        if stack["container"] and stack["versions"]["nemo"] == version.rpartition(".")[0]:
            return str(stack["name"])
    raise InputError(
        f"no stack of conf/stack has a container with NeMo {version}; add one, or name another"
        " source tree"
    )


def scripted(tree: Path, stack: str) -> list[str]:
    """Return the cells that scripts/performance of a tree has and this project knows."""
    folder = tree / "scripts/performance"
    models = {
        path.stem.removeprefix("pretrain_") for path in (folder / "llm").glob("pretrain_*.py")
    }
    gpus = {
        path.stem.removeprefix("model_configs_")
        for path in folder.glob("recommended_model_configs/model_configs_*.csv")
    }
    if not models or not gpus:
        raise InputError(
            f"{folder} holds no scripts and tables of layouts; name the folder of a NeMo source"
            " tree of 2.3 or 2.4"
        )
    known = {
        axis: {path.stem for path in (CONF / axis).glob("*.yaml")} for axis in ("model", "gpu")
    }
    text = safe_load((CONF / "stack" / f"{stack}.yaml").read_text(encoding="utf-8"))
    return [
        f"{model}.{precision}.{gpu}"
        for model in sorted(models & known["model"])
        for precision in SCRIPT_RECIPES
        for gpu in sorted(gpus & known["gpu"])
        if _runs(text, precision, gpu)
    ]


def _runs(stack: dict[str, Any], precision: str, gpu: str) -> bool:
    """Whether the stack runs a number format on a GPU."""
    fp8 = safe_load((CONF / "precision" / f"{precision}.yaml").read_text(encoding="utf-8"))["fp8"]
    here = safe_load((CONF / "gpu" / f"{gpu}.yaml").read_text(encoding="utf-8"))[
        "compute_capability"
    ]
    if fp8 is None or fp8["scaling"] not in stack["fp8"]:
        return fp8 is None
    support = stack["fp8"][fp8["scaling"]]
    highest = support["max_capability"]
    return capability(support["min_capability"]) <= capability(here) and (
        highest is None or capability(here) <= capability(highest)
    )


def chosen(cell: str, stack: str, named: dict[str, list[str]]) -> bool:
    """Whether a cell is among those that the command line names."""
    parts = dict(zip(AXES, (stack, *cell.split(".")), strict=True))
    return all(parts[axis] in options for axis, options in named.items())


# ---------------------------------------------------------------------------------------- comparing


def compared(version: str, theirs: Values, ours: Values) -> list[Difference]:
    """Return where two tables of the same cells differ; an object that one side lacks is one
    difference, its class.
    """
    found = []
    for cell, their in theirs.items():
        other = [
            field
            for field in sorted(their.keys() | ours[cell].keys())
            if their.get(field, ABSENT) != ours[cell].get(field, ABSENT)
        ]
        parts = tuple(
            field.removesuffix(CLASS)
            for field in other
            if field.endswith(CLASS)
            and ABSENT in (their.get(field, ABSENT), ours[cell].get(field, ABSENT))
        )
        inside = tuple(f"{part}." for part in parts)
        for field in other:
            is_whole = field.endswith(CLASS) and not field.removesuffix(CLASS).startswith(inside)
            if is_whole or not (field in parts or field.startswith(inside)):
                found.append(
                    Difference(
                        version,
                        cell,
                        field,
                        their.get(field, ABSENT),
                        ours[cell].get(field, ABSENT),
                    )
                )
    return found


def with_list(version: str, theirs: Values, overrides: Sequence[str]) -> list[Difference]:
    """Return where today's plans state another value than the list has."""
    stack, ours = stack_of(version), dict[str, dict[str, str]]()
    for cell in theirs:
        try:
            ours[cell] = stated(plan_of(cell, stack, overrides))
        except InputError as error:
            raise InputError(f"{cell} on {stack}: {error}") from None
    return compared(version, theirs, ours)


def with_tree(
    tree: Path, version: str, cells: Sequence[str], overrides: Sequence[str]
) -> tuple[Values, list[Difference]]:
    """Return what the scripts of a tree set, and where the recipes that this project builds
    differ.
    """
    from recipes.training import cpu

    cpu.activate()
    from recipes.upstream.nvidia_arguments import check_tree, ours, theirs

    check_tree(tree, version)
    plans = {cell: plan_of(cell, stack_of(version), overrides) for cell in cells}
    built = {
        cell: {**ours(plan), **job(plan)} for cell, plan in plans.items()
    }  # first: the 405B's script changes NeMo's own constants
    other = {
        (field, value, built[cell].get(field))
        for cell, plan in plans.items()
        for field, value in stated(plan).items()
        if built[cell].get(field) != value
    }
    if other:
        raise RuntimeError(
            "`stated` and the recipes that are built disagree (field, plan, recipe):"
            f" {sorted(other)}"
        )
    scripts = {
        cell: theirs(
            tree,
            plan,
            "bf16" if plan.precision.fp8 is None else "fp8",
            SCRIPT_RECIPES[plan.precision.name],
        )
        for cell, plan in plans.items()
    }
    return scripts, compared(version, scripts, built)


# -------------------------------------------------------------------------------------------- files


def listed() -> dict[str, Values]:
    """Return the list: by NeMo version and cell, what the scripts set of the fields that a plan
    states.
    """
    with SETTINGS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, Values] = {
        row["nemo"]: {cell: {} for cell in row["cells"].split()}
        for row in rows
        if row["field"] == CELLS
    }
    for row in rows:
        values = found[row["nemo"]]
        if row["field"] == CELLS:
            continue
        for cell in values if row["cells"] == "*" else row["cells"].split():
            values[cell][row["field"]] = row["value"]
    return {
        version: {
            cell: {f: v for f, v in fields.items() if v != ABSENT} for cell, fields in cells.items()
        }
        for version, cells in found.items()
    }


def shipped() -> set[Difference]:
    """Return the differences that the last comparison with a source tree found."""
    with DIFFERENCES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    every = listed()
    return {
        Difference(row["nemo"], cell, row["field"], row["theirs"], row["ours"])
        for row in rows
        for cell in (every[row["nemo"]] if row["cells"] == "*" else row["cells"].split())
    }


def write(version: str, theirs: Values, found: Sequence[Difference]) -> None:
    """Put the rows of a version into the list and the table of differences, in place of those that
    they have.
    """
    rows = [{"nemo": version, "field": CELLS, "value": "", "cells": " ".join(theirs)}]
    for field in sorted({field for fields in theirs.values() for field in fields}):
        values = {cell: theirs[cell].get(field, ABSENT) for cell in theirs}
        common, _ = Counter(values.values()).most_common(1)[0]
        rows.append({"nemo": version, "field": field, "value": common, "cells": "*"})
        rows += [
            {
                "nemo": version,
                "field": field,
                "value": value,
                "cells": " ".join(cell for cell in values if values[cell] == value),
            }
            for value in sorted(set(values.values()) - {common})
        ]
    _replace(SETTINGS, version, rows)
    grouped = [
        {
            "nemo": version,
            "why": reason(d) or "",
            "field": d.field,
            "theirs": d.theirs,
            "ours": d.ours,
            "cells": "*" if cells == " ".join(theirs) else cells,
        }
        for d, cells in _grouped(found)
    ]
    _replace(DIFFERENCES, version, sorted(grouped, key=lambda row: (row["why"], row["field"])))


def _replace(path: Path, version: str, rows: Sequence[dict[str, str]]) -> None:
    others = []
    if path.exists():
        with path.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if row["nemo"] != version]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*others, *rows], key=lambda row: row["nemo"]))


def _grouped(found: Iterable[Difference]) -> Iterator[tuple[Difference, str]]:
    """Yield one difference of those that are alike in field and values, and the cells that have
    it.
    """
    groups: dict[tuple[str, str, str, str], list[Difference]] = {}
    for d in found:
        groups.setdefault((d.nemo, d.field, d.theirs, d.ours), []).append(d)
    for group in groups.values():
        yield group[0], " ".join(d.cell for d in group)


# ------------------------------------------------------------------------------------------ command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 where a difference is not meant, 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m recipes.upstream.nvidia_scripts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="model=… precision=… gpu=… stack=… choose cells; others change each plan",
    )
    parser.add_argument(
        "--nemo",
        type=Path,
        metavar="SOURCE",
        help="the folder of a NeMo source tree (holds nemo/ and scripts/)",
    )
    parser.add_argument(
        "--write", action="store_true", help="with --nemo and all cells: write what was found"
    )
    args = parser.parse_args(argv)
    try:
        named, rest = _named(args.overrides)
        if args.write and (args.overrides or not args.nemo):
            raise InputError(
                "--write needs --nemo, and all cells as they are: leave the overrides out"
            )
        return (
            _with_tree(args.nemo, named, rest, args.write) if args.nemo else _with_list(named, rest)
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT


def _named(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the options of axes that overrides name, and the other overrides."""
    pairs = [override.partition("=") for override in overrides]
    named = {key: value.split(",") for key, _, value in pairs if key in AXES}
    return named, [override for override in overrides if override.partition("=")[0] not in AXES]


def _with_list(named: dict[str, list[str]], rest: Sequence[str]) -> int:
    found, count, known = list[Difference](), 0, shipped()
    for version, theirs in listed().items():
        cells = {
            cell: fields
            for cell, fields in theirs.items()
            if chosen(cell, stack_of(version), named)
        }
        found += with_list(version, cells, rest)
        count += len(cells)
    unmeant = [d for d in found if d not in known or reason(d) is None]
    return _report(found, unmeant, count, f"{SETTINGS.name} (NeMo {', '.join(listed())})")


def _with_tree(tree: Path, named: dict[str, list[str]], rest: Sequence[str], to_write: bool) -> int:
    of = numbers(tree)
    version = f"{of['MAJOR']}.{of['MINOR']}.{of['PATCH']}"
    stack = stack_of(version)
    cells = [cell for cell in scripted(tree, stack) if chosen(cell, stack, named)]
    theirs, found = with_tree(tree, version, cells, rest) if cells else ({}, [])
    unmeant = [d for d in found if reason(d) is None]
    code = _report(found, unmeant, len(cells), f"scripts/performance of NeMo {version}")
    if to_write:
        write(
            version,
            {cell: _of_a_plan(theirs[cell], plan_of(cell, stack, ())) for cell in cells},
            found,
        )
        print(f"written to {SETTINGS.name} and {DIFFERENCES.name}")
    return code


def _of_a_plan(theirs: dict[str, str], plan: Plan) -> dict[str, str]:
    """Return those of a script's fields that a plan states, and the whole environment."""
    fields = stated(plan)
    return {
        field: value
        for field, value in theirs.items()
        if field in fields or field.startswith("environment.")
    }


def _report(
    found: Sequence[Difference], unmeant: Sequence[Difference], count: int, what: str
) -> int:
    """Print how many differences have which reason, and each that is not meant."""
    if not count:
        raise InputError(
            "no cell has these names; python -m recipes.upstream.nvidia_scripts without overrides"
            " compares all"
        )
    reasons = Counter(reason(d) for d in found if d not in unmeant)
    print(
        f"{count} cell(s) compared with {what}: {len(found)} difference(s), {len(unmeant)} not"
        " meant"
    )
    for entry in deliberate():
        if reasons[entry.name]:
            print(f"  {entry.name}: {reasons[entry.name]} ({entry.why})")
    for d, cells in _grouped(unmeant):
        print(
            f"{d.field}: NVIDIA {d.theirs}, here {d.ours} (NeMo {d.nemo}: {cells})", file=sys.stderr
        )
    return DIFFERENT if unmeant else 0


if __name__ == "__main__":
    command(main)
