"""The manifest: what ran, as seen inside the job, so that a number can be traced to what made it.

Versions are those that this process imported from, not those that a plan hoped for.  Of the
environment only what changes a run's numbers or speed is kept, by name
(recipes/manifest_record.py); nothing that could be a secret is.
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

from recipes.code import code, sources_sha256
from recipes.compose.secrets import SECRET_NAME, has_secret
from recipes.gpu_record import UNKNOWN, GpuRecord, Others
from recipes.manifest_record import ENVIRONMENT, Session, is_looked_at
from recipes.plan import Plan
from recipes.run_folder import read_json, write_json
from recipes.training import data, devices

PACKAGES = (
    *(
        "nemo-toolkit",
        "megatron-core",
        "transformer-engine",
        "torch",
        "lightning",
        "nemo-run",
        "numpy",
        "hydra-core",
        "wandb",
    ),
    *(
        "flash-attn",
        "flash-attn-3",
        "triton",
        "pytorch-triton",
        "apex",
        "transformers",
        "tokenizers",
        "sentencepiece",
    ),
)


def manifest(
    plan: Plan, folder: Path, gpus: Sequence[GpuRecord] = (), resumed: bool = False
) -> dict[str, Any]:
    """Return the manifest of a run whose data set has been built; `gpus` has one record a rank,
    none on a CPU.

    A run that goes on (`resumed`) keeps the UUIDs of the GPUs that it was on before, and what it
    computed with.
    """
    looked_at = (*ENVIRONMENT, *plan.cluster.environment)
    return {
        "code": {**code(), "sha256": sources_sha256()},
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            **devices.libraries(),
        },
        "device": device(),
        "num_gpus": plan.num_gpus,
        "environment": environment(looked_at),
        "environment_looked_at": list(looked_at),
        "data": {
            **data.facts(plan.data, plan.model.vocab_size),
            **data.fingerprints(plan.data, plan.model.vocab_size),
        },
        "order_sha256": order_sha256(folder / "index"),
        "labels": {"loss": "emulated" if plan.emulated else "measured", "step_time": "measured"},
        **({"before": sessions(folder)} if resumed else {}),
        **(_gpu_facts(gpus, folder, resumed) if gpus else {}),
    }


def environment(patterns: Sequence[str]) -> dict[str, str]:
    """Return the variables of this process that patterns name, without any that looks like a
    secret.
    """
    found = {
        name: value for name, value in sorted(os.environ.items()) if is_looked_at(name, patterns)
    }
    return {
        name: value
        for name, value in found.items()
        if not SECRET_NAME.search(name) and not has_secret(value)
    }


def sessions(folder: Path) -> list[dict[str, Any]]:
    """Return what the sessions that the manifest in `folder` names computed with, each once; {} for
    one that nothing names.
    """
    try:
        found = read_json(folder / "manifest.json")
    except (OSError, ValueError):
        found = {}
    last = {key: value for key, value in found.items() if key in Session.model_fields}
    earlier = found.get("before")
    several = list[dict[str, Any]]()
    for session in (*(earlier if isinstance(earlier, list) else []), last):
        several += [] if session in several else [session]
    return several


def _gpu_facts(gpus: Sequence[GpuRecord], folder: Path, resumed: bool) -> dict[str, Any]:
    facts = {"gpus": [gpu.model_dump() for gpu in gpus], "cudnn": devices.cudnn()}
    return {**facts, "gpus_before": _gpus_of(folder)} if resumed else facts


def _gpus_of(folder: Path) -> list[str]:
    """Return the UUIDs of the GPUs that the manifest in `folder` names; one that it does not name
    is UNKNOWN.
    """
    try:
        found = read_json(folder / "manifest.json")
        named = [*found.get("gpus_before", []), *(gpu["uuid"] for gpu in found["gpus"])]
    except (OSError, ValueError, TypeError, KeyError):
        named = [None]
    return sorted({uuid if isinstance(uuid, str) else UNKNOWN for uuid in named})


def complete(folder: Path, **facts: Any) -> None:
    """Add to the manifest what is known since training began."""
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), **facts})


def complete_gpus(
    folder: Path, at_end: Sequence[Others | None], during: Others | None, capped: float | None
) -> None:
    """Add to the manifest what other processes ran on each rank's GPU at the end, and what was seen
    on rank 0's while it trained.
    """
    found = read_json(folder / "manifest.json")
    for gpu, others in zip(found["gpus"], at_end, strict=True):
        gpu["others_at_end"] = others and others.model_dump()
    found["gpus"][0] |= {
        "others_during": during and during.model_dump(),
        "power_capped_share": capped,
    }
    write_json(folder / "manifest.json", found)


def device() -> str:
    """Return the name of the device that trains."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads a process"
    )


def order_sha256(index: Path) -> str | None:
    """Return the hash of the training set's index files, which decide the order of the batches;
    None without any.

    Megatron-Core (datasets/gpt_dataset.py) writes document, sample and shuffle index; their names
    hold a hash of paths.
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
