"""GPUs without rows in NVIDIA's tables: which recipes their compute capability allows, from which
layouts plans start, and their predictions.
"""

import json
from pathlib import Path

import pytest

from analysis.predict import main as predict
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.estimate.possible import names_device

STACKS = ("nemo_25_04", "nemo_25_07", "nemo_25_04_te_2_11")
HOPPER = {
    "nemo_25_04": {"bf16", "fp8_delayed", "fp8_current"},
    "nemo_25_07": {"bf16", "fp8_delayed", "fp8_current", "fp8_subchannel"},
    "nemo_25_04_te_2_11": {"bf16", "fp8_delayed", "fp8_current", "fp8_subchannel"},
}
ULTRA = {
    "nemo_25_04": {"bf16", "fp8_delayed", "fp8_current", "mxfp8"},
    "nemo_25_07": {"bf16", "fp8_delayed", "fp8_current", "mxfp8"},
    "nemo_25_04_te_2_11": {"bf16", "fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8"},
}
# Compute capability 12.0: no MXFP8 in any stack; Transformer Engine 2.2 takes it for 10.0.
WORKSTATION = {
    "nemo_25_04": {"bf16"},
    "nemo_25_07": {"bf16", "fp8_delayed", "fp8_current"},
    "nemo_25_04_te_2_11": {"bf16", "fp8_delayed", "fp8_current", "fp8_subchannel"},
}
RECIPES = {
    "h20": HOPPER,
    "h800": HOPPER,
    "gh200": HOPPER,
    "b300": ULTRA,
    "rtx_pro_6000": WORKSTATION,
}
SMALL = ["model=llama32_1b", "cluster.container_runtime=none", "cluster.python=python"]
PRECISIONS = ("bf16", "fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8")


@pytest.mark.parametrize("gpu", RECIPES)
@pytest.mark.parametrize("stack", STACKS)
def test_compute_capability_decides_which_recipes_run(gpu: str, stack: str) -> None:
    runs = set()
    for precision in PRECISIONS:
        try:
            plan = compose_plan([*SMALL, f"gpu={gpu}", f"stack={stack}", f"precision={precision}"])
        except InputError as error:
            assert f"{precision} on {gpu} with {stack}" in str(error)
        else:
            runs.add(precision)
            assert plan.gpu.name == gpu
    assert runs == RECIPES[gpu][stack]


@pytest.mark.parametrize("gpu", RECIPES)
def test_a_step_is_predicted_with_the_interval_of_no_family(
    gpu: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert predict(["model=llama32_1b", f"gpu={gpu}", "num_gpus=8", "mapping.tp=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found[0] if isinstance(found, list) else found
    assert row["label"] == "predicted" and f"{gpu} is in no family of GPUs" in row["interval"]
    assert row["step_time_low_s"] < row["step_time_s"] < row["step_time_high_s"]


def test_a_large_model_on_a_gpu_without_layouts_is_refused_with_what_to_give() -> None:
    with pytest.raises(InputError, match=r"; use num_gpus=\d+ .*mapping\."):
        compose_plan(["model=llama3_8b", "gpu=rtx_pro_6000", "mapping=recommended"])


def test_every_gpu_says_where_its_values_are_from() -> None:
    for file in (Path(__file__).parents[2] / "conf" / "gpu").glob("*.yaml"):
        if file.stem != "cpu":
            source = compose_plan([*SMALL, f"gpu={file.stem}"]).gpu.source
            assert len(source) > 10, file.stem


def test_a_plan_without_a_device_name_knows_its_gpu_from_conf() -> None:
    """Plans of earlier versions have none, and a plan for the CPU names no GPU."""
    old = compose_plan([*SMALL, "gpu=h200"]).gpu.model_copy(update={"device_name": None})
    assert names_device(old, "NVIDIA H200")
    assert not names_device(old, "NVIDIA H20")
    assert not names_device(compose_plan(["experiment=demo"]).gpu, "an H200 of some maker")
