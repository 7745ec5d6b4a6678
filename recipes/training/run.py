"""Train the plan of a run folder: `python -m recipes.training.run FOLDER`, one process a device.

The job's script starts it, under torchrun or Slurm.  Exit codes: 0 done, or paused with a
checkpoint (status.json says which: a code of its own would make Slurm and torchrun end the ranks
that are still writing), 2 wrong input, 1 otherwise.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.plan import Plan
from recipes.run_folder import PORT_TAKEN, event, only_writer, read_plan, set_status
from recipes.training import rendezvous, stop, watchdog
from recipes.training.deferred import log_without_waiting

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def task(plan: Plan, folder: Path) -> Any:
    """Adapt this process to its device and return the plan's NeMo recipe, built: called, it is
    llm.pretrain.
    """
    if plan.executor.threads:
        torch.set_num_threads(plan.executor.threads)
    from recipes.training import cpu
    from recipes.training.compat import transformer_engine

    transformer_engine.activate(plan)
    cpu.activate()
    if torch.cuda.is_available():
        log_without_waiting()
    import fiddle as fdl

    from recipes.training.compat.loss import set_loss
    from recipes.training.data import check_for_training
    from recipes.training.recipe import build

    check_for_training(plan)
    built = fdl.build(build(plan, folder))
    set_loss(built.keywords["model"])
    return built


def main(folder: Path) -> int:
    """Train; on failure record why in the folder, which one run at a time may write.

    Returns the exit code.
    """
    stop.listen()
    first = os.environ.get("RANK", "0") == "0"
    try:
        rendezvous.bind()
        plan = read_plan(folder)
        with only_writer(folder) if first else nullcontext():
            return _train(plan, folder, first)
    except rendezvous.PortTakenError as error:
        print(f"error: {error}", file=sys.stderr)
        (folder / PORT_TAKEN).touch()
        return 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or folder
        print(
            f"error: {where}: {error.strerror}; make room or mend who may use it, and the same"
            " launch command continues the run",
            file=sys.stderr,
        )
        return EXIT_WRONG_INPUT


def _train(plan: Plan, folder: Path, first: bool) -> int:
    try:
        train = task(plan, folder)
        watchdog.got_further(plan.train.step_timeout_s)
        train()
    except InputError as error:
        found = of_worker(error)
        if first:
            _record_failure(folder, str(found))
        raise found from error
    except BaseException as error:
        if first:
            _record_failure(folder, repr(error))
        raise
    return 0


def of_worker(error: InputError) -> InputError:
    """Return an error without what a process that loads data puts before it: words and a traceback.

    torch/_utils.py, ExceptionWrapper.reraise (2.6).
    """
    name = f"{InputError.__module__}.{InputError.__qualname__}: "
    return InputError(str(error).rpartition(name)[2])


def _record_failure(folder: Path, why: str) -> None:
    with suppress(OSError):  # a full disk must not hide the first error
        event(folder, "failed", reason=why)
    with suppress(OSError):
        set_status(folder, "failed", why)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
