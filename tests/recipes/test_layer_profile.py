"""A layer's kernels out of made-up traces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import InputError
from recipes.measure.gpu.layer_profile import kernels_of_a_layer

NORM = "void transformer_engine::normalization::{}_tuned_kernel<int>(int)"
FORWARD = [
    NORM.format("rmsnorm_fwd"),
    "nvjet_a",
    "cudnn_sdpa_fprop",
    NORM.format("rmsnorm_fwd"),
    "nvjet_b",
    "triton_silu",
]
BACKWARD = [
    NORM.format("rmsnorm_bwd"),
    "rmsnorm_bwd_finalize_tuned_kernel",
    "nvjet_c",
    NORM.format("rmsnorm_bwd"),
    "void te::(anonymous namespace)::amax_kernel<1>(int)",
    "Memset (Device)",
]


def launches(layers: int, micro_batches: int) -> Iterator[str]:
    """The kernels of a step: the backward pass begins with the last norm, and each layer with what
    stands before its norms.
    """
    for _ in range(micro_batches):
        yield from ["embedding", *FORWARD * layers, FORWARD[0], "nvjet_head"]
        yield from [
            "nvjet_head_backward",
            BACKWARD[0],
            *[*BACKWARD[1:], BACKWARD[0]] * layers,
            "embedding_backward",
        ]
    yield "adam"


def trace(path: Path, names: list[str], odd: int | None = None) -> Path:
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "args": {}}]
    for n, name in enumerate(names):
        kind = "gpu_memset" if name.startswith("Memset") else "kernel"
        duration = 100.0 if n == odd else float(len(name))
        events.append(
            {
                "cat": "cuda_runtime",
                "name": "cudaLaunchKernel",
                "ts": n,
                "dur": 1,
                "args": {"correlation": n},
            }
        )
        events.append(
            {
                "cat": kind,
                "name": name,
                "ts": 10_000 - n,
                "dur": duration,
                "args": {"correlation": n},
            }
        )  # the order is that of the launches
    path.write_text(json.dumps({"traceEvents": events}))
    return path


@pytest.mark.parametrize("layers", [3, 5])
def test_kernels_come_in_the_order_of_their_launch_with_their_median_time(
    tmp_path: Path, layers: int
) -> None:
    names = list(launches(layers, micro_batches=4))
    second = names.index("nvjet_b", len(names) // 4)  # in the second micro-batch
    inside = (
        names.index("nvjet_b", second + 1)
        if layers == 3
        else names.index("nvjet_b", names.index("nvjet_b", second + 1) + 1)
    )
    rows = kernels_of_a_layer(trace(tmp_path / "trace.json", names, odd=inside), layers, "bf16")
    forward = [row for row in rows if row["pass"] == "forward"]
    assert [row["kind"] for row in forward] == [
        "elementwise",
        "gemm",
        "attention",
        "elementwise",
        "gemm",
        "elementwise",
    ]
    assert [row["place"] for row in forward] == list(range(6)) and {
        row["layers_seen"] for row in rows
    } == {3 * (layers - 2)}
    assert [row["microseconds"] for row in forward] == [len(name) for name in FORWARD]
    backward = [
        (row["kernel"], row["kind"], row["microseconds"])
        for row in rows
        if row["pass"] == "backward"
    ]
    norm = "transformer_engine::normalization::rmsnorm_bwd_tuned_kernel<int>"
    assert backward == [
        (norm, "elementwise", len(BACKWARD[0])),
        ("te::amax_kernel<1>", "cast", len(BACKWARD[4])),
        ("Memset", "memory", len(BACKWARD[5])),
        (norm, "elementwise", len(BACKWARD[0])),
        ("rmsnorm_bwd_finalize_tuned_kernel", "elementwise", len(BACKWARD[1])),
        ("nvjet_c", "gemm", len(BACKWARD[2])),
    ]


def test_a_kernels_time_is_that_of_the_layer_that_is_looked_at(tmp_path: Path) -> None:
    names = list(launches(3, micro_batches=2))  # of which one inner layer is looked at
    inside = [n for n, name in enumerate(names) if name == "nvjet_b"][4]
    rows = kernels_of_a_layer(trace(tmp_path / "trace.json", names, odd=inside), 3, "bf16")
    assert [row["microseconds"] for row in rows if row["kernel"] == "nvjet_b"] == [100.0]


def test_a_trace_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no forward pass of 3 layers"):
        kernels_of_a_layer(trace(tmp_path / "trace.json", ["adam"]), 3, "bf16")
