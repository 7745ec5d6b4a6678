"""A request to stop: a file `stop` in the run folder, SIGUSR1 or SIGTERM ask a run to end its step,
save and leave.

A job's script makes the file before its time limit; a preemption sends a signal.  NeMo's
PreemptionCallback (lightning/pytorch/callbacks/ preemption.py) leaves the process from within the
step's callbacks; here training ends as at its last step, so that the run folder and the checkpoint
say the same.  Rank 0's word counts: ranks hear the signal at different steps.  On GPUs it is heard
by all a step after it was said, so that no rank waits for its GPU to hear it
(recipes/training/deferred.py).
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from recipes.training.deferred import Number

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_asked = False
_said: Number | None = None


def listen() -> None:
    """Take the signals; again after Lightning has set its own handlers."""
    for number in SIGNALS:
        signal.signal(number, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True


def _ask_if_there(file: Path) -> None:
    global _asked
    _asked = _asked or file.exists()


def asked() -> bool:
    """Return whether this process was asked to stop."""
    return _asked


def asked_on_rank_0(folder: Path) -> bool:
    """Return whether rank 0 was asked to stop; every rank calls this in every step."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        _ask_if_there(folder / "stop")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return _asked
    if torch.cuda.is_available():
        return _said_before(torch.device("cuda", torch.cuda.current_device()))
    word = torch.tensor([int(_asked)])
    dist.broadcast(word, 0)
    return bool(word.item())


def _said_before(device: torch.device) -> bool:
    """Send rank 0's word on its way to all ranks, and return that of the step before."""
    global _said
    word = torch.full((1,), float(_asked), device=device)
    dist.broadcast(word, 0)
    before, _said = _said, Number(word)
    return before is not None and bool(before.read())
