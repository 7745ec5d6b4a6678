"""Ranks of real jobs, built by NeMo and Megatron-Core at true size: what they are, and what is
refused.

One process for all, for importing NeMo takes most of the time.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.rehearse import main

pytestmark = pytest.mark.nemo
# Of meta-llama/Meta-Llama-3-8B, model.safetensors.index.json: 16,060,522,496 bytes of BF16
PARAMETERS = 8_030_261_248
LAYOUT = [
    "num_gpus=32",
    "mapping.tp=2",
    "mapping.pp=4",
    "mapping.cp=2",
    "mapping.vp=2",
    "mapping.micro_batch=1",
    "mapping.global_batch=128",
]
# Megatron-Core extensions/transformer_engine.py compares it with the model's configuration
REFUSED = "NVTE_APPLY_QK_LAYER_SCALING"


@pytest.fixture(scope="module")
def outcome() -> subprocess.CompletedProcess[str]:
    """Rehearse Llama 3 8B in BF16, and in FP8 with and without a variable that Megatron-Core
    refuses.
    """
    overrides = [
        "model=llama3_8b",
        "gpu=h100",
        *LAYOUT,
        "precision=bf16,fp8_current",
        f"cluster.environment={{}},{{{REFUSED}:'1'}}",
    ]
    command = [sys.executable, "-m", "launch.rehearse", "-m", *overrides, "--rank", "5", "--json"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def cells(outcome: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Return what was built."""
    found: list[dict[str, Any]] = json.loads(outcome.stdout)
    return found


def test_ranks_are_as_our_arithmetic_counts_them(cells: list[dict[str, Any]]) -> None:
    assert [cell["precision"] for cell in cells] == ["bf16", "fp8_current"]
    assert [cell["wrong"] for cell in cells] == [[], []]
    for cell in cells:
        assert [rank["rank"] for rank in cell["ranks"]] == [0, 5, 7, 8, 15, 16, 23, 24, 31]
        for rank in cell["ranks"]:
            assert len(rank["compared"]) == 7
            assert all(
                each["built"] == pytest.approx(each["counted"], rel=0.01, abs=1)
                for each in rank["compared"].values()
            )


def test_stages_groups_and_checkpoint_are_those_of_the_layout(cells: list[dict[str, Any]]) -> None:
    bf16, fp8 = cells
    ranks = {rank["rank"]: rank for rank in bf16["ranks"]}
    assert ranks[0]["layers"] == [[0, 1, 2, 3], [16, 17, 18, 19]] and ranks[31]["layers"] == [
        [12, 13, 14, 15],
        [28, 29, 30, 31],
    ]
    groups = ranks[5]["groups"]
    assert groups == {
        "tensor": [4, 5],
        "pipeline": [5, 13, 21, 29],
        "context": [5, 7],
        "data": [1, 5],
        "optimizer": [1, 3, 5, 7],
    }
    for cell in cells:  # BF16 weights, FP32 main parameters and two FP32 moments
        assert cell["checkpoint"]["bytes"] == (2 + 4 + 8) * PARAMETERS
    kept = {
        name: sum(rank["compared"][name]["built"] for rank in fp8["ranks"])
        for name in ("parameters of FP8 layers", "parameters of BF16 layers")
    }
    assert (
        kept["parameters of FP8 layers"] > kept["parameters of BF16 layers"] > 0
    )  # first and last layer stay in BF16


def test_what_megatron_core_refuses_is_one_line(outcome: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert outcome.returncode == 2 and len(lines) == 2
    assert all(
        REFUSED in line
        and "megatron/core/extensions/transformer_engine.py:" in line
        and "; " in line
        for line in lines
    )
    assert (
        "Traceback" not in outcome.stderr.rpartition("error: ")[2]
    )  # NeMo logs one of its own while it is imported


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=llama3_8b", "gpu=h100", "--rank", "8"], "--rank 8: the plan has ranks 0 to 7"),
        ([], "gpu=cpu trains on this machine"),
        (["model=llama3_8b", "gpu=h100", "mapping.tp=3"], "is no multiple of tp*pp*cp"),
    ],
)
def test_wrong_input_is_one_line_before_nemo_is_imported(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
