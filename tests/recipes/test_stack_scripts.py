"""Does a plan set what the performance scripts of its stack's NeMo set?

Values read from NeMo's sources at the tags.
"""

import pytest

from recipes.compose.tree import compose_plan
from recipes.environment import variables
from recipes.errors import InputError
from recipes.estimate.memory import estimate
from recipes.plan import Plan

CUDNN = {"NVTE_NORM_FWD_USE_CUDNN", "NVTE_NORM_BWD_USE_CUDNN"}
MODELS = ("llama3_8b", "llama3_70b", "llama31_405b", "nemotron4_15b", "nemotron4_340b")


def plan_of(*overrides: str) -> Plan:
    return compose_plan([*overrides, "experiment=throughput"])


def environment(*overrides: str) -> dict[str, str]:
    return {variable.name: variable.value for variable in variables(plan_of(*overrides))}


@pytest.mark.parametrize(
    ("model", "precision", "gpu"),
    [(model, "fp8_current", "gb200") for model in MODELS]
    + [("llama31_405b", "bf16", "gb200"), ("llama31_405b", "bf16", "h100")],
)
def test_cudnn_norms_are_those_of_the_models_script(model: str, precision: str, gpu: str) -> None:
    """v2.3.2: 405B and 340B always, the others never (70B on GB200 uses FSDP); v2.4.0: 405B under
    FSDP alone.
    """
    cell = [f"model={model}", f"precision={precision}", f"gpu={gpu}"]
    older, newer = plan_of("stack=nemo_25_04", *cell), plan_of("stack=nemo_25_07", *cell)
    always = model in ("llama31_405b", "nemotron4_340b")
    assert ({v.name for v in variables(older)} >= CUDNN) is always
    assert ({v.name for v in variables(newer)} >= CUDNN) is (
        always and (model == "nemotron4_340b" or newer.mapping.fsdp)
    )


@pytest.mark.parametrize(
    ("gpu", "set_there"),
    [
        ("h100", {"PYTORCH_CUDA_ALLOC_CONF"}),
        ("h200", {"PYTORCH_CUDA_ALLOC_CONF"}),
        ("b200", set()),
        ("gb200", {"PYTORCH_CUDA_ALLOC_CONF", "NCCL_NET_GDR_LEVEL", "NCCL_NET_GDR_C2C"}),
        ("gb300", {"PYTORCH_CUDA_ALLOC_CONF", "NCCL_NET_GDR_LEVEL", "NCCL_NET_GDR_C2C"}),
    ],
)
def test_variables_that_25_07_has_and_25_04_has_not(gpu: str, set_there: set[str]) -> None:
    cell = [
        "model=llama3_8b",
        "precision=bf16",
        f"gpu={gpu}",
        "cluster.container_image=/images/newer.sqsh",
    ]
    older, newer = environment("stack=nemo_25_04", *cell), environment("stack=nemo_25_07", *cell)
    assert (
        newer.keys() - older.keys() == {"TORCH_NCCL_HIGH_PRIORITY", *set_there}
        and older.keys() <= newer.keys()
    )


def test_one_gpu_gets_no_norms_of_cudnn() -> None:
    one = [
        "model=nemotron4_340b",
        "model.num_layers=1",
        "model.vocab_size=4096",
        "precision=bf16",
        "gpu=h200",
        "mapping=single",
        "num_gpus=1",
        "mapping.micro_batch=1",
    ]
    assert not CUDNN & environment(*one).keys()


def test_a_site_overrides_a_variable_of_the_stack() -> None:
    cell = ["stack=nemo_25_07", "model=llama3_8b", "precision=bf16", "gpu=h100"]
    assert (
        environment(*cell, "cluster.environment.TORCH_NCCL_HIGH_PRIORITY=0")[
            "TORCH_NCCL_HIGH_PRIORITY"
        ]
        == "0"
    )


@pytest.mark.parametrize(("stack", "checked"), [("nemo_25_04", True), ("nemo_25_07", False)])
def test_gradients_are_checked_as_the_stacks_scripts_do_and_always_by_default(
    stack: str, checked: bool
) -> None:
    cell = [f"stack={stack}", "model=llama3_8b", "precision=bf16", "gpu=gb200"]
    assert plan_of(*cell).settings.check_gradients is checked
    assert compose_plan([*cell, "data=mock"]).settings.check_gradients
    assert plan_of(*cell, "settings.check_gradients=true").settings.check_gradients


@pytest.mark.parametrize(
    ("model", "gpu"), [("llama3_8b", "gb200"), ("llama3_70b", "b200"), ("nemotron4_340b", "b200")]
)
def test_mxfp8_parameters_are_kept_in_fp8_from_25_07_on(model: str, gpu: str) -> None:
    cell = [f"model={model}", "precision=mxfp8", f"gpu={gpu}"]
    older, newer = plan_of("stack=nemo_25_04", *cell), plan_of("stack=nemo_25_07", *cell)
    assert older.precision.fp8 and newer.precision.fp8
    assert not older.precision.fp8.param_gather and newer.precision.fp8.param_gather
    in_bf16 = plan_of("stack=nemo_25_07", *cell, "precision.fp8.param_gather=false")
    assert estimate(newer).terms["weights"] < estimate(in_bf16).terms["weights"]


def test_mxfp8_parameters_stay_in_bf16_where_they_must() -> None:
    """With checkpoints a run would not continue bit by bit; Megatron-Core's FSDP has no buffer for
    them.
    """
    cell = ["stack=nemo_25_07", "model=llama3_8b", "precision=mxfp8", "gpu=b200"]
    saved, sharded = (
        compose_plan(cell),
        plan_of(*cell, "mapping.fsdp=true", "mapping.cuda_graphs=false"),
    )
    assert not any(
        plan.precision.fp8.param_gather for plan in (saved, sharded) if plan.precision.fp8
    )
    with pytest.raises(InputError, match="cannot shard MXFP8 parameters"):
        plan_of(
            *cell,
            "mapping.fsdp=true",
            "mapping.cuda_graphs=false",
            "precision.fp8.param_gather=true",
        )
    with pytest.raises(InputError, match="no parameters are kept in FP8 under mxfp8"):
        plan_of("stack=nemo_25_04", *cell[1:], "precision.fp8.param_gather=true")


def test_405b_on_gb200_has_a_copy_of_the_optimizer_every_64_gpus() -> None:
    cell = ["stack=nemo_25_07", "model=llama31_405b", "precision=fp8_current", "gpu=gb200"]
    published = plan_of(*cell)
    assert (published.num_gpus, published.mapping.fsdp, published.optimizer_instances) == (
        128,
        True,
        2,
    )
    assert plan_of("stack=nemo_25_04", *cell[1:]).optimizer_instances == 1
    half = plan_of(*cell, "num_gpus=64", "mapping.global_batch=128")
    assert half.optimizer_instances == 1
    assert estimate(published).terms["optimizer"] == pytest.approx(
        estimate(half).terms["optimizer"]
    )


def built(*overrides: str) -> dict[str, object]:
    """Return the fields that are set in the recipe of a plan, by path."""
    from pathlib import Path

    from fiddle import printing

    from recipes.training import cpu
    from recipes.training.recipe import build

    cpu.activate()
    text = printing.as_str_flattened(build(plan_of(*overrides), Path("RUN")), include_types=False)
    return dict(
        line.split(" = ", 1) for line in text.splitlines() if " = " in line and "[unset" not in line
    )


@pytest.mark.nemo
def test_the_recipe_has_what_the_scripts_of_25_07_set() -> None:
    """Buffers of 405B on H100, and FSDP's averaging, which v2.3.2 turns off always and v2.4.0 for
    FP32 gradients alone.
    """
    cell = ["model=llama31_405b", "precision=bf16", "gpu=h100"]
    older, newer = built("stack=nemo_25_04", *cell), built("stack=nemo_25_07", *cell)
    turned_off = {
        key.split(".")[-2]
        for key, value in newer.items()
        if key.endswith(".aggregate") and older[key] != value
    }
    assert turned_off == {"qkv_fprop", "proj_dgrad", "fc1_fprop", "fc2_dgrad"}
    fsdp = ["model=llama31_405b", "precision=fp8_current", "gpu=gb200"]
    older, newer = built("stack=nemo_25_04", *fsdp), built("stack=nemo_25_07", *fsdp)
    averaged = "trainer.strategy.ddp.average_in_collective"
    assert (older[averaged], newer[averaged]) == ("False", "True")
    assert (
        built("stack=nemo_25_07", *fsdp, "settings.grad_reduce_in_fp32=true")[averaged] == "False"
    )
    assert newer["trainer.strategy.num_distributed_optimizer_instances"] == "2"
