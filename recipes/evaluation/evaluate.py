"""`python -m recipes.evaluation.evaluate RUN…`: what a trained checkpoint is worth on text and on
questions that it was not trained on.

A loss curve says how training went; this says what came out of it.  Held-out loss (nats a token)
and perplexity of named sets are computed by NeMo in the precision that the run was trained in.
Task accuracy is measured as others measure it: the checkpoint is exported to Hugging Face form with
NeMo's exporter and given to EleutherAI's lm-evaluation-harness. The outcome of every question is
kept, so that BF16 and FP8 are later compared on the same questions, one by one (`python -m
analysis.report`).  Results go into the run folder: evaluation.json and evaluation_items.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.plan import Plan
from recipes.run_folder import CHECKPOINT, finished_checkpoints, read_plan

# One point: what sampling alone makes of an accuracy near one half on 2,500 questions, so the least
# that a table of unpaired accuracies could show.  Loss, not accuracy, is where smaller differences
# are looked for.
ACCURACY_BAR = 0.01
SET = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")
HELDOUT = "heldout"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return a run's whole checkpoints by the steps trained until each, in order.

    NeMo counts from zero: `step=59` is written after 60 steps.
    """
    found = {}
    for path in finished_checkpoints(folder):
        name = CHECKPOINT.fullmatch(path.name)
        if name and (path / "weights" / ".metadata").exists():
            found[int(name[1]) + 1] = path
    return dict(sorted(found.items()))


def choose(folder: Path, step: int | None) -> tuple[int, Path]:
    """Return step and folder of the checkpoint to evaluate, the newest by default; InputError where
    there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise InputError(
            f"{folder} holds no whole checkpoint; train with settings=convergence and a corpus, not"
            " random tokens"
        )
    if step is None:
        step = max(found)
    if step not in found:
        raise InputError(
            f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, found))}"
        )
    return step, found[step]


def named_sets(given: Sequence[str]) -> dict[str, Path]:
    """Return `name=path` arguments as a dict; InputError where one is malformed, repeated, or names
    nothing.
    """
    sets: dict[str, Path] = {}
    for text in given:
        match = SET.fullmatch(text)
        if not match:
            raise InputError(
                f"--sets {text} is not name=path; write for example wiki=/data/wiki (wiki.bin and"
                " wiki.idx) or wiki=/data/wiki.txt"
            )
        name, path = match[1], Path(match[2])
        if name in sets or name == HELDOUT:
            raise InputError(
                f"--sets names {name} twice, or like the run's own held-out split; choose another"
                " name"
            )
        if not path.exists() and not is_indexed(path):
            raise InputError(
                f"--sets {name}: neither {path} nor {path}.bin with {path}.idx exists; name text or"
                " a Megatron prefix"
            )
        sets[name] = path
    return sets


def is_indexed(path: Path) -> bool:
    """Return whether `path` is the prefix of a Megatron data set."""
    return all(path.with_name(path.name + suffix).exists() for suffix in (".bin", ".idx"))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="python -m recipes.evaluation.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders with a checkpoint"
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="text files, or .bin/.idx prefixes, beside the held-out split",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="the first N tokens of each set (default: all)",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness"
    )
    parser.add_argument(
        "--task-dir", type=Path, metavar="DIR", help="folder with task YAML files of your own"
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="the first N questions of each task (default: all)",
    )
    parser.add_argument(
        "--step",
        type=positive,
        metavar="N",
        help="the checkpoint after N steps (default: the newest)",
    )
    parser.add_argument(
        "--accuracy-bar",
        type=share,
        default=ACCURACY_BAR,
        help="largest harmless difference in accuracy (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """Return a whole number above zero; what argparse turns into its own one line otherwise."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def share(text: str) -> float:
    """Return a number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return value


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate every run, all inputs checked first; return what was written into the run
    folders.
    """
    sets = named_sets(args.sets)
    jobs: list[tuple[Path, Plan, int, Path]] = [
        (folder, read_plan(folder), *choose(folder, args.step)) for folder in args.runs
    ]
    if args.task_dir and not args.task_dir.is_dir():
        raise InputError(
            f"--task-dir {args.task_dir} is no folder; name the one that holds the task YAML files"
        )
    for package, needed in (("nemo", True), ("lm_eval", bool(args.tasks))):
        if needed and find_spec(package) is None:
            raise InputError(
                f"{package} is not installed here; run `make install`, or evaluate in the container"
            )
    for variable in OFFLINE:
        os.environ.setdefault(
            variable, "1"
        )  # before the Hugging Face libraries are imported; 0 lets them download
    heavy = importlib.import_module("recipes.evaluation.heavy.checkpoint")
    tasks = (
        importlib.import_module("recipes.evaluation.heavy.tasks").find_tasks(
            args.tasks, args.task_dir
        )
        if args.tasks
        else None
    )
    options = {
        "sets": sets,
        "max_tokens": args.max_tokens,
        "tasks": tasks,
        "limit": args.limit,
        "accuracy_bar": args.accuracy_bar,
    }
    return [heavy.evaluate_run(*job, **options) for job in jobs]


def lines(result: dict[str, Any]) -> list[str]:
    """Return a run's results as text: a line a set and a line a task."""
    said = [
        f"{result['run']}, step {result['step']} ({result['label']};"
        f" {result['arithmetic']['sets']})"
    ]
    for name, s in result["sets"].items():
        said.append(
            f"  {name}: loss {s['loss']:.4f} ± {s['stderr']:.4f} nats/token, perplexity"
            f" {s['perplexity']:.2f}, {s['tokens']:,} tokens"
        )
    same = result["training_evaluation"]
    if same:
        said.append(
            f"  batches of training's evaluation: {same['loss']:.6f}, logged {same['logged']:.6f}"
        )
    for name, t in result["tasks"].items():
        accuracy = (
            "no per-question accuracy"
            if t["accuracy"] is None
            else f"{t['metric']} {t['accuracy']:.4f} ± {t['stderr']:.4f}"
        )
        said.append(f"  {name}: {accuracy}, {t['n']:,} questions")
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    args = arguments(argv)
    try:
        with redirect_stdout(
            sys.stderr
        ):  # NeMo and the harness talk on stdout, which is for the results
            results = evaluate(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    print(
        json.dumps(results, indent=1)
        if args.json
        else "\n".join(line for result in results for line in lines(result))
    )
    return 0


if __name__ == "__main__":
    command(main)
