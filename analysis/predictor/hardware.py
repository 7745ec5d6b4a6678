"""What a GPU and its links can do at best: the peaks that every term of a prediction is divided by."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import InputError
from recipes.plan import Gpu

PEAKS = Path(__file__).resolve().parent.parent / "reference" / "gpu_peaks.csv"


@dataclass(frozen=True)
class Hardware:
    """FLOP/s of BF16 and FP8 (dense), bytes/s of memory, of NVLink and of the network a GPU (both one way), GPUs a NVLink domain."""

    name: str
    bf16: float
    fp8: float
    memory: float
    nvlink: float
    network: float
    domain: int
    blackwell: bool


def generation(gpu: Gpu) -> str:
    """Return "hopper" or "blackwell" by compute capability; "unknown" for any other."""
    major = int((gpu.compute_capability or "0").split(".")[0])
    return {9: "hopper", 10: "blackwell"}.get(major, "unknown")


@functools.cache
def _links() -> dict[str, dict[str, str]]:
    with PEAKS.open(newline="") as file:
        return {row["gpu"]: row for row in csv.DictReader(file)}


@functools.cache
def hardware(gpu: Gpu) -> Hardware:
    """Return the peaks of a plan's GPU; InputError where they are not known."""
    links = _links().get(gpu.name) or _links().get(gpu.mapped_like or "")
    if gpu.compute_capability is None:
        raise InputError(f"gpu={gpu.name} emulates FP8, its steps say nothing about a GPU; choose a GPU, e.g. gpu=h100")
    if links is None or gpu.bf16_dense_tflops is None or gpu.fp8_dense_tflops is None:
        raise InputError(f"gpu={gpu.name} has no peaks to predict from; add them to conf/gpu/{gpu.name}.yaml and analysis/reference/{PEAKS.name}")
    return Hardware(
        gpu.name,
        gpu.bf16_dense_tflops * 1e12,
        gpu.fp8_dense_tflops * 1e12,
        float(links["hbm_tb_s"]) * 1e12,
        float(links["nvlink_gb_s"]) * 1e9 / 2,
        float(links["nic_gbit_s"]) * 1e9 / 8,
        gpu.nvlink_domain or gpu.devices_per_node,
        generation(gpu) == "blackwell",
    )


def ring_bandwidth(hw: Hardware, ranks: int, stride: int) -> float:
    """Return bytes/s at which a ring over `ranks` GPUs moves data, a GPU; neighbours are `stride` GPUs apart.

    Inside an NVLink domain that is NVLink.  Across domains the ring leaves each domain once, and NCCL spreads it over the network
    adapters of all the group's GPUs there.
    """
    if ranks * stride <= hw.domain:
        return hw.nvlink
    return min(hw.nvlink, hw.network * max(1, hw.domain // stride))


def domains(hw: Hardware, ranks: int, stride: int) -> int:
    """Return the NVLink domains that a group of GPUs spans."""
    return -(-ranks * stride // hw.domain)
