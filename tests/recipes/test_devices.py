"""What a run records of its GPU, on a stand-in for NVIDIA's NVML; tests/gpu/test_devices.py asks a
real one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.compose.tree import compose_plan
from recipes.gpu_record import UNKNOWN, GpuRecord, Others
from recipes.manifest_record import Manifest, is_looked_at
from recipes.run_folder import flatten, read_json
from recipes.training import devices
from recipes.training.manifest import PACKAGES, complete, complete_gpus, manifest

UUID = "12345678-aaaa-bbbb-cccc-1234567890ab"
PLAN = compose_plan(["model=llama3_tiny", "gpu=h200", "data=mock", "mapping=single", "num_gpus=1"])


class Nvml(SimpleNamespace):
    """A GPU that draws 500 W at 1,500 MHz, capped by power; `processes` are those on it, as process
    id and bytes.
    """

    NVML_CLOCK_SM = 1

    def __init__(
        self, processes: list[tuple[int, int | None]], refused: tuple[str, ...] = ()
    ) -> None:
        self.processes, self.refused, self.joules = processes, refused, 1000.0

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "__dict__").get("refused", ()):
            raise RuntimeError("NVMLError_NotSupported")
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == f"GPU-{UUID}"
        return uuid

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.159.04"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 500_000

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return 1500

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return 0x4

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.joules += 100
        return int(self.joules * 1000)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(name="NVIDIA H200", uuid=UUID),
    )


def seen(
    monkeypatch: pytest.MonkeyPatch,
    *processes: tuple[int, int | None],
    refused: tuple[str, ...] = (),
) -> devices.Gpu:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(list(processes), refused))
    return devices.Gpu()


MINE = (os.getpid(), 120_000_000_000)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_record_names_the_gpu_its_limits_and_who_else_is_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = seen(monkeypatch, MINE, (1, 3_000_000_000)).record(rank=0)
    expected = {
        "name": "NVIDIA H200",
        "driver": "580.159.04",
        "power_limit_w": 700.0,
        "max_sm_clock_mhz": 1980.0,
    }
    others = Others(processes=1, memory_gb=3.0)
    assert (
        found == GpuRecord(rank=0, uuid=f"GPU-{UUID}", others_at_start=others, **expected)
        and found.shared
    )
    assert GpuRecord.model_validate(json.loads(found.model_dump_json())) == found


@pytest.mark.parametrize(
    ("processes", "others"),
    [
        ((MINE,), Others(processes=0, memory_gb=0)),
        (
            ((1, 120_000_000_000),),
            Others(processes=0, memory_gb=0),
        ),  # a container translates process ids: it is this one
        (((1, 120_000_000_000), (2, 5_000_000_000)), Others(processes=1, memory_gb=5)),
        ((MINE, (2, None)), Others(processes=1)),  # what it holds is hidden
        ((), None),  # a container hides processes
    ],
)
@pytest.mark.usefixtures("on_a_gpu")
def test_this_process_is_no_other(
    processes: tuple[Any, ...], others: Others | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seen(monkeypatch, *processes).others() == others


@pytest.mark.usefixtures("on_a_gpu")
def test_what_cannot_be_asked_is_absent_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    partly = seen(
        monkeypatch,
        MINE,
        refused=("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetEnforcedPowerLimit"),
    )
    assert (
        partly.energy_j() is None
        and partly.power_w() == 500
        and partly.record(0).power_limit_w is None
    )
    for broken in (
        None,
        SimpleNamespace(),
        Nvml([MINE], refused=("nvmlInit",)),
    ):  # not installed, another module, no driver
        monkeypatch.setitem(sys.modules, "pynvml", broken)
        gpu = devices.Gpu()
        assert gpu.record(3) == GpuRecord(rank=3, uuid=f"GPU-{UUID}", name="NVIDIA H200")
        sampler = devices.Sampler(gpu)
        assert sampler.take() == devices.Sampled() and sampler.capped_share is None
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="NVIDIA H100")
    )  # an older PyTorch
    assert seen(monkeypatch, MINE).record(0).uuid is None


@pytest.mark.usefixtures("on_a_gpu")
def test_samples_are_means_since_the_last_time_and_energy_is_a_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "INTERVAL_S", 0.001)
    monkeypatch.setattr(devices, "LOOK_FOR_OTHERS", 1)
    sampler = devices.Sampler(seen(monkeypatch, MINE, (1, 1_000_000_000)))
    sampler.start()
    deadline = time.monotonic() + 60
    while sampler.most_others is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sampler.take() == devices.Sampled(sm_clock_mhz=1500, power_w=500, energy_j=100)
    sampler.stop()
    assert sampler.most_others == Others(processes=1, memory_gb=1) and sampler.capped_share == 1


def write(folder: Path, gpus: list[GpuRecord], resumed: bool = False) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest(PLAN, folder, gpus, resumed)))


def test_a_manifest_is_completed_at_the_end_and_keeps_earlier_gpus(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert not {"gpus", "cudnn", "gpus_before"} & set(
        read_json(tmp_path / "manifest.json")
    )  # a CPU's is what it was
    write(tmp_path, [GpuRecord(rank=0, uuid="GPU-1")], resumed=True)
    assert read_json(tmp_path / "manifest.json")["gpus_before"] == [UNKNOWN]
    write(tmp_path, [GpuRecord(rank=0, uuid="GPU-1")])
    write(tmp_path, [GpuRecord(rank=rank, uuid=f"GPU-{rank + 2}") for rank in (0, 1)], resumed=True)
    complete_gpus(tmp_path, [Others(processes=0), None], Others(processes=2, memory_gb=7.0), 0.9)
    found = read_json(tmp_path / "manifest.json")
    first, second = (GpuRecord.model_validate(gpu) for gpu in found["gpus"])
    assert found["gpus_before"] == ["GPU-1"] and isinstance(found["cudnn"], dict)
    assert (first.others_at_end, first.others_during, first.power_capped_share) == (
        Others(processes=0),
        Others(processes=2, memory_gb=7),
        0.9,
    )
    assert first.shared is True and second.shared is None and second.uuid == "GPU-3"


def test_a_manifest_names_what_chooses_kernels_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {
        "NVTE_FUSED_ATTN": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTORCH_CUDA_ALLOC_CONF": "a",
        "TORCH_BLAS_PREFER_CUBLASLT": "1",
    }
    for name, value in {
        **chosen,
        "MINE": "b",
        "TORCH_HUB_TOKEN": "c" * 20,
        "NCCL_NET": "hf_" + "d" * 30,
    }.items():
        monkeypatch.setenv(name, value)
    plan = compose_plan(
        [
            "model=llama3_tiny",
            "gpu=h200",
            "data=mock",
            "mapping=single",
            "num_gpus=1",
            "+cluster.environment.MINE=b",
        ]
    )
    found = Manifest.model_validate(manifest(plan, tmp_path))
    assert found.environment and {**chosen, "MINE": "b"}.items() <= found.environment.items()
    assert not {"TORCH_HUB_TOKEN", "NCCL_NET"} & found.environment.keys()
    assert is_looked_at("CUBLASLT_LOG", found.environment_looked_at) and not is_looked_at(
        "EDITOR", found.environment_looked_at
    )
    assert found.versions and found.versions["torch"] and set(PACKAGES) <= found.versions.keys()
    assert found.code and found.code.sha256


def test_a_run_that_goes_on_keeps_what_it_computed_with_before(tmp_path: Path) -> None:
    write(tmp_path, [])
    complete(tmp_path, attention="a backend")
    first = read_json(tmp_path / "manifest.json")
    for _ in range(3):
        write(tmp_path, [], resumed=True)
    before, again = read_json(tmp_path / "manifest.json")["before"]
    assert (
        before == {key: first[key] for key in before}
        and before["attention"] == "a backend"
        and "attention" not in again
    )
    (tmp_path / "manifest.json").unlink()
    write(tmp_path, [], resumed=True)
    assert read_json(tmp_path / "manifest.json")["before"] == [{}]


def test_a_manifest_holds_fields_of_its_record_alone(tmp_path: Path) -> None:
    """What analysis/runs/effects.py declares are the fields of the record."""
    write(tmp_path, [GpuRecord(rank=0)], resumed=True)
    complete(tmp_path, attention="a backend")
    written = read_json(tmp_path / "manifest.json")
    assert flatten(Manifest.model_validate(written).model_dump(exclude_unset=True)) == flatten(
        written
    )


class Attention(torch.nn.Module):
    """A layer of a model, as Megatron-Core's SelfAttention holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.core_attention = torch.nn.Identity()


@pytest.mark.parametrize("place", devices.CHOICES)
def test_the_attention_backend_is_the_one_that_transformer_engine_chose(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices: list[tuple[dict[str, Any], str]] = [
        ({}, "Identity"),
        (
            {"use_flash_attention": True, "flash_attention_backend": "2.7.3"},
            "Identity, flash-attn 2.7.3",
        ),
        (
            {"use_fused_attention": True, "fused_attention_backend": SimpleNamespace(name="F16")},
            "Identity, cuDNN fused (F16)",
        ),
        ({"use_flash_attention": False, "use_unfused_attention": True}, "Identity, unfused"),
    ]
    for chosen, name in choices:
        monkeypatch.setitem(sys.modules, place, SimpleNamespace(_attention_backends=chosen))
        assert devices.attention(torch.nn.Sequential(Attention(), Attention())) == name
    assert devices.attention(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize(
    ("number", "release"), [(91400, "9.14.0"), (90502, "9.5.2"), (8907, "8.9.7")]
)
def test_both_versions_of_cudnn_are_read_where_pytorch_itself_refuses_to_tell(
    number: int, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise RuntimeError(
            "cuDNN version incompatibility: PyTorch was compiled  against (9, 19, 0) but found"
            " runtime version (9, 14, 0)"
        )

    monkeypatch.setattr(torch.backends.cudnn, "version", refuse)
    asked = SimpleNamespace(
        getRuntimeVersion=lambda: (9, 14, 0), getCompileVersion=lambda: (9, 19, 0)
    )
    monkeypatch.setattr(torch._C, "_cudnn", asked, raising=False)
    monkeypatch.setitem(
        sys.modules, "transformer_engine_torch", SimpleNamespace(get_cudnn_version=lambda: number)
    )
    assert devices.cudnn() == {
        "torch": "9.14.0",
        "torch_built_with": "9.19.0",
        "transformer_engine": release,
    }
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", None)
    monkeypatch.setattr(torch._C, "_cudnn", SimpleNamespace(getRuntimeVersion=refuse))
    assert devices.cudnn() == {}
