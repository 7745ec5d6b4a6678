"""`python -m launch model=… precision=… gpu=…`: plan, check and run; `-m` for a sweep, `dry_run=true` to look first."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from launch.local import Job, command, run_all
from recipes.compose import compose_plan, compose_tree, sweep
from recipes.errors import EXIT_WRONG_INPUT, InputError
from recipes.plan import Plan
from recipes.run_folder import folder_of, open_folder, status_of


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; what is no flag is a Hydra override."""
    parser = argparse.ArgumentParser(prog="python -m launch", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides, e.g. precision=mxfp8 train.max_steps=50")
    parser.add_argument("-m", "--multirun", action="store_true", help="one run for each combination of comma-separated values")
    return parser.parse_intermixed_args(argv)


def plans(overrides: Sequence[str], multirun: bool) -> list[Plan]:
    """Return the checked plans of a command line; nothing is started unless all of them pass."""
    found = [compose_plan(one) for one in (sweep(overrides) if multirun else [list(overrides)])]
    names = [folder_of(plan) for plan in found]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise InputError(f"two plans of this sweep share the folder {twice}; put what differs into run_name")
    if not all(plan.emulated for plan in found):
        raise InputError("executor=local runs gpu=cpu only; other GPUs need a cluster executor, which this version does not have yet")
    return found


def launch(overrides: Sequence[str], multirun: bool) -> int:
    """Run the plans of a command line, leaving out those that are done; return the exit code."""
    found = plans(overrides, multirun)
    if compose_tree(sweep(overrides)[0]).get("dry_run"):
        for plan in found:
            print(json.dumps(plan.model_dump(), indent=1))
            print(shlex.join(command(plan, folder_of(plan))))
        return 0
    jobs = [Job(plan, open_folder(plan)) for plan in found]
    todo = [job for job in jobs if status_of(job.folder) != "done"]
    for job in jobs:
        if job not in todo:
            print(f"{job.folder}: done already")
    code = run_all(todo) if todo else 0
    for job in todo:
        print(f"{job.folder}: {status_of(job.folder)}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for what the user can mend."""
    args = arguments(argv)
    try:
        return launch(args.overrides, args.multirun)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
