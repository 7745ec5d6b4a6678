"""Short runs on this machine: how one is prepared, what it would have come to, and how another
differs from that.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from analysis import compare
from launch import status
from tests.faults.commands import call
from tests.faults.folders import opened, recorded, replan, rows_in
from tests.faults.training.process import run_to_end

AREA = "Training"
PRECISIONS = ("bf16", "fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8")
FP8 = PRECISIONS[1:]
STEPS, SAVED_EVERY, EVALUATED_EVERY = 12, 3, 4
SHORT = [
    f"train.max_steps={STEPS}",
    f"train.checkpoint_interval={SAVED_EVERY}",
    f"train.eval_interval={EVALUATED_EVERY}",
    "train.warmup_steps=1",
    "train.eval_batches=1",
    "train.diagnostics_interval=4",
    "mapping=single",
    "mapping.micro_batch=1",
    "logger=none",
    "model.num_layers=4",
    "executor.threads=1",
]
MEASURED = ("step_time_s", "optimizer_time_s", "tokens_per_s_per_gpu", "memory_gb")
EQUAL = "continued; every number and the last checkpoint as without the fault, to the bit"


def precision_of(n: int) -> str:
    """Return the precision of a fault's input; the first is the same for all faults, which share
    its undisturbed run.
    """
    return PRECISIONS[(n + 1) % len(PRECISIONS)]


def short(folder: Path, precision: str, processes: int = 1) -> list[str]:
    """Return the overrides of a short run in a folder: as many micro-batches a step as processes,
    two at least.
    """
    layout = [
        f"precision={precision}",
        f"num_gpus={processes}",
        f"mapping.global_batch={max(2, processes)}",
    ]
    return [*SHORT, *layout, f"runs_dir={folder.parent}", f"run_name={folder.name}"]


def prepared(folder: Path, precision: str, *overrides: str, processes: int = 1) -> Path:
    """Return a run folder that waits to be trained."""
    return opened([*short(folder, precision, processes), *overrides])


@functools.cache
def unbroken(precision: str, processes: int) -> Path:
    """Return the folder of a run that nothing interrupts."""
    folder = prepared(
        Path(_kept().name) / f"{precision}.{processes}", precision, processes=processes
    )
    codes = run_to_end(folder, processes)
    assert recorded(folder) == "done" and set(codes) == {0}, (folder / "log.txt").read_text()[
        -2000:
    ]
    return folder


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="unbroken")


def numbers(file: Path) -> list[dict[str, Any]]:
    """Return what does not depend on the clock in each line, with NaN as text, which equals
    itself.
    """
    return [
        {k: v if v == v else "NaN" for k, v in row.items() if k not in MEASURED}
        for row in rows_in(file)
    ]


def saved(folder: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first."""
    found = [
        path
        for path in (folder / "checkpoints").glob("step=*")
        if path.is_dir() and path.name.removeprefix("step=").isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step=")))


def state(folder: Path) -> dict[str, Any]:
    """Return size and checksum of the newest checkpoint's shards: weights, optimizer state, FP8
    scales and histories.
    """
    newest = saved(folder)[-1]
    records = [json.loads(path.read_text()) for path in newest.glob("files.rank*.json")]
    return {
        "step": newest.name,
        **{
            name: fact
            for record in records
            for name, fact in record.items()
            if name.endswith(".distcp")
        },
    }


def unlike(folder: Path, precision: str, processes: int = 1) -> str | None:
    """Return how a run that was broken and continued differs from an unbroken one; None if in
    nothing.
    """
    whole = unbroken(precision, processes)
    if recorded(folder) != "done":
        return f"{folder.name}: {recorded(folder)}: {(folder / 'log.txt').read_text()[-300:]!r}"
    for name in ("metrics.jsonl", "fp8.jsonl"):
        a, b = numbers(whole / name), numbers(folder / name)
        if a != b:
            at = next(
                (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)),
            )
            return (
                f"{folder.name}: {name} has {len(b)} lines for {len(a)}, first other line {at + 1}:"
                f" {b[at : at + 1]} for {a[at : at + 1]}"
            )
    return (
        None
        if state(folder) == state(whole)
        else f"{folder.name}: the last checkpoint has other bits"
    )


def shown(folder: Path) -> tuple[str, str]:
    """Return the status and its reason that `python -m launch.status` prints."""
    ended = call(status.main, [folder, "--json"])
    (row,) = json.loads(ended.out)
    return row["status"], row["why"]


def refusal(folder: Path, processes: int = 1) -> str:
    """Return why `python -m analysis.compare` refuses a run beside an unbroken BF16 one; empty
    where it compares them.
    """
    ended = call(compare.main, [unbroken("bf16", processes), folder])
    assert not ended.wrong(), ended
    return ended.err


def step_of(folder: Path) -> int:
    """Return the newest step that is written."""
    return max((row["step"] for row in rows_in(folder / "metrics.jsonl")), default=0)


def events(folder: Path) -> list[str]:
    """Return the kinds of events, in order."""
    return [str(row["event"]) for row in rows_in(folder / "events.jsonl")]


def finish(folder: Path, precision: str, processes: int = 1) -> str | None:
    """Continue a run to its end and return how it differs from an unbroken one."""
    run_to_end(folder, processes)
    return unlike(folder, precision, processes)


@functools.cache
def paused(precision: str, step: int) -> Path:
    """Return the folder of a run that paused after a step; to be copied."""
    folder = Path(_kept().name) / f"{precision}.paused{step}"
    run = prepared(folder, precision, f"train.stop_after={step}")
    codes = run_to_end(run)
    assert recorded(run) == "paused", (codes, (run / "log.txt").read_text()[-2000:])
    return run


def copied(stopped: Path, run: Path) -> Path:
    """Copy a paused run to `run`, where it may go on to its last step, and return that folder."""
    shutil.copytree(stopped, run)
    replan(run, train={"stop_after": None})
    return run
