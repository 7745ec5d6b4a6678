"""What emulated FP8 costs on a CPU: the step time of each precision over that of BF16, measured in
one run.

    python -m recipes.measure.gpu.emulation_cpu
        every precision, the demo's model and batch
    python -m recipes.measure.gpu.emulation_cpu model.hidden_size=512 \\
        model.ffn_hidden_size=2048 --json

The model is NeMo's own, built from the plan with the layers that training uses; a step is forward,
backward and an AdamW step.  The precisions take turns, a step each, round after round, so that
whatever else the machine does hits all of them alike; the ratio is taken within each round, and its
median is reported with the quartiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from recipes.cli import ArgumentParser, command
from recipes.compose.tree import CONF, compose_plan
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.plan import Plan
from recipes.training import cpu

Step = Callable[[], None]
WARM_UP = 3


def step_of(plan: Plan) -> Step:
    """Return a function that does one training step of the plan's model on one micro-batch of
    random tokens.
    """
    import fiddle as fdl
    from megatron.core.transformer.module import Float16Module
    from nemo.utils import logging

    from recipes.training.recipe import build

    logging.setLevel(logging.ERROR)
    config = fdl.build(build(plan, Path("unused")).model.config)
    config.params_dtype, config.bf16 = torch.bfloat16, True
    torch.manual_seed(plan.seed)
    model = Float16Module(
        config, config.configure_model(SimpleNamespace(vocab_size=plan.model.vocab_size))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.train.max_lr)
    shape = (plan.mapping.micro_batch, plan.seq_length)
    tokens = torch.randint(plan.model.vocab_size, (shape[0], shape[1] + 1))
    positions = torch.arange(shape[1]).expand(shape)

    def step() -> None:
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def start_megatron() -> None:
    """Start Megatron-Core's groups for this one process."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def measure(steps: dict[str, Step], rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of `rounds` steps of each precision, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def ratios(seconds: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return a row a precision: median step time, and its ratio to BF16 with quartiles."""
    rows = []
    for name, values in seconds.items():
        low, median, high = np.percentile(values / seconds["bf16"], [25, 50, 75])
        row = {
            "precision": name,
            "step_time_s": float(np.median(values)),
            "ratio_to_bf16": float(median),
        }
        rows.append(
            {
                **row,
                "ratio_low": float(low),
                "ratio_high": float(high),
                "labels": {"numerics": "emulated", "step_time": "measured"},
            }
        )
    return rows


def precisions() -> list[str]:
    """Return the precisions of conf/, BF16 first."""
    return sorted(
        (p.stem for p in (CONF / "precision").glob("*.yaml")),
        key=lambda name: (name != "bf16", name),
    )


def bench(overrides: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Return the rows of the benchmark for the plan that `overrides` compose."""
    fixed = ["experiment=demo", "data=mock", "gpu=cpu", *overrides]
    plans = {name: compose_plan([*fixed, f"precision={name}"]) for name in precisions()}
    cpu.activate()
    start_megatron()
    return ratios(measure({name: step_of(plan) for name, plan in plans.items()}, rounds))


def shown(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table for the terminal."""
    title = (
        f"Step time on this CPU, {torch.get_num_threads()} thread(s): numerics emulated, time"
        " measured"
    )
    table = Table(
        "precision", "step s", "ratio to BF16", "quartiles", title=title, title_justify="left"
    )
    for row in rows:
        cells = (
            f"{row['step_time_s']:.3f}",
            f"{row['ratio_to_bf16']:.2f}",
            f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
        )
        table.add_row(row["precision"], *cells)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m recipes.measure.gpu.emulation_cpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides of the plan"
    )
    parser.add_argument(
        "--rounds", type=int, default=30, help="steps of each precision (default: 30)"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_intermixed_args(argv)
    try:
        rows = bench(args.overrides, max(1, args.rounds))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        Console().print(shown(rows))
    return 0


if __name__ == "__main__":
    command(main)
