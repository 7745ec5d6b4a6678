"""The GPU that this process trains on, as NVML sees it: identity, limits, other processes, clocks,
power and energy.

NVML is a library of NVIDIA's driver.  Its Python binding is nvidia-ml-py (module pynvml), which
NVIDIA's containers bring.  A question that cannot be asked, or that the driver does not answer,
gives None: no run fails for want of evidence.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from statistics import fmean
from typing import Any

import torch

from recipes.gpu_record import GpuRecord, Others

INTERVAL_S = 0.2  # between two samples: five a second cost the host some 0.1 ms of its time
LOOK_FOR_OTHERS = 25  # samples between two looks at the processes on the GPU
CHOICES = (
    "transformer_engine.pytorch.attention.dot_product_attention",
    "transformer_engine.pytorch.attention",
)
POWER_CAP = 0x4  # nvml.h: nvmlClocksEventReasonSwPowerCap


@dataclass(frozen=True)
class Sampled:
    """What a GPU did since it was asked before: mean SM clock and power over the samples, joules by
    its energy counter; None: unknown.
    """

    sm_clock_mhz: float | None = None
    power_w: float | None = None
    energy_j: float | None = None


class Gpu:
    """The current CUDA device; each answer is None where NVML, its binding or the driver does not
    give it.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        uuid = getattr(properties, "uuid", None)  # since PyTorch 2.4
        self.name: str = properties.name
        self.uuid = None if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"

    @cached_property
    def _nvml(self) -> Any:
        """The binding, initialised; None where there is none, or no driver."""
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
        except Exception:  # not installed, another module of this name, no driver
            return None
        return nvml

    @cached_property
    def _handle(self) -> Any:
        return (
            self._asked("nvmlDeviceGetHandleByUUID", self.uuid)
            if self._nvml and self.uuid
            else None
        )

    def _asked(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*arguments)
        except Exception:  # NVMLError, or a binding older than the function
            return None

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Return NVML's answer about this GPU."""
        return None if self._handle is None else self._asked(function, self._handle, *arguments)

    def _scaled(self, unit: float, function: str, *arguments: Any) -> float | None:
        value = self._ask(function, *arguments)
        return None if value is None else float(value) * unit

    def sm_clock_mhz(self) -> float | None:
        """Return the clock of the multiprocessors."""
        return self._scaled(1, "nvmlDeviceGetClockInfo", getattr(self._nvml, "NVML_CLOCK_SM", None))

    def power_w(self) -> float | None:
        """Return the power that the board draws."""
        return self._scaled(1e-3, "nvmlDeviceGetPowerUsage")

    def energy_j(self) -> float | None:
        """Return the energy that the board has drawn since the driver was loaded."""
        return self._scaled(1e-3, "nvmlDeviceGetTotalEnergyConsumption")

    def power_capped(self) -> bool | None:
        """Return whether the clock is lowered now to keep the power limit."""
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if reasons is None else bool(reasons & POWER_CAP)

    def others(self) -> Others | None:
        """Return the other processes that have a CUDA context on this GPU.

        A container may hide process ids, or translate them: then this process is one of those
        listed.  None where this one, which has a context, is not among any: nothing was told.
        """
        found = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if not found:
            return None
        others = [process for process in found if process.pid != os.getpid()]
        if len(others) == len(found):
            others = sorted(found, key=lambda process: process.usedGpuMemory or 0)[
                :-1
            ]  # the largest is taken for this process
        held = [process.usedGpuMemory for process in others]
        return Others(processes=len(others), memory_gb=None if None in held else sum(held) / 1e9)

    def record(self, rank: int) -> GpuRecord:
        """Return what is known of this GPU as a run begins."""
        driver = self._asked("nvmlSystemGetDriverVersion") if self._nvml else None
        return GpuRecord(
            rank=rank,
            uuid=self.uuid,
            name=self.name,
            driver=driver.decode() if isinstance(driver, bytes) else driver,
            power_limit_w=self._scaled(1e-3, "nvmlDeviceGetEnforcedPowerLimit"),
            max_sm_clock_mhz=self._scaled(
                1, "nvmlDeviceGetMaxClockInfo", getattr(self._nvml, "NVML_CLOCK_SM", None)
            ),
            others_at_start=self.others(),
        )


@dataclass
class Sampler:
    """Looks at a GPU five times a second in a thread of its own, which waits for neither the device
    nor the training loop.
    """

    gpu: Gpu
    most_others: Others | None = None
    _capped: list[bool] = field(default_factory=list)
    _samples: list[tuple[float | None, float | None]] = field(default_factory=list)
    _energy: float | None = None
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin; the thread ends with the process."""
        self._energy = self.gpu.energy_j()
        threading.Thread(target=self._run, name="gpu sampler", daemon=True).start()

    def stop(self) -> None:
        """Take no more samples."""
        self._ended.set()

    def take(self) -> Sampled:
        """Return what was seen since this was called before; energy to the present."""
        samples, self._samples = self._samples, []
        before, self._energy = self._energy, self.gpu.energy_j()
        clocks, powers = ([sample[i] for sample in samples] for i in (0, 1))
        energy = None if before is None or self._energy is None else self._energy - before
        return Sampled(_mean(clocks), _mean(powers), energy)

    @property
    def capped_share(self) -> float | None:
        """The share of all samples in which the power limit held the clock down."""
        return fmean(self._capped) if self._capped else None

    def _run(self) -> None:
        count = 0
        while not self._ended.wait(INTERVAL_S):
            self._samples.append((self.gpu.sm_clock_mhz(), self.gpu.power_w()))
            capped = self.gpu.power_capped()
            self._capped += [] if capped is None else [capped]
            count += 1
            if count % LOOK_FOR_OTHERS == 0:
                self._see(self.gpu.others())

    def _see(self, others: Others | None) -> None:
        if others and (self.most_others is None or others.processes > self.most_others.processes):
            self.most_others = others


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def gathered(value: Any) -> list[Any]:
    """Return the value of each rank, in order; all ranks must call it."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def cudnn() -> dict[str, str]:
    """Return the versions of cuDNN that PyTorch and Transformer Engine have loaded, and the one
    that PyTorch was built with.

    Not by torch.backends.cudnn.version(): where an older cuDNN is loaded than PyTorch was built
    with, that raises.
    """
    found = {}
    with suppress(
        Exception
        # Not built with cuDNN, or a PyTorch that asks otherwise (2.6 to 2.11:
        # torch/backends/cudnn/__init__.py)
    ):
        asked = torch._C._cudnn
        found["torch"] = ".".join(map(str, asked.getRuntimeVersion()))
        found["torch_built_with"] = ".".join(map(str, asked.getCompileVersion()))
    with suppress(Exception):  # not installed, or without the question
        found["transformer_engine"] = _release(
            import_module("transformer_engine_torch").get_cudnn_version()
        )
    return found


def libraries() -> dict[str, str]:
    """Return the versions of the libraries that this process computes and communicates with, as far
    as they answer: CUDA, cuBLASLt, NCCL.
    """
    found = {}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    with suppress(Exception):  # not built with NCCL
        found["nccl"] = ".".join(map(str, import_module("torch.cuda.nccl").version()))
    with suppress(Exception):  # not installed, or without the question
        found["cublaslt"] = str(import_module("transformer_engine_torch").get_cublasLt_version())
    return found


def attention(model: Any) -> str | None:
    """Return what computes a model's attention: the class of its layers, and the backend that
    Transformer Engine chose in training.

    Its choice stands in a module of its own (2.2: pytorch/attention.py:156; from 2.5 on
    pytorch/attention/dot_product_attention), as the last attention that was called left it.  None
    where a model has no such layer.
    """
    layers = sorted(
        {
            type(layer).__name__
            for module in model.modules()
            if (layer := getattr(module, "core_attention", None)) is not None
        }
    )
    backend = next(
        (
            chosen
            for name in CHOICES
            if (chosen := _backend(getattr(sys.modules.get(name), "_attention_backends", None)))
        ),
        None,
    )
    return ", ".join([*layers, *([backend] if backend else [])]) if layers else None


def _backend(chosen: Any) -> str | None:
    """Return the name of the attention backend in Transformer Engine's record of its choice; None
    where it has made none.
    """
    if not isinstance(chosen, dict):
        return None
    if chosen.get("use_flash_attention"):
        return f"flash-attn {chosen.get('flash_attention_backend') or ''}".strip()
    if chosen.get("use_fused_attention"):
        which = chosen.get("fused_attention_backend")
        return f"cuDNN fused ({getattr(which, 'name', which)})"
    return "unfused" if chosen.get("use_unfused_attention") else None


def _release(number: int) -> str:
    """Return cudnnGetVersion's number as major.minor.patch: 91900 is 9.19.0, 8907 is 8.9.7
    (cudnn_version.h).
    """
    thousands = 10_000 if number >= 90_000 else 1_000
    return f"{number // thousands}.{number % thousands // 100}.{number % 100}"
