"""`python -m launch model=… precision=… gpu=…`: plan, check, and run here or submit; `-m` for a
sweep, `dry_run=true` to look first.

The job's script goes to standard output in a dry run, and what it will do to standard error, so
that the script can be piped.  The same command again continues what has not ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from launch.job import reserved, write_job
from launch.local import Job, run_all
from launch.script import render
from launch.state import check_idle
from launch.submit import submit_all
from launch.summary import DEMO_TEXT, INSTEAD, summary, table
from recipes.cli import ArgumentParser, command
from recipes.compose.axes import check_single, with_axes
from recipes.compose.tree import compose_plan, compose_tree, sweep
from recipes.data.files import Facts, check_data, what_is_read
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.plan import Plan
from recipes.run_folder import check_folder, folder_of, status_of

PROBE_S = 1  # launch.status takes a folder's lock for an instant, to see whether it is free


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; what is no flag is a Hydra override."""
    parser = ArgumentParser(
        prog="python -m launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Hydra overrides, e.g. precision=mxfp8 train.max_steps=50",
    )
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="one run for each combination of comma-separated values",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print plan, summary and script as JSON, and start nothing",
    )
    return parser.parse_intermixed_args(argv)


def plans(overrides: Sequence[str], multirun: bool) -> list[Plan]:
    """Return the checked plans of a command line; nothing is started unless all of them pass."""
    if not multirun:
        check_single(overrides)
    found = [
        compose_plan(one)
        for one in (sweep(with_axes(overrides)) if multirun else [list(overrides)])
    ]
    names = [folder_of(plan) for plan in found]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise InputError(
            f"two plans of this sweep share the folder {twice}; put what differs into run_name"
        )
    for plan in found:
        check_folder(plan)
    return found


def dry_run(overrides: Sequence[str]) -> bool:
    """Return whether the command line asks for a dry run."""
    asked = compose_tree(sweep(overrides)[0]).get("dry_run")
    if not isinstance(asked, bool):
        raise InputError(
            f"dry_run={asked}: it is true or false; write dry_run=true to look and start nothing"
        )
    return asked


def show(found: Sequence[Plan], as_json: bool) -> int:
    """Print what would be launched."""
    facts = checked(found)
    if as_json:
        jobs = [
            {"plan": p.model_dump(), "summary": summary(p, data), "script": render(p)}
            for p, data in zip(found, facts, strict=True)
        ]
        print(json.dumps(jobs, indent=1))
        return 0
    for plan, data in zip(found, facts, strict=True):
        sys.stdout.write(render(plan))
        sys.stdout.flush()
        print(table(plan, data), file=sys.stderr)
    return 0


def checked(found: Sequence[Plan]) -> list[Facts]:
    """Return the facts of each plan's data, read once for plans that train on the same.

    InputError where a plan could not train on its data.
    """
    seen: dict[tuple[object, ...], Facts] = {}
    for plan in found:
        key = what_is_read(plan)
        seen[key] = seen.get(key) or check_data(plan)
    return [seen[what_is_read(plan)] for plan in found]


def refuse_demo_text(plan: Plan) -> None:
    """Raise InputError for a cluster's job on Python's standard library, unless it is meant.

    A run that was submitted before is continued all the same.
    """
    on_cluster = plan.executor.kind == "slurm" and not plan.on_cpu and plan.data.is_demo_text
    if on_cluster and not plan.data.demo_text and status_of(folder_of(plan)) == "new":
        raise InputError(f"{plan.run_name} would train on {DEMO_TEXT}; {INSTEAD}")


def note_unchecked(plans: Sequence[Plan], facts: Sequence[Facts]) -> None:
    """Print why data of submitted jobs could not be looked at here, each reason once."""
    submitted = zip(plans, facts, strict=True)
    reasons = {data.reason for plan, data in submitted if plan.executor.kind == "slurm"}
    for reason in sorted(reasons - {""}):
        print(f"note: data not checked here: {reason}", file=sys.stderr)


def launch(found: Sequence[Plan]) -> int:
    """Run or submit the plans, leaving out those that are done; return the exit code."""
    todo = [plan for plan in found if status_of(folder_of(plan)) != "done"]
    for plan in todo:
        refuse_demo_text(plan)
    facts = checked(todo)
    for plan in found:
        if plan not in todo:
            print(f"{folder_of(plan)}: done already")
    here = [plan for plan in todo if plan.executor.kind == "local"]
    submit_all([plan for plan in todo if plan.executor.kind == "slurm"])
    note_unchecked(todo, facts)
    with ExitStack() as stack:
        locks = [stack.enter_context(reserved(check_folder(plan), PROBE_S)) for plan in here]
        for plan in here:
            check_idle(folder_of(plan))
            (folder_of(plan) / "stop").unlink(missing_ok=True)
        jobs = [
            Job(plan, folder_of(plan), write_job(plan), lock)
            for plan, lock in zip(here, locks, strict=True)
        ]
        code = run_all(jobs) if jobs else 0
    for plan in here:
        print(f"{folder_of(plan)}: {status_of(folder_of(plan))}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    args = arguments(argv)
    try:
        found = plans(args.overrides, args.multirun)
        if args.json or dry_run(args.overrides):
            return show(found, args.json)
        return launch(found)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    command(main)
