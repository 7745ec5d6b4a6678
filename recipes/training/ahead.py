"""Steps that are launched while the device still works on the one before.

A GPU works off what the host has launched.  Where the host waits for it between two steps, it then stands idle until the next step's
first kernels come; the faster the kernels, that is, in FP8, the longer, for the host may need as long for a forward pass as the GPU.
Megatron-Core's optimizer asks for the gradients' norm and so waits once a step, with its own update still to be launched; that is enough
to keep both together.  What else waited between NeMo's steps is taken out here: Lightning 2.4 copies each number that is logged to the
device and back, and a run folder needs a step's loss and times.  Both are read a step later, when they have long been there.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor


class Moment:
    """A point in the device's work (on a CPU, in time)."""

    def __init__(self) -> None:
        self.time = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if self.event:
            self.event.record()

    def wait(self) -> None:
        """Wait until the device has come here."""
        if self.event:
            self.event.synchronize()

    def until(self, later: Moment) -> float:
        """Wait for both and return the seconds between them."""
        if self.event is None or later.event is None:
            return later.time - self.time
        later.wait()
        return float(self.event.elapsed_time(later.event)) / 1e3


class Number:
    """A number of the device (one element, any shape), on its way to the host; NaN for None."""

    def __init__(self, value: Tensor | float | None) -> None:
        self.value, self.there = value, None
        if isinstance(value, Tensor) and value.is_cuda:
            self.value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
            self.there = Moment()

    def read(self) -> float:
        """Wait for it and return it."""
        if self.there:
            self.there.wait()
        return math.nan if self.value is None else float(self.value)


def log_without_waiting() -> None:
    """Have Lightning 2.4 log without waiting for the device.

    core/module.py:652 copies numbers to the device and waits for the copy: filled in there instead.  NeMo logs its loss for the
    progress bar, and connectors/logger_connector/result.py:490 asks the device for that at each look at any metric, bar or none: here
    there is none.
    """
    from lightning.pytorch import LightningModule
    from lightning.pytorch.trainer.connectors.logger_connector import result

    LightningModule._LightningModule__to_tensor = _to_tensor
    result.convert_tensors_to_scalars = lambda value: value


def _to_tensor(module: Any, value: Tensor | float, name: str) -> Tensor:
    """Return a logged value as a scalar on the module's device."""
    scalar = value.clone().detach() if isinstance(value, Tensor) else torch.full((), value, device=module.device, dtype=torch.get_default_dtype())
    if scalar.numel() != 1:
        raise ValueError(f"{name} is logged with {scalar.numel()} elements; log one, its mean for example")
    return scalar.squeeze()
