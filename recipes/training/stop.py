"""A request to stop: a file `stop` in the run folder, SIGUSR1 or SIGTERM ask a run to end its step, save and leave.

A job's script makes the file before its time limit; a preemption sends a signal.  NeMo's PreemptionCallback (lightning/pytorch/callbacks/
preemption.py) leaves the process from within the step's callbacks; here training ends as at its last step, so that the
run folder and the checkpoint say the same.  Rank 0's word counts: ranks hear the signal at different steps.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_asked = False


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
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    word = torch.tensor([int(_asked)], device=device)
    dist.broadcast(word, 0)
    return bool(word.item())
