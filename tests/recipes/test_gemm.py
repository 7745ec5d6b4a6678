"""The GEMM measurement: which shapes, that it refuses a machine without a GPU, and on one that its products are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.compose import CONF, compose_plan
from recipes.errors import InputError
from recipes.gemm import main, shapes
from recipes.sizes import Shape, layer_parameters, linear_layers

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("model", ["llama3_8b", "nemotron4_15b"])
def test_the_layers_shapes_hold_all_of_its_weights(model: str) -> None:
    plan = compose_plan([f"model={model}", "gpu=b200", "experiment=throughput"])
    found = linear_layers(plan.model, plan.seq_length)
    assert sum(s.n * s.k for s in found) == layer_parameters(plan.model) - 2 * plan.model.hidden_size
    assert {s.m for s in found} == {plan.seq_length}


def test_the_sweep_is_that_of_the_post() -> None:
    assert {(s.m, s.n) for s in shapes([], [1024, 2048])} == {(4096, 4096)}


def test_asking_for_help_needs_no_torch() -> None:
    code = "import sys; import recipes.gemm as g; g.shapes(['llama3_8b'], []); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parent, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU, so nothing is refused")
def test_without_a_gpu_it_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: recipes.gemm measures a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
def test_every_kind_multiplies_to_what_bf16_does_within_fp8s_precision() -> None:
    from recipes.training.gemm import kinds

    torch.manual_seed(0)
    a, b = (torch.randn(256, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    exact = a.double() @ b.double().t()
    for kind in kinds():
        error = (kind.make(a, b)().double() - exact).norm() / exact.norm()
        assert error < (0.01 if kind.precision == "bf16" else 0.05), (kind.granularity, kind.accumulation)


@pytest.mark.gpu
@needs_gpu
def test_shapes_that_are_no_multiple_of_a_tile_are_refused() -> None:
    from recipes.training.gemm import measure

    with pytest.raises(InputError, match="multiple of 128"):
        measure([Shape("odd", 128, 128, 100)], 1)


@pytest.mark.gpu
@needs_gpu
def test_the_command_writes_rows_with_their_device(tmp_path: Path) -> None:
    assert main(["--k", "1024", "--rounds", "2", "--out", str(tmp_path)]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["device"] == torch.cuda.get_device_name()
