"""What the harness costs: a training step of this project over a bare Megatron-Core step, both in
one run on one device.

    python -m recipes.measure.gpu.overhead
        Llama 3 8B cut to 4 layers, sequence 8192, BF16, on an H200
    python -m recipes.measure.gpu.overhead gpu=h100 precision=fp8_current --rounds 16 \\
        --out results/harness_cost
    python -m recipes.measure.gpu.overhead --profile --out results/layer
        and a layer's kernels, in kernels.jsonl
    python -m recipes.measure.gpu.overhead gpu=cpu model=llama3_tiny data=text settings=convergence
        to try the command

NeMo's llm.pretrain is built from the plan and started as for any run, into a folder that is thrown
away (under TMPDIR: name a shared disk there if runs are written to one).  Between its steps a
callback does bare ones with the same model, optimizer, schedule and data loader, so both kinds meet
the same clocks, caches and memory.  What a step of each kind is:

- harness: from one start of Lightning's loop to the next.  In it are data loading, NeMo's and
  Lightning's own code, all callbacks, the run folder's lines and its count of FP8 GEMMs.  Not in
  it: evaluation, checkpoints, and the start of a run.
- bare: train_step of Megatron-LM core_v0.12.3 (megatron/training/training.py:1213, forward step and
  loss of pretrain_gpt.py): zero the gradients, get_forward_backward_func over the micro-batches,
  which ends in finalize_model_grads, optimizer.step with its clipping, a step of the schedule
  (NeMo's object), mean loss on the device.  It calls Megatron-Core's DDP module and the data
  loader's iterator directly, and the hooks that count FP8 GEMMs are taken off Transformer Engine's
  layers.  It neither logs nor does what Megatron-LM's train_step does besides: look for NaN in each
  micro-batch's loss, and gather success and gradient norm over the ranks, which waits for the
  device.  A run's losses are the same bit for bit, whichever kind a step is
  (tests/recipes/test_harness_cost.py).

Times are those of the device (CUDA events; on a CPU, of the clock), and neither kind waits for it
at its ends: the host launches ahead, held back in each step by Megatron-Core itself
(recipes/training/deferred.py).  A step that comes late to the device counts with the time for which
the device stood idle.  Steps come in blocks, one harness step, three bare ones, one harness step,
and the cost is taken in each block, mean over mean, so that a drift of all steps cancels; then the
mean over the blocks, with Student's interval.

The time of the run folder's hooks is that of the host, most of it while the device works.  On GPUs
NeMo's recipe turns Python's automatic garbage collection off and collects each 100th step, which
this command does not reach; bare steps here have none, Megatron-LM's have Python's own.  The
garbage of the run is collected and timed at the end, and the cost is given without and with a
collection each 100 steps, its time as that much longer as it has more to collect, and as if harness
steps alone had left any.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_1samp

from recipes.cli import ArgumentParser, command
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.measure.gpu.layer_profile import kernels_of_a_layer
from recipes.plan import Plan
from recipes.run_folder import append_line, write_json
from recipes.training.run import task

if TYPE_CHECKING:
    from recipes.measure.gpu.interleaved_steps import Times

GOAL = 0.005  # of a bare step
BARE = 3  # bare steps of a block
WARM_UP = 1  # blocks
LEAST_ROUNDS = 2
MOST_ROUNDS = 48  # with more, NeMo collects garbage amid them
DEFAULTS = (
    "model=llama3_8b",
    "model.num_layers=4",
    "gpu=h200",
    "stack=nemo_25_04_te_2_11",
    "cluster.container_runtime=none",
    "settings=tuned",
    "mapping=single",
    "mapping.micro_batch=1",
    "mapping.global_batch=8",
    "data=mock",
    "logger=none",
)


def steps_of(blocks: int) -> int:
    """Return the training steps that `blocks` take, with a last harness step that ends the run."""
    return (2 + BARE) * blocks + 1


def plan_of(overrides: Sequence[str], rounds: int) -> Plan:
    """Return the plan of the measurement; InputError where it needs more than one device, or one
    that is not here.
    """
    blocks = WARM_UP + rounds
    enough = steps_of(blocks) + 1  # one more: the data must not end
    length = [
        f"train.{key}={enough}" for key in ("max_steps", "eval_interval", "checkpoint_interval")
    ]
    plan = compose_plan([*DEFAULTS, *overrides, *length, f"train.stop_after={2 * blocks + 1}"])
    if plan.num_gpus != 1:
        raise InputError(
            f"the harness cost is measured on one device and the plan asks for {plan.num_gpus}; use"
            " mapping=single num_gpus=1"
        )
    if not plan.on_cpu and not (torch.cuda.is_available() and find_spec("transformer_engine")):
        raise InputError(
            f"gpu={plan.gpu.name} needs a CUDA GPU and Transformer Engine, not found here; run it"
            " where they are, or add gpu=cpu"
        )
    return plan


def measure(plan: Plan, blocks: int, folder: Path, trace: Path | None = None) -> Times:
    """Train the plan into the run folder `folder`, as recipes.training.run does, with bare steps in
    between; trace one more step into `trace`.
    """
    training = task(plan, folder)
    from recipes.measure.gpu.interleaved_steps import Interleaved
    from recipes.training.callback import RunFolderCallback  # after Megatron-Core was adapted

    callbacks = training.keywords["trainer"].callbacks
    interleaved = Interleaved(
        plan, blocks, BARE, next(c for c in callbacks if isinstance(c, RunFolderCallback)), trace
    )
    callbacks.insert(0, interleaved)
    training()
    return interleaved.times


def cost_of(times: Times, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Return the cost from the blocks after the first `warm_up`: fractions of a bare step, and
    means in seconds or milliseconds.

    `cost` is the mean over the blocks, with its 95 % interval (Student's); `with_garbage` adds the
    share of NeMo's garbage collections.  `hooks_ms` is the host's time in the run folder's hooks on
    the steps.  `verdict` on the goal: "met" or "missed" where the interval, with garbage, lies on
    one side of it; else "undecided".
    """
    harness, hooks, bare = (
        np.array(values[warm_up:]).mean(axis=1)
        for values in (times.harness, times.hooks, times.bare)
    )
    cost = harness / bare - 1
    garbage, bare_s = garbage_of_a_step(times), float(bare.mean())
    low, high = (float(end) for end in ttest_1samp(cost, 0).confidence_interval())
    return {
        "rounds": len(cost),
        "bare_step_s": bare_s,
        "harness_step_s": float(harness.mean()),
        "cost": float(cost.mean()),
        "cost_interval_95": [low, high],
        "with_garbage": float(cost.mean()) + garbage / bare_s,
        "added_ms": 1e3 * float((harness - bare).mean()),
        "hooks_ms": 1e3 * float(hooks.mean()),
        "garbage_ms_a_step": 1e3 * garbage,
        "goal": GOAL,
        "verdict": (
            "met"
            if high + garbage / bare_s < GOAL
            else "missed"
            if low + garbage / bare_s > GOAL
            else "undecided"
        ),
        "labels": {"step_time": "measured"},
    }


def garbage_of_a_step(times: Times) -> float:
    """Return the seconds of a step that NeMo's garbage collections take: one has a fixed part, and
    one that grows with the steps before it.
    """
    if not times.collection_interval:
        return 0.0
    growing = max(0.0, times.collection - times.collection_again) / times.collection_steps
    return times.collection_again / times.collection_interval + growing


def rows_of_blocks(times: Times) -> list[dict[str, Any]]:
    """Return a row a block, warm-up included: harness, bare, bare, bare, harness."""
    columns = zip(times.harness, times.bare, times.hooks, strict=True)
    return [
        {"block": n, "harness_s": h, "bare_s": b, "hooks_s": k}
        for n, (h, b, k) in enumerate(columns)
    ]


def run(
    overrides: Sequence[str], rounds: int, out: Path | None, profile: bool = False
) -> dict[str, Any]:
    """Measure, and return the cost; with `out`, leave there blocks.jsonl, cost.json, and the run's
    plan.json, manifest.json, metrics.jsonl.

    `profile`: and kernels.jsonl, the kernels of a layer (recipes/measure/gpu/layer_profile.py).
    """
    plan = plan_of(overrides, rounds)
    if profile:
        _can_be_profiled(plan, out)
    if out:
        _make(out)
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(sys.stderr),
    ):  # NeMo logs to stdout
        trace = Path(folder) / "trace.json"
        times = measure(plan, WARM_UP + rounds, Path(folder), trace if profile else None)
        device = json.loads((Path(folder) / "manifest.json").read_text())["device"]
        cost = {
            "device": device,
            "model": plan.model.name,
            "layers": plan.model.num_layers,
            "precision": plan.precision.name,
            **cost_of(times),
        }
        if out:
            _write(out, Path(folder), plan, cost, times)
        if out and profile:
            for row in kernels_of_a_layer(trace, plan.model.num_layers, plan.precision.name):
                append_line(
                    out / "kernels.jsonl",
                    {
                        **row,
                        "model": plan.model.name,
                        "tokens": plan.mapping.micro_batch * plan.seq_length,
                    },
                )
    return cost


def _can_be_profiled(plan: Plan, out: Path | None) -> None:
    micro_batches = plan.mapping.global_batch // plan.mapping.micro_batch
    if (
        plan.on_cpu
        or out is None
        or plan.model.num_layers < 3
        or micro_batches < 2
        or plan.mapping.recompute_layers
    ):
        raise InputError(
            "--profile reads a layer's kernels off a CUDA GPU: it needs --out, three layers or"
            " more, two micro-batches or more, and none recomputed"
        )


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {out}: {error.strerror}; name a folder that can be written"
        ) from None
    if any(out.iterdir()):
        raise InputError(
            f"--out {out} is not empty, and rows of two runs must not mix; name a new folder"
        )


def _write(out: Path, folder: Path, plan: Plan, cost: dict[str, Any], times: Times) -> None:
    for name in ("manifest.json", "metrics.jsonl"):
        shutil.copy(folder / name, out / name)
    (out / "plan.json").write_text(plan.model_dump_json(indent=1))
    write_json(
        out / "cost.json",
        {**cost, "bare_losses": times.bare_losses, "garbage_collection": _collections(times)},
    )
    for row in rows_of_blocks(times):
        append_line(out / "blocks.jsonl", row)


def _collections(times: Times) -> dict[str, Any]:
    return {
        "s": times.collection,
        "of_steps": times.collection_steps,
        "again_s": times.collection_again,
        "interval": times.collection_interval,
    }


def shown(cost: dict[str, Any]) -> Table:
    """Return the cost as a table for the terminal."""
    title = (
        f"Harness cost, measured: {cost['model']}, {cost['layers']} layers, {cost['precision']},"
        f" {cost['rounds']} blocks; {cost['device']}"
    )
    table = Table("", "", title=title, title_justify="left", show_header=False)
    low, high = cost["cost_interval_95"]
    table.add_row("bare Megatron-Core step", f"{1e3 * cost['bare_step_s']:.2f} ms")
    table.add_row("harness step", f"{1e3 * cost['harness_step_s']:.2f} ms")
    table.add_row("cost", f"{cost['cost']:+.3%}, 95 % interval {low:+.3%} to {high:+.3%}")
    table.add_row("added", f"{cost['added_ms']:.2f} ms a step")
    table.add_row("run folder's hooks, on the host", f"{cost['hooks_ms']:.2f} ms")
    table.add_row("garbage collection, its share", f"{cost['garbage_ms_a_step']:.2f} ms a step")
    table.add_row(
        "cost with garbage collection",
        f"{cost['with_garbage']:+.3%}; goal under {cost['goal']:.1%}: {cost['verdict']}",
    )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m recipes.measure.gpu.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Hydra overrides of the plan; the number of steps is set by --rounds",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=8,
        help="blocks of five steps, after one that is not counted (default: 8)",
    )
    parser.add_argument("--json", action="store_true", help="print the cost as JSON")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="profile one more step, and write a layer's kernels to kernels.jsonl in --out",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=(
            "new or empty folder for cost.json, the times of every block, the plan and the manifest"
        ),
    )
    args = parser.parse_intermixed_args(argv)
    try:
        if args.rounds < LEAST_ROUNDS:
            raise InputError(
                f"--rounds {args.rounds}: the interval comes from how blocks differ; give"
                f" {LEAST_ROUNDS} or more"
            )
        if args.rounds > MOST_ROUNDS:
            raise InputError(
                f"--rounds {args.rounds}: NeMo collects garbage at step 100, amid the blocks; give"
                f" at most {MOST_ROUNDS}"
            )
        cost = run(args.overrides, args.rounds, args.out, args.profile)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print(json.dumps(cost, indent=1))
    else:
        Console().print(shown(cost))
    return 0


if __name__ == "__main__":
    command(main)
