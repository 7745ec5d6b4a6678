"""Train the plan of a run folder: `python -m recipes.training.run FOLDER`, one process a device.

The job's script starts it, under torchrun or Slurm.  Exit codes: 0 done, or paused with a checkpoint (status.json says
which: a code of its own would make Slurm and torchrun end the ranks that are still writing), 2 wrong input, 1 otherwise.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.plan import Plan
from recipes.run_folder import event, read_plan, set_status
from recipes.training import stop


def task(plan: Plan, folder: Path) -> Any:
    """Adapt this process to its device and return the plan's NeMo recipe, built: called, it is llm.pretrain."""
    if plan.executor.threads:
        torch.set_num_threads(plan.executor.threads)
    from recipes.training import cpu, te

    te.activate(plan)
    cpu.activate()
    import fiddle as fdl

    from recipes.training.loss import set_loss
    from recipes.training.recipe import build

    built = fdl.build(build(plan, folder))
    set_loss(built.keywords["model"])
    return built


def main(folder: Path) -> int:
    """Train; on failure record why in the folder.  Returns the exit code."""
    stop.listen()
    plan = read_plan(folder)
    try:
        task(plan, folder)()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        if os.environ.get("RANK", "0") == "0":
            set_status(folder, "failed", str(error))
        return EXIT_WRONG_INPUT
    except BaseException as error:
        if os.environ.get("RANK", "0") == "0":
            event(folder, "failed", reason=repr(error))
            set_status(folder, "failed", repr(error))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
