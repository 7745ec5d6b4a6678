"""What a run records of its GPU, on a real one."""

from __future__ import annotations

import time

import pytest
import torch

from recipes.training import devices

pytestmark = pytest.mark.gpu


def test_a_gpu_is_named_and_its_energy_grows_with_work() -> None:
    pytest.importorskip("pynvml")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    gpu = devices.Gpu()
    record = gpu.record(0)
    assert record.uuid and record.driver and record.power_limit_w and record.max_sm_clock_mhz
    sampler = devices.Sampler(gpu)
    sampler.start()
    ended = time.monotonic() + 2
    while time.monotonic() < ended:
        a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize()
    found = sampler.take()
    sampler.stop()
    assert found.energy_j and found.power_w and found.sm_clock_mhz
    assert 0.5 < found.energy_j / (2 * found.power_w) < 2  # joules over two seconds of that power
    assert (
        found.sm_clock_mhz <= record.max_sm_clock_mhz
        and found.power_w <= record.power_limit_w * 1.1
    )


def test_an_answer_takes_the_host_little_time() -> None:
    pytest.importorskip("pynvml")
    torch.zeros(1, device="cuda")
    gpu = devices.Gpu()
    gpu.energy_j()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        gpu.energy_j()
        times.append(time.perf_counter() - started)
    assert sorted(times)[10] < 0.02
