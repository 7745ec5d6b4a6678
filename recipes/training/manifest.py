"""The manifest: what ran, as seen inside the job, so that a number can be traced to what made it.

Versions are those that this process imported from, not those that a plan hoped for.  Of the environment only what
changes a run's numbers or speed is kept, by name; nothing that could be a secret is.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from recipes.plan import Plan
from recipes.training import data

PACKAGES = ("nemo-toolkit", "megatron-core", "transformer-engine", "torch", "lightning", "nemo-run", "numpy", "hydra-core", "wandb")
ENVIRONMENT = ("NCCL_", "NVTE_", "CUDA_", "TORCH_NCCL_", "OMP_", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_RESTART_COUNT")
PROJECT = Path(__file__).resolve().parents[2]


def manifest(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return the manifest of a run whose data set has been built."""
    return {
        "code": code(),
        "versions": {"python": platform.python_version(), **{name: v for name in PACKAGES if (v := _version(name))}},
        "device": device(),
        "num_gpus": plan.num_gpus,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)},
        "data": data.facts(plan.data, plan.model.vocab_size),
        "order_sha256": order_sha256(folder / "index"),
        "labels": {"loss": "emulated" if plan.emulated else "measured", "step_time": "measured"},
    }


def code() -> dict[str, Any]:
    """Return the commit that this code is at and whether files differ from it; None outside a git checkout.

    A job runs a copy of the code, in which `code.json` holds what was known when it was made.
    """
    if (PROJECT / "code.json").exists():
        return dict(json.loads((PROJECT / "code.json").read_text()))
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


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


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PROJECT), *args], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
