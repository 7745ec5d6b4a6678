"""A rank that gets no further ends itself, and with it the job: a hung collective or a dead file
system would hold the GPUs until the time limit.

`got_further` is called when training is about to begin, at every step, at every batch of an
evaluation and before the last checkpoint. Where it is not called again in time, the stacks of all
threads go to the log, which says where the rank hung, and the process ends with code 1; torchrun
and srun (--kill-on-bad-exit) end the others.  A thread of C does it, which needs no lock that a
hung rank may hold.
"""

from __future__ import annotations

import faulthandler
import sys


def got_further(seconds: int) -> None:
    """Set the time, from now, by which this is to be called again."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def at_end() -> None:
    """Take the time limit back."""
    faulthandler.cancel_dump_traceback_later()
