"""What a GPU and its links can do at best: the peaks that every term of a prediction is divided
by.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipes.errors import InputError
from recipes.plan import Gpu

PEAKS = (
    "bf16_dense_tflops",
    "fp8_dense_tflops",
    "hbm_tb_s",
    "nvlink_gb_s",
    "nic_gbit_s",
    "tdp_w",
)  # fields of plan.Gpu
ULTRA = "10.3"  # compute capability, https://developer.nvidia.com/cuda-gpus
MEASURED = (
    700 / 989e12
    # Watts a dense BF16 FLOP/s of the GPU on which GEMMs were measured, at its power limit (H200,
    # as the H100)
)


@dataclass(frozen=True)
class Hardware:
    """FLOP/s of BF16 and FP8 (dense), bytes/s of memory, of NVLink and of the network a GPU (both
    one way), GPUs a NVLink domain.

    `power`: watts that the GPU may take for each FLOP/s of its peak, over those of the GPU on which
    GEMMs were measured. `ultra`: whether it is a Blackwell Ultra (B300, GB300), whose exponentials
    run twice as fast.
    """

    name: str
    bf16: float
    fp8: float
    memory: float
    nvlink: float
    network: float
    domain: int
    blackwell: bool
    power: float
    ultra: bool = False


def generation(gpu: Gpu) -> str:
    """Return "hopper" or "blackwell" by compute capability; "unknown" for any other."""
    major = int((gpu.compute_capability or "0").split(".")[0])
    return {9: "hopper", 10: "blackwell"}.get(major, "unknown")


def hardware(gpu: Gpu) -> Hardware:
    """Return the peaks of a plan's GPU; InputError where they are not known."""
    if gpu.compute_capability is None:
        raise InputError(
            f"gpu={gpu.name} emulates FP8, its steps say nothing about a GPU; choose a GPU, e.g."
            " gpu=h100"
        )
    peaks = [getattr(gpu, name) for name in PEAKS]
    if None in peaks:
        missing = ", ".join(name for name, peak in zip(PEAKS, peaks, strict=True) if peak is None)
        raise InputError(
            f"gpu={gpu.name} has no {missing} to predict from; add them to"
            f" conf/gpu/{gpu.name}.yaml, or choose another GPU"
        )
    bf16, fp8, hbm, nvlink, nic, watts = map(float, peaks)
    domain = gpu.nvlink_domain or gpu.devices_per_node
    return Hardware(
        name=gpu.name,
        bf16=bf16 * 1e12,
        fp8=fp8 * 1e12,
        memory=hbm * 1e12,
        nvlink=nvlink * 1e9 / 2,
        network=nic * 1e9 / 8,
        domain=domain,
        blackwell=generation(gpu) == "blackwell",
        power=watts / (bf16 * 1e12) / MEASURED,
        ultra=gpu.compute_capability == ULTRA,
    )


def ring_bandwidth(hw: Hardware, ranks: int, stride: int) -> float:
    """Return bytes/s at which a ring over `ranks` GPUs moves data, a GPU; neighbours are `stride`
    GPUs apart.

    Inside an NVLink domain that is NVLink.  Across domains the ring leaves each domain once, and
    NCCL spreads it over the network adapters of all the group's GPUs there.
    """
    if ranks * stride <= hw.domain:
        return hw.nvlink
    return min(hw.nvlink, hw.network * max(1, hw.domain // stride))


def domains(hw: Hardware, ranks: int, stride: int) -> int:
    """Return the NVLink domains that a group of GPUs spans."""
    return -(-ranks * stride // hw.domain)
