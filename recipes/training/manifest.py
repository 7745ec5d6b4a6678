"""The manifest: what ran, as seen inside the job, so that a number can be traced to what made it.

Versions are those that this process imported from, not those that a plan hoped for.  Of the environment only what
changes a run's numbers or speed is kept, by name; nothing that could be a secret is.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from recipes.code import code
from recipes.gpu_record import UNKNOWN, GpuRecord, Others
from recipes.plan import Plan
from recipes.run_folder import read_json, write_json
from recipes.training import data, devices

PACKAGES = ("nemo-toolkit", "megatron-core", "transformer-engine", "torch", "lightning", "nemo-run", "numpy", "hydra-core", "wandb")
ENVIRONMENT = ("NCCL_", "NVTE_", "CUDA_", "TORCH_NCCL_", "OMP_", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_RESTART_COUNT")


def manifest(plan: Plan, folder: Path, gpus: Sequence[GpuRecord] = (), resumed: bool = False) -> dict[str, Any]:
    """Return the manifest of a run whose data set has been built; `gpus` has one record a rank, none on a CPU.

    A run that goes on (`resumed`) keeps the UUIDs of the GPUs that it was on before.
    """
    return {
        "code": code(),
        "versions": {"python": platform.python_version(), **{name: v for name in PACKAGES if (v := _version(name))}},
        "device": device(),
        "num_gpus": plan.num_gpus,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)},
        "data": data.facts(plan.data, plan.model.vocab_size),
        "order_sha256": order_sha256(folder / "index"),
        "labels": {"loss": "emulated" if plan.emulated else "measured", "step_time": "measured"},
        **(_gpu_facts(gpus, folder, resumed) if gpus else {}),
    }


def _gpu_facts(gpus: Sequence[GpuRecord], folder: Path, resumed: bool) -> dict[str, Any]:
    facts = {"gpus": [gpu.model_dump() for gpu in gpus], "cudnn": devices.cudnn()}
    return {**facts, "gpus_before": _gpus_of(folder)} if resumed else facts


def _gpus_of(folder: Path) -> list[str]:
    """Return the UUIDs of the GPUs that the manifest in `folder` names; one that it does not name is UNKNOWN."""
    try:
        found = read_json(folder / "manifest.json")
        named = [*found.get("gpus_before", []), *(gpu["uuid"] for gpu in found["gpus"])]
    except (OSError, ValueError, TypeError, KeyError):
        named = [None]
    return sorted({uuid if isinstance(uuid, str) else UNKNOWN for uuid in named})


def complete_gpus(folder: Path, at_end: Sequence[Others | None], during: Others | None, capped: float | None) -> None:
    """Add to the manifest what other processes ran on each rank's GPU at the end, and what was seen on rank 0's while it trained."""
    found = read_json(folder / "manifest.json")
    for gpu, others in zip(found["gpus"], at_end, strict=True):
        gpu["others_at_end"] = others and others.model_dump()
    found["gpus"][0] |= {"others_during": during and during.model_dump(), "power_capped_share": capped}
    write_json(folder / "manifest.json", found)


def device() -> str:
    """Return the name of the device that trains."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads a process"


def order_sha256(index: Path) -> str | None:
    """Return the hash of the training set's index files, which decide the order of the batches; None without any.

    Megatron-Core (datasets/gpt_dataset.py) writes document, sample and shuffle index; their names hold a hash of paths.
    """
    files = sorted(index.glob("*-train-*.npy"), key=lambda p: p.name.split("-", 1)[1])
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
