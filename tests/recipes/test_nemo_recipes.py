"""The list of NeMo's recipes: what is in it, what it refuses, and that it is what NeMo has."""

import csv
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.compose.tree import CONF, compose_plan
from recipes.environment import variables
from recipes.errors import InputError
from recipes.nemo_recipes import ARCHITECTURE, NEMO_RECIPES, SIZES, by_version, recipes_of
from recipes.plan import Plan, plan_from_json
from recipes.upstream import models_page

PRECISIONS = ("bf16", "fp8_delayed", "fp8_current", "mxfp8")
SMALL = ("num_layers=4", "vocab_size=32000", "seq_length=4096")
INSTALLED = recipes_of("2.3") or {}
DENSE = [name for name, recipe in INSTALLED.items() if not recipe.refused]
REFUSED = {
    recipe.refused: name for name, recipe in INSTALLED.items() if recipe.refused
}  # one of a kind


def plan_of(recipe: str, *further: str, stack: str = "nemo_25_04") -> Plan:
    """Return a plan of a recipe with its own sizes, shallow enough for one GPU."""
    model = by_version()[{"nemo_25_04": "2.3", "nemo_25_07": "2.4"}[stack]][recipe].model
    chosen = [
        f"model.{name}={model[name]}"
        for name in (*SIZES, "activation", "tied_embeddings")
        if model[name] is not None
    ]
    small = [f"model.{field}" for field in SMALL]
    place = [
        "gpu=b200",
        f"stack={stack}",
        "mapping=single",
        "data=mock",
        "num_gpus=16",
        "mapping.micro_batch=1",
        "mapping.global_batch=16",
    ]
    return compose_plan(
        ["model=llama3_8b", f"model.nemo_recipe={recipe}", *chosen, *small, *place, *further]
    )


def refusal(*overrides: str) -> str:
    """Return the line that refuses a plan."""
    with pytest.raises(InputError) as caught:
        compose_plan(overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_list_has_the_81_recipes_that_pretrain_and_says_why_not_for_each_that_is_refused() -> (
    None
):
    pretrain = [
        recipe for recipe in INSTALLED.values() if "fine-tuning alone" not in recipe.refused
    ]
    assert len(pretrain) == 81
    assert {
        "llama3_8b",
        "llama32_1b",
        "qwen25_7b",
        "mistral_7b",
        "gemma2_9b",
        "llama2_7b",
        "starcoder_15b",
    } <= set(DENSE)
    why = {
        name: INSTALLED[name].refused
        for name in ("mixtral_8x7b", "mamba2_8b", "nemotronh_8b", "t5_3b", "bert_110m", "hyena_7b")
    }
    words = ("8 experts", "Mamba", "Mamba", "T5", "BERT", "Hyena")
    assert all(word in why[name] for name, word in zip(why, words, strict=True))


@pytest.mark.parametrize("recipe", REFUSED.values())
def test_a_recipe_of_another_kind_is_refused_when_the_plan_is_made(recipe: str) -> None:
    line = refusal(
        "model=llama3_8b", f"model.nemo_recipe={recipe}", "gpu=h100", "experiment=throughput"
    )
    assert INSTALLED[recipe].refused in line and "docs/models.md" in line


@pytest.mark.parametrize("recipe", ["qwen3_600m", "qwen3_8b"])
def test_a_recipe_that_a_later_stack_brings_is_planned_there(recipe: str) -> None:
    plan = plan_of(recipe, stack="nemo_25_07")
    assert plan.model.qk_norm and plan.model.head == 128 and not plan.model.qkv_bias


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.nemo_recipe=lama3_8b"], ["no such recipe", "use llama3_8b"]),
        (["model.nemo_recipe=zzzz"], ["no such recipe", "docs/models.md"]),
        (["model.nemo_recipe=qwen3_8b"], ["NeMo 2.4 has it", "stack=nemo_25_07"]),
        (
            ["model.nemo_recipe=gemma2_9b"],
            ["model.activation=swiglu", "set model.activation=geglu"],
        ),
        (["model.activation=gelu"], ["model.activation=gelu", "set model.activation=swiglu"]),
        (["model.qkv_bias=true"], ["set model.qkv_bias=false"]),
        (
            ["model.nemo_recipe=qwen25_7b", "model.qkv_bias=false", "model.qk_norm=true"],
            ["set model.qkv_bias=true model.qk_norm=false"],
        ),
        (["model.normalization=layernorm"], ["set model.normalization=rmsnorm"]),
        (["model.rotary_base=10000"], ["set model.rotary_base=500000.0"]),
        (["model.sliding_window=512"], ["set model.sliding_window=null"]),
        (["model.attention_softcap=50"], ["set model.attention_softcap=null"]),
        (["model.hidden_size=4097"], ["no multiple of model.num_attention_heads"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_model_that_nemo_would_build_otherwise_is_refused(
    overrides: list[str], words: list[str]
) -> None:
    line = refusal("model=llama3_8b", "gpu=h100", "experiment=throughput", *overrides)
    assert all(word in line for word in words), line


def test_a_command_refuses_them_with_exit_code_2() -> None:
    command = [
        sys.executable,
        "-m",
        "launch",
        "model=llama3_8b",
        "gpu=h100",
        "model.nemo_recipe=gemma3_9b",
        "dry_run=true",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=NEMO_RECIPES.parents[2])
    assert (
        done.returncode == 2 and "use gemma2_9b" in done.stderr and "Traceback" not in done.stderr
    )


def test_a_softcap_goes_without_context_parallelism_and_beyond_no_window() -> None:
    assert "set mapping.cp=1" in _refused("gemma2_9b", "mapping.cp=2")
    assert "use seq_length=4096" in _refused("gemma2_9b", "seq_length=8192")
    assert "sliding window" in _refused("mistral_7b", "mapping.cp=4", "model.num_query_groups=2")


@pytest.mark.parametrize(
    ("recipe", "fused"),
    [("gemma_2b", None), ("gemma_7b", None), ("gemma2_9b", "1"), ("qwen25_7b", "1")],
)
def test_the_environment_allows_the_attention_that_the_recipe_chose(
    recipe: str, fused: str | None
) -> None:
    """Megatron-Core asserts for its flash backend, which Gemma's recipes choose, that
    NVTE_FUSED_ATTN is not 1.
    """
    assert (INSTALLED[recipe].attention_backend == "flash") == (fused is None)
    environment = {variable.name: variable.value for variable in variables(plan_of(recipe))}
    assert environment["NVTE_FLASH_ATTN"] == "1" and environment.get("NVTE_FUSED_ATTN") == fused


def _refused(recipe: str, *further: str) -> str:
    with pytest.raises(InputError) as caught:
        plan_of(recipe, *further)
    return str(caught.value)


def test_a_plan_of_an_older_version_states_what_its_recipe_built() -> None:
    plan = compose_plan(["model=nemotron4_15b", "gpu=h100", "experiment=throughput"])
    old = plan.model_copy(
        update={
            "model": plan.model.model_copy(
                update=dict.fromkeys((*ARCHITECTURE[2:3], "normalization", "rotary_percent"))
            )
        }
    )
    assert old.model.normalization is None
    assert (
        plan_from_json(old.model_dump_json()) == plan and plan.model.normalization == "layernorm1p"
    )


@pytest.mark.parametrize("version", by_version())
def test_the_list_is_sorted_and_written_as_the_command_writes_it(version: str) -> None:
    with NEMO_RECIPES.open(newline="") as file:
        rows = [(row["nemo"], row["recipe"]) for row in csv.DictReader(file)]
    assert rows == sorted(set(rows)) and version in dict(rows)


def test_the_page_of_models_is_made_from_the_list() -> None:
    page = models_page.text()
    assert models_page.PAGE.read_text(encoding="utf-8") == page
    assert all(f"| {name} |" in page for recipes in by_version().values() for name in recipes)


@pytest.mark.parametrize("recipe", ["qwen2_7b", "gemma2_9b"])
def test_a_model_file_that_the_command_prints_composes(recipe: str, tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    command = [sys.executable, "-m", "recipes.upstream.nemo_source", "--model", recipe]
    done = subprocess.run(command, capture_output=True, text=True, cwd=NEMO_RECIPES.parents[2])
    (conf / "model" / "mine.yaml").write_text(done.stdout)
    plan = compose_plan(
        [
            "model=mine",
            "gpu=b200",
            "num_gpus=8",
            "mapping.tp=2",
            "seq_length=4096",
            "experiment=throughput",
        ],
        conf,
    )
    assert {field: getattr(plan.model, field) for field in ARCHITECTURE} == {
        field: INSTALLED[recipe].model[field] for field in ARCHITECTURE
    }


def test_a_source_without_nemo_is_one_clear_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.upstream.nemo_source", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=NEMO_RECIPES.parents[2],
    )
    assert (
        done.returncode == 2
        and "nemo/package_info.py" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_source_with_an_activation_that_is_not_known_is_one_clear_line(tmp_path: Path) -> None:
    """A NeMo of one recipe, whose configuration activates with something new."""
    recipes, models = (
        tmp_path / "nemo/collections/llm/recipes",
        tmp_path / "nemo/collections/llm/gpt/model",
    )
    recipes.mkdir(parents=True), models.mkdir(parents=True)
    (tmp_path / "nemo/package_info.py").write_text("MAJOR = 9\nMINOR = 1\n")
    (models / "new.py").write_text(NEW_MODEL)
    (recipes / "new_1b.py").write_text(NEW_RECIPE)
    command = [sys.executable, "-m", "recipes.upstream.nemo_source", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=NEMO_RECIPES.parents[2])
    assert (
        done.returncode == 2
        and "new_1b: NewConfig" in done.stderr
        and "mish" in done.stderr
        and "Traceback" not in done.stderr
    )
    (models / "new.py").write_text(NEW_MODEL.replace("mish", "silu"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=NEMO_RECIPES.parents[2])
    assert done.returncode == 1 and "new_1b: not in the list" in done.stdout


NEW_MODEL = """
@dataclass
class NewConfig(GPTConfig):
    position_embedding_type: str = "rope"
    share_embeddings_and_output_weights: bool = False
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    num_layers: int = 2
    hidden_size: int = 64
    num_attention_heads: int = 4
    gated_linear_unit: bool = True
    activation_func: Callable = F.mish
    transformer_layer_spec: Callable = default_layer_spec
"""
NEW_RECIPE = """
def model():
    return run.Config(GPTModel, config=run.Config(NewConfig))

def pretrain_recipe(dir=None, name="x", num_nodes=1, num_gpus_per_node=8):
    return run.Partial(pretrain, model=model())
"""


@pytest.mark.nemo
def test_the_shipped_list_is_what_the_command_makes_of_the_installed_nemo() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.upstream.nemo_source"],
        capture_output=True,
        text=True,
        cwd=NEMO_RECIPES.parents[2],
    )
    assert done.returncode == 0 and "0 difference(s)" in done.stdout, done.stdout + done.stderr


@pytest.mark.nemo
def test_the_list_is_what_nemos_own_objects_have() -> None:
    """The list comes from NeMo's source text; here NeMo itself is asked."""
    from recipes.training import cpu

    cpu.activate()
    from recipes.training.architecture import architecture
    from recipes.training.recipe import _module

    for name in DENSE:
        make = _module(name).pretrain_recipe
        recipe, listed = make(dir="x", name="x", num_nodes=1, num_gpus_per_node=1), INSTALLED[name]
        assert architecture(recipe.model) == {
            field: listed.model[field] for field in ARCHITECTURE
        }, name
        assert (
            "performance_mode" in inspect.signature(make).parameters
        ) == listed.performance_mode, name
        assert recipe.model.config.attention_backend.name == listed.attention_backend, name
        sizes = {
            field: getattr(recipe.model.config, field)
            for field in (
                "num_layers",
                "hidden_size",
                "num_attention_heads",
                "seq_length",
                "vocab_size",
            )
        }
        assert sizes == {field: listed.model[field] for field in sizes}, name


@pytest.mark.nemo
def test_every_dense_recipe_builds_for_a_gpu() -> None:
    """What NeMo's performance mode adds is there, whether or not the recipe has that mode, and the
    architecture stays NeMo's.
    """
    from recipes.training import cpu

    cpu.activate()
    from recipes.training.architecture import architecture
    from recipes.training.gpu import comm_overlap
    from recipes.training.recipe import build

    for number, name in enumerate(DENSE):
        plan = plan_of(name, f"precision={PRECISIONS[number % len(PRECISIONS)]}")
        listed = INSTALLED[name].model
        assert {field: getattr(plan.model, field) for field in ARCHITECTURE} == {
            field: listed[field] for field in ARCHITECTURE
        }, name
        recipe = build(plan, Path("RUN"))
        assert comm_overlap(recipe) is not None, name
        assert recipe.trainer.strategy.ddp.grad_reduce_in_fp32 is not None, name
        assert architecture(recipe.model) == {
            field: getattr(plan.model, field) for field in ARCHITECTURE
        }, name
        counted = plan.model.embedding_and_loss_count_as_layers
        assert recipe.trainer.strategy.account_for_embedding_in_pipeline_split == counted, name
        assert recipe.trainer.strategy.account_for_loss_in_pipeline_split == counted, name
