"""Published steps as plans: what NVIDIA ran, by its own tables, in the form that the predictor
takes.

Traps of the tables, and what is done about them: models cut in depth are plans with fewer layers
and are never fitted.  Where a table says FP8 and no more, the reference data note what the scripts
that made it use by default ("delayed (inferred: …)", or cs).  Such rows are fitted, and so are most
FP8 rows of the fit.  Rows with no such note ("not stated") are taken as delayed scaling and never
fitted.  Of the rows that may be fitted only the half that chooses is (`halves`).  Rows that were
withdrawn, rows without a micro-batch, and tables repeated from an earlier release are left out.
CUDA graphs, recomputation and offloading, which the tables do not state, are those of NVIDIA's
recommended layout where a row has it.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.predictor.calibration.halves import REPORT, halves
from analysis.runs.published import RECIPES, REFERENCE, TABLES
from analysis.runs.soundness import sound
from analysis.runs.timing import step_time
from recipes.compose.defaults import recommended
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.plan import Plan

Raw = dict[str, str]
FITTED_RELEASES = (
    "25.02",
    "25.04",
    "25.07",
)  # NeMo containers whose rows may be fitted: the stack of this project and its neighbours
UNSTATED = "fp8_delayed"
# Not fitted; which rows the model's form was chosen with cannot be told from the history
FURTHER = "further_rows.csv"
RESULTS = Path(__file__).resolve().parents[2] / "results"
MEASURED = ("fig3_h200", "llama3_8b_h200")


@dataclass(frozen=True, eq=False)
class Row:
    """A published step: its plan, seconds, NeMo container, source, in which set it is held (see
    `_set`), and who ran it.
    """

    plan: Plan
    step_time_s: float
    release: str
    source: str
    held: str
    submitter: str = "NVIDIA"

    @property
    def model(self) -> str:
        """The model's name."""
        return self.plan.model.name

    @property
    def gpu(self) -> str:
        """The GPU's name."""
        return self.plan.gpu.name

    @property
    def group(self) -> str:
        """What rows share that err alike: the GPU, the model, the release and who ran them."""
        return f"{self.gpu} {self.model} {self.release} {self.submitter}"

    @property
    def cell(self) -> tuple[object, ...]:
        """What rows share that differ in nothing but the number of GPUs, the release and the
        source.
        """
        m = self.plan.mapping
        layout = (m.tp, m.pp, m.cp, m.vp, m.fsdp, m.micro_batch)
        return (self.model, self.plan.model.num_layers, self.plan.precision.name, self.gpu, *layout)

    @property
    def pair(self) -> tuple[object, ...]:
        """What a BF16 and an FP8 row share that were published side by side."""
        return (
            self.model,
            self.plan.model.num_layers,
            self.gpu,
            self.plan.num_gpus,
            self.plan.mapping.global_batch,
            self.release,
            self.source,
        )


@functools.cache
def rows() -> tuple[Row, ...]:
    """Return every published row that makes a plan."""
    found = []
    for table in (*TABLES, FURTHER):
        with (REFERENCE / table).open(newline="") as file:
            found += [
                row
                for raw in csv.DictReader(file)
                if (row := row_of(raw, further=table == FURTHER))
            ]
    half = halves(found)
    return tuple(
        replace(row, held="other half") if row.held == "fit" and half[row] == REPORT else row
        for row in found
    )


@functools.cache
def own_rows() -> tuple[Row, ...]:
    """Return the steps that this project measured on one GPU, whole models and such cut in depth:
    they only test.

    InputError where one of them cannot be used.
    """
    runs, left_out = sound(
        [folder for name in MEASURED for folder in sorted((RESULTS / name).iterdir())]
    )
    if left_out:
        raise InputError(f"a shipped run cannot be used: {left_out[0]}")
    return tuple(
        Row(
            _known_gpu(run.plan),
            step_time(run).value,
            run.plan.stack.name,
            run.folder.parent.name,
            "own",
        )
        for run in runs
    )


def _known_gpu(plan: Plan) -> Plan:
    """Return the plan of a run with what is known of its GPU today: a run folder holds what was
    known when it ran.
    """
    return plan.model_copy(update={"gpu": base_plan("llama3_8b", "bf16", plan.gpu.name).gpu})


def row_of(raw: Raw, further: bool = False) -> Row | None:
    """Return the row of a line of a published table; None where it is withdrawn, repeated or
    incomplete.
    """
    sizes = {key: _whole(raw[key]) for key in ("num_gpus", "tp", "pp", "cp", "mbs", "gbs")}
    unusable = (
        "superseded" in raw["note"]
        or "identical" in raw.get("nemo_container", "")
        or not raw["tokens_per_sec_per_gpu"]
    )
    if unusable or None in sizes.values():
        return None
    n = {key: value or 0 for key, value in sizes.items()}
    precision, stated = _precision(raw)
    plan = _plan(raw, precision, n)
    seconds = (
        float(raw["step_time_s"])
        if raw.get("step_time_s")
        else plan.tokens_per_step / plan.num_gpus / float(raw["tokens_per_sec_per_gpu"])
    )
    release = (raw.get("nemo_container") or raw["release"]).split(" ")[0]
    held = "further rows" if further else _set(raw, release, stated)
    return Row(plan, seconds, release, raw["source"], "other GPU" if plan.gpu.mapped_like else held)


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _precision(raw: Raw) -> tuple[str, bool]:
    """Return a row's precision, and whether its recipe is stated, or inferred from the scripts'
    default; taken as UNSTATED where neither.
    """
    if raw["precision"] == "bf16":
        return "bf16", True
    name = next(
        (name for begin, name in RECIPES.items() if raw["fp8_recipe"].startswith(begin)), None
    )
    return name or UNSTATED, name is not None


def _set(raw: Raw, release: str, stated: bool) -> str:
    """Return "fit" for rows that may be fitted; otherwise why not: they only test."""
    if raw["note"].startswith("PROXY"):
        return "fewer layers"
    if not stated:
        return "recipe not stated"
    return "fit" if release.startswith(FITTED_RELEASES) else "other release"


@functools.cache
def base_plan(model: str, precision: str, gpu: str) -> Plan:
    """Return a plan of a cell under throughput settings, to be given a row's layout (GB200's
    settings where the cell itself does not run).
    """
    nowhere = [
        "cluster.container_runtime=none",
        "cluster.python=python",
    ]  # nothing is launched, so no container has to know the GPU
    return compose_plan(
        [
            f"model={model}",
            f"precision={precision}",
            f"gpu={gpu}",
            "experiment=throughput",
            "mapping=recommended",
            *nowhere,
        ]
    )


def _plan(raw: Raw, precision: str, n: dict[str, int]) -> Plan:
    model, gpu = raw["model"].replace("3.1", "31"), raw["gpu"].lower()
    base = base_plan(model, precision, gpu)
    fsdp = (_whole(raw.get("fsdp", "")) or 0) > 0
    known = _recommended(model, base.gpu.mapped_like or gpu, precision, n, fsdp)
    stated = _whole(raw["vp"])
    vp = stated or (int(known.get("vp") or 1) if n["pp"] > 1 else 1)
    mapping = base.mapping.model_copy(
        update={
            **{key: n[key] for key in ("tp", "pp", "cp")},
            "vp": vp,
            "micro_batch": n["mbs"],
            "global_batch": n["gbs"],
            "fsdp": fsdp,
            "cuda_graphs": known.get("cuda_graphs") == "1",
            "recompute_layers": int(known.get("recompute_layers") or 0),
            "offload_layers": int(known.get("offload_layers") or 0),
            "source": "published",
            "tp_overlap": (
                n["tp"] > 1
            ),  # by NVIDIA's scripts; with MXFP8 and FSDP the rows are of 25.07 on
        }
    )
    layers = _whole(raw.get("layers", "")) or base.model.num_layers
    uneven = layers % (n["pp"] * vp) != 0
    changed = base.model.model_copy(
        update={"num_layers": layers, "embedding_and_loss_count_as_layers": uneven}
    )
    return base.model_copy(
        update={
            "mapping": mapping,
            "model": changed,
            "num_gpus": n["num_gpus"],
            "seq_length": int(raw["seqlen"]),
        }
    )


def _recommended(
    model: str, gpu: str, precision: str, n: dict[str, int], fsdp: bool
) -> dict[str, str]:
    """Return the recommended layout of a cell with the same split, the same number format first;
    nothing where there is none.
    """
    split = [str(n[key]) for key in ("tp", "pp", "cp")]
    found = [
        row
        for row in recommended()
        if (row["model"], row["gpu"]) == (model, gpu)
        and [row[key] for key in ("tp", "pp", "cp")] == split
        and (row["fsdp"] == "1") == fsdp
    ]
    dtype = "bf16" if precision == "bf16" else "fp8"
    return next(
        (row for row in found if row["dtype"] in (dtype, precision)), found[0] if found else {}
    )


def pairs(found: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Return BF16 and FP8 rows that were published side by side."""
    bases: dict[object, Row] = {}
    fp8: list[Row] = []
    for row in found:
        if row.plan.precision.fp8 is None:
            bases[row.pair] = row
        else:
            fp8.append(row)
    return [(bases[row.pair], row) for row in fp8 if row.pair in bases]
