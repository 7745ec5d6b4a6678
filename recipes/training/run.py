"""Train the plan of a run folder: `python -m recipes.training.run FOLDER` (one process a device, torchrun for more)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from recipes.errors import EXIT_WRONG_INPUT, InputError
from recipes.plan import Plan, plan_from_json
from recipes.run_folder import event, set_status


def train(plan: Plan, folder: Path) -> None:
    """Build NeMo's recipe for the plan and run its llm.pretrain in this process."""
    from recipes.training import cpu

    cpu.activate()
    import fiddle as fdl

    from recipes.training.recipe import build

    fdl.build(build(plan, folder))()


def main(folder: Path) -> int:
    """Train; on failure record why in the folder.  Returns the exit code."""
    plan = plan_from_json((folder / "plan.json").read_text())
    if plan.executor.threads:
        torch.set_num_threads(plan.executor.threads)
    try:
        train(plan, folder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
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
