"""The first line of a job, run as the job runs it: the node's PyTorch and GPUs against the plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.compose.tree import compose_plan
from recipes.run_folder import open_folder, status_of

ROOT = Path(__file__).parents[2]
BLOCKS = ["gpu=h100", "stack=nemo_25_07", "precision=fp8_subchannel"]
MXFP8 = ["gpu=b200", "stack=nemo_25_04", "precision=mxfp8"]
ULTRA = [
    "gpu=b300",
    "stack=nemo_25_04",
    "precision=bf16",
    "cluster.container_image=/images/own.sqsh",
]
CASES = [
    (BLOCKS, '"12.9"', None),
    (BLOCKS, "'12.10'", None),
    (BLOCKS, "'13.0'", None),
    (BLOCKS, "'12.8'", "torch was built with CUDA 12.8, fp8_subchannel needs 12.9 or newer"),
    (BLOCKS, "None", "torch was built without CUDA, fp8_subchannel needs 12.9 or newer"),
    (MXFP8, "'12.8'", None),
    (MXFP8, "'12.6'", "torch was built with CUDA 12.6, b200 needs 12.8 or newer"),
    (ULTRA, "'12.8'", "torch was built with CUDA 12.8, b300 needs 12.9 or newer"),
    (ULTRA, "'12.9'", None),
    (["gpu=h100", "precision=fp8_current"], "'12.4'", None),
]


def node(folder: Path, plan_file: Path, cuda: str, device: str | None = None) -> dict[str, str]:
    """Return the environment of a node: the stack's packages, a PyTorch of a CUDA, the plan's
    GPUs.
    """
    plan = json.loads(plan_file.read_text())
    names = {"nemo": "nemo_toolkit"}
    for name, version in plan["stack"]["versions"].items():
        info = folder / f"{names.get(name, name)}-{version}.0.dist-info"
        info.mkdir(parents=True)
        package = names.get(name, name).replace("_", "-")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}.0\n"
        )
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(
        "raise SystemExit('the preflight imports torch')\n"
    )
    version_file = (
        f"from typing import Optional\n__version__ = '2.7'\ncuda: Optional[str] = {cuda}\n"
    )
    (folder / "torch" / "version.py").write_text(version_file)
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    gpu = plan["gpu"]
    line = f"{gpu['compute_capability']}, {device or 'NVIDIA ' + gpu['device_name']}"
    lines = "\n".join([line] * gpu["devices_per_node"])
    smi.write_text(
        f'#!/bin/sh\n[ "$1" = --query-gpu=compute_cap,name ] && cat <<END\n{lines}\nEND\n'
    )
    smi.chmod(0o755)
    path = f"{smi.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": f"{folder}:{ROOT}", "PYTHONSAFEPATH": "1"}


@pytest.mark.parametrize(("overrides", "cuda", "says"), CASES)
def test_the_job_asks_for_the_cuda_of_its_pytorch(
    overrides: list[str],
    cuda: str,
    says: str | None,
    tmp_path: Path,
) -> None:
    plan = compose_plan(["model=llama3_8b", *overrides, f"runs_dir={tmp_path}"])
    run = open_folder(plan)
    command = [sys.executable, "-m", "launch.preflight", str(run)]
    env = node(tmp_path / "site", run / "plan.json", cuda)
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    if says is None:
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert status_of(run) == "failed"


DEVICES = [
    ("h100", "NVIDIA H100 80GB HBM3", True),
    ("h100", "NVIDIA H20", False),
    ("h20", "NVIDIA H200", False),
    ("h800", "NVIDIA H800", True),
    ("gh200", "NVIDIA GH200 480GB", True),
    ("h200", "NVIDIA GH200 480GB", False),
    ("b300", "NVIDIA B300 SXM6 AC", True),
    ("gb300", "NVIDIA B300 SXM6 AC", False),
    ("rtx_pro_6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition", True),
]


@pytest.mark.parametrize(("gpu", "device", "is_right"), DEVICES)
def test_the_job_asks_for_the_name_of_its_gpus(
    gpu: str, device: str, is_right: bool, tmp_path: Path
) -> None:
    run = open_folder(
        compose_plan(
            [
                "model=llama32_1b",
                f"gpu={gpu}",
                "cluster.container_image=/images/own.sqsh",
                f"runs_dir={tmp_path}",
            ]
        )
    )
    env = node(tmp_path / "site", run / "plan.json", "'12.9'", device)
    command = [sys.executable, "-m", "launch.preflight", str(run)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == (0 if is_right else 2), done.stderr
    assert is_right or f"the GPUs are {device}, the plan is for {gpu}" in done.stderr
