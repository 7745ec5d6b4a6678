"""Steps that are launched while the device still works on the one before.

A GPU works off what the host has launched.  Where the host waits for it between two steps, the GPU
stands idle until the next step's first kernels come; the shorter the kernels, that is, in FP8, the
longer, for the host may need as much time for a forward pass as the GPU. Megatron-Core itself waits
in each step, for the gradients' norm and while it looks for NaN in them, but then its update is
still to be launched, and the host gets ahead by that.  What waited between the steps besides is
taken out here: Lightning 2.4 copies a logged Python number to the device and waits, and asks the
device for each number that is meant for a progress bar; a run folder needs a step's loss and times.
Both are read a step later, when they have long been there.  What still waits: a diagnosed step, an
evaluation, a checkpoint, and with W&B or TensorBoard each tenth step, in which they get NeMo's own
numbers.
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
        if isinstance(value, Tensor):  # copied in any case: what it is now counts
            self.value = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(
                value.detach(), non_blocking=True
            )
            self.there = Moment() if value.is_cuda else None

    def read(self) -> float:
        """Wait for it and return it."""
        if self.there:
            self.there.wait()
        return math.nan if self.value is None else float(self.value)


def log_without_waiting() -> None:
    """Have Lightning 2.4 log without waiting for the device; AttributeError where another version
    has what is replaced elsewhere.

    core/module.py:652 copies numbers to the device and waits for the copy: filled in there instead.
    NeMo logs its loss for the progress bar, and connectors/logger_connector/result.py:490 asks the
    device for that at each look at any metric, bar or none: here there is none.
    """
    from lightning.pytorch import LightningModule
    from lightning.pytorch.trainer.connectors.logger_connector import result

    for holder, name, without in (
        (LightningModule, "_LightningModule__to_tensor", _to_tensor),
        (result, "convert_tensors_to_scalars", _same),
    ):
        getattr(holder, name)
        setattr(holder, name, without)


def _same(value: Any) -> Any:
    return value


def _to_tensor(module: Any, value: Tensor | float, name: str) -> Tensor:
    """Return a logged value as a scalar on the module's device, of FP32 or wider where it was a
    number.
    """
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    scalar = (
        value.clone().detach()
        if isinstance(value, Tensor)
        else torch.full((), value, device=module.device, dtype=dtype)
    )
    if scalar.numel() != 1:
        raise ValueError(
            f"{name} is logged with {scalar.numel()} elements; log one, its mean for example"
        )
    return scalar.squeeze()
