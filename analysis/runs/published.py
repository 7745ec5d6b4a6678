"""Published figures to hold measurements against, in one form: NVIDIA's step times and throughput
tables, and the post's speedups.

`reference/` holds them as they were published, with their source: `dgxc_step_times.csv` (NVIDIA's
dgxc-benchmarking, step times with layouts), `nemo_performance_summary.csv` (NeMo's and
Megatron-Bridge's performance pages, tokens/s/GPU), `further_rows.csv` (rows of both that were found
later) and `post_figures.csv` (the speedups that NVIDIA's post "Faster Training Throughput in FP8
Precision with NVIDIA NeMo" prints). Tables say "FP8" and mean a recipe: delayed scaling where they
do not say (the scripts' default), current scaling where they say cs.  A row that does not tell its
recipe at all, one that was withdrawn, and one of a model with fewer layers are left out.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from recipes.plan import Plan

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
TABLES = ("dgxc_step_times.csv", "nemo_performance_summary.csv")
FURTHER = "further_rows.csv"  # beside TABLES, for the predictor holds it apart
RECIPES = {
    "delayed": "fp8_delayed",
    "cs": "fp8_current",
    "mxfp8": "mxfp8",
}  # what a published fp8_recipe begins with
RELEASE_OF = {"v2.3.0": "25.04", "v2.4.0": "25.07"}  # the NeMo container of a stack's tag


@dataclass(frozen=True)
class Layout:
    """What decides how much work a GPU has: sizes as in plan.Mapping; `vp` None where the source
    does not say.
    """

    num_gpus: int
    tp: int
    pp: int
    cp: int
    vp: int | None
    fsdp: bool
    micro_batch: int
    global_batch: int

    @property
    def data_parallel(self) -> int:
        """The number of model replicas."""
        return self.num_gpus // (self.tp * self.pp * self.cp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a replica computes in a step."""
        return self.global_batch // (self.micro_batch * self.data_parallel)


def layout_of(plan: Plan) -> Layout:
    """Return the layout of a plan."""
    m = plan.mapping
    return Layout(plan.num_gpus, m.tp, m.pp, m.cp, m.vp, m.fsdp, m.micro_batch, m.global_batch)


@dataclass(frozen=True)
class Published:
    """One row of a published table; `step_time_s` is None where only throughput was given; `nemo`
    is the container's version.
    """

    model: str
    gpu: str
    precision: str
    seq_length: int
    layout: Layout
    tokens_per_s_per_gpu: float
    step_time_s: float | None
    nemo: str
    source: str


@functools.cache
def rows() -> tuple[Published, ...]:
    """Return every published row that names its recipe and is of a whole model."""
    found = []
    for table in (*TABLES, FURTHER):
        with (REFERENCE / table).open(newline="") as file:
            found += [row for raw in csv.DictReader(file) if (row := _row(raw))]
    return tuple(found)


def _row(raw: dict[str, str]) -> Published | None:
    precision = (
        "bf16"
        if raw["precision"] == "bf16"
        else next(
            (name for begin, name in RECIPES.items() if raw["fp8_recipe"].startswith(begin)), None
        )
    )
    left_out = raw["note"].startswith(("PROXY", "superseded")) or not raw["tokens_per_sec_per_gpu"]
    if precision is None or left_out:
        return None
    sizes = {key: _whole(raw[key]) for key in ("num_gpus", "tp", "pp", "cp", "mbs", "gbs")}
    if None in sizes.values():
        return None
    n = {key: int(value or 0) for key, value in sizes.items()}
    fsdp = (_whole(raw.get("fsdp", "")) or 0) > 0
    layout = Layout(
        n["num_gpus"], n["tp"], n["pp"], n["cp"], _whole(raw["vp"]), fsdp, n["mbs"], n["gbs"]
    )
    name, seconds = raw["model"].replace("3.1", "31"), raw.get("step_time_s")
    where = (raw.get("nemo_container") or raw["release"]).split(" ")[0]
    numbers = float(raw["tokens_per_sec_per_gpu"]), float(seconds) if seconds else None
    return Published(
        name,
        raw["gpu"].lower(),
        precision,
        int(raw["seqlen"]),
        layout,
        *numbers,
        where,
        raw["source"],
    )


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def closest(found: Iterable[Published], stack: str, num_gpus: int) -> Published | None:
    """Return the row whose NeMo is nearest to that of a stack's tag (v2.3.0: 25.04), and then its
    number of GPUs; None for no row.
    """
    return min(
        found,
        key=lambda row: (months_apart(row.nemo, stack), abs(row.layout.num_gpus - num_gpus)),
        default=None,
    )


def months_apart(release: str, stack: str) -> int:
    """Return how many months lie between a NeMo release and that of a stack's tag."""
    return abs(_months(release) - _months(RELEASE_OF.get(stack, "25.04")))


def _months(release: str) -> int:
    year, month = release.lstrip("v").split(".")[:2]
    return 12 * int(year) + int(month)


def fits(row: Published, layout: Layout) -> bool:
    """Whether a row has this layout; a virtual-pipeline size that it does not state fits any."""
    same = (row.layout.tp, row.layout.pp, row.layout.cp, row.layout.fsdp, row.layout.micro_batch)
    return same == (
        layout.tp,
        layout.pp,
        layout.cp,
        layout.fsdp,
        layout.micro_batch,
    ) and row.layout.vp in (None, layout.vp)


@functools.cache
def post_speedups() -> dict[tuple[str, str], float]:
    """Return the speedups over BF16 that the post prints, by model and precision (H100, NeMo
    25.04).
    """
    with (REFERENCE / "post_figures.csv").open(newline="") as file:
        return {
            (row["model"], row["precision"]): float(row["value"])
            for row in csv.DictReader(file)
            if row["figure"] == "3"
        }
