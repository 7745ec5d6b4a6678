"""`fewbits COMMAND …`: every command of the project under one name, from any folder.

`fewbits compare RUN RUN` is `python -m analysis.compare RUN RUN`.  A command's module is imported
when it is asked for, so that `fewbits predict` loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from recipes import cli
from recipes.errors import one_line
from recipes.exit_codes import EXIT_WRONG_INPUT


@dataclass(frozen=True)
class Command:
    """A command: what it does in a line, and the module whose `main` it is."""

    module: str
    does: str
    first: tuple[str, ...] = ()
    """Arguments that stand before the user's."""


COMMANDS = {
    "plan": Command(
        "launch.__main__", "show the plan and the job of an override list", ("dry_run=true",)
    ),
    "launch": Command("launch.__main__", "train here, or submit a job; -m for a sweep"),
    "matrix": Command("launch.matrix", "which cells run: model x precision x GPU"),
    "status": Command("launch.status", "what is queued, running, done or failed, and why"),
    "cancel": Command("launch.cancel", "cancel the Slurm jobs of runs"),
    "resume": Command("launch.resume", "continue runs from their last checkpoint"),
    "data": Command("recipes.training.data", "prepare your own text for training"),
    "compare": Command("analysis.compare", "does the loss of each FP8 run match BF16?"),
    "report": Command("analysis.report", "one HTML page with verdicts and figures"),
    "throughput": Command("analysis.throughput", "step time, tokens/s, TFLOP/s and speedup"),
    "tuning": Command("analysis.tuning", "what single settings change in step time and memory"),
    "layouts": Command("analysis.speed.layouts", "does a recipe train alike under every layout?"),
    "predict": Command("analysis.predict", "step time on GPUs that you do not have"),
    "reproduce": Command("analysis.post.__main__", "a figure of NVIDIA's post: fig1 to fig5"),
    "import": Command("analysis.import_logs", "a run folder from another harness's log"),
    "evaluate": Command("recipes.evaluation.evaluate", "held-out loss and tasks of a checkpoint"),
    "gemm": Command("recipes.measure.gemm", "measure GEMM speedups on this GPU"),
    "te-parity": Command(
        "recipes.measure.te_parity", "compare FP8 numerics with Transformer Engine's"
    ),
    "memory": Command("recipes.measure.memory", "compare the memory estimate with measured peaks"),
    "overhead": Command("recipes.measure.gpu.overhead", "measure what the harness costs per step"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; without one, list the commands."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        line = f"error: {name}: no such command; it is one of {', '.join(COMMANDS)}"
        print(one_line(line), file=sys.stderr)
        return EXIT_WRONG_INPUT
    wanted = COMMANDS[name]
    run: Callable[[Sequence[str]], int] = importlib.import_module(wanted.module).main
    return run([*wanted.first, *rest])


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{one.does}" for name, one in COMMANDS.items()]
    return "\n".join(
        ["usage: fewbits COMMAND …", "", *lines, "", "fewbits COMMAND --help tells more of each."]
    )


def run() -> NoReturn:
    """Run as the installed program."""
    cli.command(main)
