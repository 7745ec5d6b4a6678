"""What each legal cell sets in NeMo's recipe, as a readable file each: a change of any field shows
as a diff.

    pytest tests/recipes/test_recipe_golden.py --update-golden      writes the files anew; read the
    diff before you commit

A file holds the throughput settings in full, and below them what the convergence settings change,
or why NVIDIA's layout cannot have them.  The recipes are built from `llm.<model>.pretrain_recipe`
of the installed NeMo 2.3.2; those of stack nemo_25_07 too, whose fields are the same.
"""

import difflib
from pathlib import Path

import pytest

from launch.matrix import GPUS, MODELS, PRECISIONS, cell
from recipes.compose.tree import compose_plan
from recipes.environment import variables
from recipes.errors import InputError
from recipes.plan import Plan

GOLDEN = Path(__file__).parent / "golden"
STACKS = {"nemo_25_04": PRECISIONS, "nemo_25_07": ("fp8_subchannel",)}
CELLS = [
    (stack, model, precision, gpu)
    for stack, precisions in STACKS.items()
    for model in MODELS
    for precision in precisions
    for gpu in GPUS
    if cell(stack, model, precision, gpu, ["experiment=throughput"])["runs"]
]
pytestmark = [pytest.mark.nemo, pytest.mark.usefixtures("on_cpu")]


@pytest.fixture(scope="module")
def on_cpu() -> None:
    """NeMo's import wants the adapter on a machine without a GPU."""
    from recipes.training import cpu

    cpu.activate()


def plan_of(cell: tuple[str, ...], experiment: str) -> Plan:
    """Return the plan of a cell, with data that needs no preparation."""
    names = zip(("stack", "model", "precision", "gpu"), cell, strict=True)
    data = (
        ["data=mock"]
        if experiment == "throughput"
        else [
            "data=indexed",
            "data.train=[TRAIN]",
            "data.heldout=[HELDOUT]",
            "data.tokenizer=TOKENIZER",
        ]
    )
    return compose_plan(
        [
            *(f"{axis}={name}" for axis, name in names),
            f"experiment={experiment}",
            *data,
            "mapping=recommended",
        ]
    )


def lines(plan: Plan) -> dict[str, str]:
    """Return what the plan sets: the recipe's fields by path, and the job's environment."""
    from fiddle import printing

    from recipes.training.recipe import build

    text = printing.as_str_flattened(build(plan, Path("RUN")), include_types=False)
    fields = dict(
        line.split(" = ", 1) for line in text.splitlines() if " = " in line and "[unset" not in line
    )
    _no_overlap_that_fails(fields)
    _no_bf16_layers_in_graphs(fields)
    return {
        **{k: v for k, v in fields.items() if "plan_json" not in k},
        **{f"environment.{v.name}": repr(v.value) for v in variables(plan)},
    }


def _no_overlap_that_fails(fields: dict[str, str]) -> None:
    """No stack of these gathers BF16 and FP8 at once, and MPI is not there on every site."""
    at = "trainer.callbacks[2].tp_comm_"
    assert fields[f"{at}bootstrap_backend"] == "'nccl'"
    if fields[f"{at}overlap"] == "True" and "trainer.plugins.fp8" in fields:
        assert fields["trainer.plugins.first_last_layers_bf16"] == "False"
        assert fields["trainer.plugins.fp8_recipe"] in ("'delayed'", "'tensorwise'")


def _no_bf16_layers_in_graphs(fields: dict[str, str]) -> None:
    """Megatron-Core 0.12 and 0.13 capture every layer under one FP8 context."""
    if fields.get("model.config.enable_cuda_graph") == "True":
        assert fields.get("trainer.plugins.first_last_layers_bf16", "False") == "False"


def golden(cell: tuple[str, ...]) -> str:
    """Return the text of a cell's golden file."""
    throughput = lines(plan_of(cell, "throughput"))
    head = [
        f"# {' '.join(cell)}: settings=throughput",
        *(f"{key} = {value}" for key, value in throughput.items()),
    ]
    return "\n".join([*head, "", *_convergence(cell, throughput), ""])


def _convergence(cell: tuple[str, ...], throughput: dict[str, str]) -> list[str]:
    """Return what the convergence settings change, or why the recommended mapping cannot have
    them.
    """
    try:
        convergence = lines(plan_of(cell, "convergence"))
    except InputError as error:
        return [f"# settings=convergence is refused: {error}"]
    differs = {
        key
        for key in throughput.keys() | convergence.keys()
        if throughput.get(key) != convergence.get(key)
    }
    return [
        "# settings=convergence differs in",
        *(f"{key} = {convergence.get(key, '(not set)')}" for key in sorted(differs)),
    ]


@pytest.mark.parametrize("cell", CELLS, ids=".".join)
def test_the_recipe_of_a_cell_is_the_golden_one(
    cell: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    file = GOLDEN / cell[0] / f"{'.'.join(cell[1:])}.txt"
    found = golden(cell)
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found)
    expected = file.read_text() if file.exists() else ""
    assert found == expected, "\n".join(
        difflib.unified_diff(
            expected.splitlines(), found.splitlines(), str(file), "built now", lineterm="", n=0
        )
    )


def test_there_is_a_golden_file_for_every_legal_cell_and_no_other() -> None:
    names = {f"{stack}/{'.'.join(rest)}.txt" for stack, *rest in CELLS}
    assert names == {str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*.txt")}
    assert (
        len(CELLS) == 5 * (3 * 3 + 2) + 5
    )  # bf16, delayed and current on three GPUs, MXFP8 on two; sub-channel on H100 with 25.07


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "bf16"])
def test_emulated_fp8_on_a_gpu_is_the_bf16_recipe_but_for_its_layers(precision: str) -> None:
    from recipes.training import layers

    common = [
        "stack=emulated",
        "model=llama3_tiny",
        "gpu=h200",
        "data=mock",
        "executor=local",
        "run_name=run",
    ]
    bf16, fp8 = (
        lines(compose_plan([*common, "precision=bf16"])),
        lines(compose_plan([*common, f"precision={precision}"])),
    )
    differs = {key for key in bf16.keys() | fp8.keys() if bf16.get(key) != fp8.get(key)}
    assert (
        differs == {"model.config.transformer_layer_spec"}
        and "layer_spec" in fp8["model.config.transformer_layer_spec"]
    )
    assert (
        fp8["trainer.plugins.precision"] == "'bf16-mixed'"
        and "trainer.plugins.fp8" not in fp8
        and fp8["trainer.accelerator"] == "'gpu'"
    )
    assert layers._recipe == compose_plan([*common, f"precision={precision}"]).precision.fp8


@pytest.mark.parametrize("name", ["llama9_1b", "optim", "os.path"])
def test_a_recipe_that_nemo_lacks_is_refused(name: str, tmp_path: Path) -> None:
    """When the plan is made; and in the job, where the plan's version of NeMo is one that the list
    does not have.
    """
    from recipes.training import recipe

    with pytest.raises(
        InputError, match=f"nemo_recipe={name}: nemo_25_04 has NeMo 2.3, which has no such recipe"
    ):
        compose_plan(["model=llama3_tiny", f"model.nemo_recipe={name}"])
    unlisted = compose_plan(
        ["model=llama3_tiny", f"model.nemo_recipe={name}", "stack.versions.nemo='9.9'"]
    )
    with pytest.raises(InputError, match=f"nemo_recipe={name}: NeMo has no such recipe"):
        recipe.build(unlisted, tmp_path)


def test_throughput_settings_are_those_of_nvidias_scripts() -> None:
    """NeMo v2.3.2 scripts/performance/utils.py, line by line, for a cell that uses most of them."""
    found = lines(plan_of(("nemo_25_04", "llama3_70b", "fp8_current", "h100"), "throughput"))
    assert (
        found["trainer.plugins.fp8_recipe"] == "'tensorwise'"
        and found["trainer.plugins.first_last_layers_bf16"] == "False"
    )
    assert (
        found["trainer.plugins.grad_reduce_in_fp32"] == "False"
        and found["trainer.plugins.fp8_param_gather"] == "True"
    )
    assert found["optim.config.use_precision_aware_optimizer"] == "False"
    assert found["model.config.cross_entropy_fusion_impl"] == "'te'"
    assert found["trainer.callbacks[2].overlap_param_gather_with_optimizer_step"] == "True"
    assert found["trainer.callbacks[2].tp_comm_overlap_cfg.qkv_wgrad.num_sm"] == "24"
    bf16 = lines(plan_of(("nemo_25_04", "llama3_70b", "bf16", "h100"), "throughput"))
    assert bf16["optim.config.use_precision_aware_optimizer"] == "True"
    mx = lines(plan_of(("nemo_25_04", "llama3_70b", "mxfp8", "b200"), "throughput"))
    assert (
        mx["trainer.callbacks[2].tp_comm_overlap"] == "False"
        and mx["trainer.plugins.fp8_param_gather"] == "False"
    )
    assert (
        mx["environment.CUDA_DEVICE_MAX_CONNECTIONS"] == "'32'"
        and found["environment.CUDA_DEVICE_MAX_CONNECTIONS"] == "'1'"
    )


def test_convergence_settings_train_as_well_as_the_library_can() -> None:
    found = lines(plan_of(("nemo_25_04", "llama3_70b", "fp8_current", "h100"), "convergence"))
    assert (
        found["trainer.plugins.first_last_layers_bf16"] == "True"
        and found["trainer.plugins.grad_reduce_in_fp32"] == "True"
    )
    assert found["trainer.callbacks[2].overlap_param_gather_with_optimizer_step"] == "False"
