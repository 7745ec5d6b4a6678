"""Every kind of dense decoder trains on the CPU, in BF16 and FP8, and computes what Hugging Face's
model of the same weights does.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.compose.tree import compose_plan
from recipes.estimate.fp8_gemms import fp8_gemms
from recipes.estimate.sizes import parameters
from recipes.nemo_recipes import recipes_of
from recipes.plan import Plan
from recipes.run_folder import open_folder, read_plan, rows_of, status_of

pytestmark = pytest.mark.nemo
ROOT = Path(__file__).parents[2]
INSTALLED = recipes_of("2.3") or {}
STEPS = 3
SHIPPED = (
    "llama32_1b",
    "llama32_3b",
    "qwen25_7b",
    "mistral_7b",
    "gemma2_9b",
    "llama2_7b",
    "nemotron4_15b",
)
# One recipe of every further architecture that NeMo 2.3 has.
FURTHER = (
    "baichuan2_7b",
    "chatglm3_6b",
    "gemma_2b",
    "gpt3_175b",
    "llama31_8b",
    "mistral_nemo_12b",
    "nemotron3_4b",
    "starcoder2_3b",
    "starcoder_15b",
)
COMPARED = (
    "llama32_1b",
    "llama2_7b",
    "qwen25_7b",
    "mistral_7b",
    "mistral_nemo_12b",
    "gemma2_9b",
    "gemma_2b",
    "nemotron4_15b",
    "starcoder2_3b",
)
SIZES = (
    "num_layers=3 hidden_size=64 ffn_hidden_size=128 num_attention_heads=4 num_query_groups=2"
    " vocab_size=512 seq_length=64"
)
RUN = (
    f"max_steps={STEPS} eval_interval=1 eval_batches=1 checkpoint_interval={STEPS} warmup_steps=0"
    " max_lr=2e-3 min_lr=2e-3"
)


# A gated MLP, one without, and norms behind both halves of a layer.
RECOMPUTED = ("llama32_1b", "nemotron4_15b", "gemma2_9b")


def recomputed(recipe: str) -> Plan:
    """Return a plan for a GPU with 6 layers, the outer two in BF16, of which the first 3 are
    recomputed.
    """
    gpu = ["gpu=h100", "executor=local", "data=mock", "precision=fp8_current", "mapping=single"]
    layers = ["model.num_layers=6", "mapping.recompute_layers=3"]
    return plan_of(recipe, *gpu, *layers, "mapping.global_batch=4", "mapping.micro_batch=2")


BASE = "base"
LAYOUTS = {
    "one process": "",
    "pp 2 vp 2": "num_gpus=2 mapping.pp=2 mapping.vp=2",
    "tp 2": "num_gpus=2 mapping.tp=2",
}


def layout(name: str, *further: str) -> Plan:
    """Return a plan that trains steps 3 and 4 in a layout; BASE's trains the first two."""
    run = [
        f"train.{value}"
        for value in [
            "max_steps=4",
            "eval_interval=2",
            "checkpoint_interval=2",
            "clip_grad=1000000.0",
        ]
    ]
    stop = ["train.stop_after=2"] if name == BASE else LAYOUTS[name].split()
    return plan_of(
        "llama31_8b",
        "model.num_layers=4",
        *run,
        "mapping.micro_batch=1",
        *stop,
        f"run_name={name.replace(' ', '_')}",
        *further,
    )


def plan_of(recipe: str, *further: str) -> Plan:
    """Return a plan of a recipe on the CPU, cut in depth and width; the shipped model's own file
    where there is one.
    """
    model, small = INSTALLED[recipe].model, [f"model.{size}" for size in SIZES.split()]
    small += ["model.head_size=32"] if model["head_size"] else []
    small += ["model.sliding_window=16"] if recipe == "mistral_7b" else []
    if recipe in SHIPPED:
        named = [f"model={recipe}"]
    else:
        shape = [f"model.{name}={model[name]}" for name in ("activation", "tied_embeddings")]
        named = ["model=llama3_tiny", f"model.name={recipe}", f"model.nemo_recipe={recipe}", *shape]
    run = [f"train.{value}" for value in RUN.split()]
    place = [
        "gpu=cpu",
        "logger=none",
        "mapping.global_batch=4",
        "mapping.micro_batch=2",
        "executor.threads=1",
    ]
    return compose_plan([*named, *small, *run, *place, *further])


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Train and compare everything; return the run folders by recipe and precision, and the
    worker's answers by name.
    """
    room = tmp_path_factory.mktemp("models")
    own = [
        f"runs_dir={room / 'runs'}",
        f"data.root={room / 'data'}",
        f"data.sources=[{ROOT / 'recipes'}]",
    ]
    wanted = [
        (recipe, precision) for recipe in SHIPPED for precision in ("bf16", "fp8_current")
    ] + [(recipe, "mxfp8") for recipe in FURTHER]
    folders = {
        " ".join(cell): open_folder(plan_of(cell[0], f"precision={cell[1]}", *own))
        for cell in wanted
    }
    compare = [[recipe, plan_of(recipe, *own).model_dump_json()] for recipe in COMPARED]
    count = [
        [f"{recipe} recomputed", recomputed(recipe).model_dump_json()] for recipe in RECOMPUTED
    ]
    folders |= {name: open_folder(layout(name, *own)) for name in (BASE, *LAYOUTS)}
    file = room / "jobs.json"
    resume = [[str(folders[name]), str(folders[BASE])] for name in LAYOUTS]
    trained = {
        "train": [str(f) for name, f in folders.items() if name not in LAYOUTS],
        "resume": resume,
        "logs": str(room),
    }
    file.write_text(json.dumps({**trained, "compare": compare, "count": count}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.model_worker", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert done.returncode == 0, done.stderr[-2000:]
    for answer in answers:
        assert answer["rc"] == 0, _log(room, answer["name"])
    return folders, {answer["name"]: answer for answer in answers}


def _log(room: Path, name: str) -> str:
    log = Path(name) / "log.txt" if "/" in name else room / f"{name}.txt"
    return f"{name}: " + log.read_text()[-3000:]


Jobs = tuple[dict[str, Path], dict[str, dict[str, Any]]]
each: Callable[..., Any] = pytest.mark.parametrize


@each("recipe", SHIPPED)
@each("precision", ["bf16", "fp8_current"])
def test_a_shipped_model_trains(jobs: Jobs, recipe: str, precision: str) -> None:
    _trained(jobs[0][f"{recipe} {precision}"], in_fp8=precision != "bf16")


@each("recipe", FURTHER)
def test_every_other_architecture_trains_in_mxfp8(jobs: Jobs, recipe: str) -> None:
    _trained(jobs[0][f"{recipe} mxfp8"], in_fp8=True)


def _trained(folder: Path, in_fp8: bool) -> None:
    rows = list(rows_of(folder / "metrics.jsonl"))
    steps, heldout = (
        [row for row in rows if "loss" in row],
        [row["heldout_loss"] for row in rows if "heldout_loss" in row],
    )
    assert status_of(folder) == "done" and [row["step"] for row in steps] == [1, 2, 3]
    assert steps[0]["loss"] == pytest.approx(math.log(512), abs=0.1)  # as if it guessed
    assert heldout[-1] < heldout[0] and all(math.isfinite(row["grad_norm"]) for row in steps)
    planned = fp8_gemms(read_plan(folder))
    assert (planned > 0) == in_fp8 and all(row["fp8_gemms"] == planned for row in steps)


@each("recipe", RECOMPUTED)
def test_megatron_core_runs_the_gemms_that_a_plan_with_recomputation_implies(
    jobs: Jobs, recipe: str
) -> None:
    of_a_step = 4 * (2 * 3 + 2 * 4) * 2  # of 4 layers in FP8 two are recomputed; 2 micro-batches
    assert jobs[1][f"{recipe} recomputed"]["gemms"] == of_a_step == fp8_gemms(recomputed(recipe))


@each("recipe", COMPARED)
def test_logits_are_hugging_faces_within_fp32_rounding(jobs: Jobs, recipe: str) -> None:
    answer = jobs[1][recipe]
    assert answer["apart"] < 2e-5 * answer["scale"] and answer["scale"] > 1, answer


@each("recipe", COMPARED)
def test_parameters_are_as_many_as_hugging_faces_and_as_the_plan_counts(
    jobs: Jobs, recipe: str
) -> None:
    ours, theirs = jobs[1][recipe]["parameters"]
    assert ours == theirs == parameters(plan_of(recipe).model)


def _losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("heldout_loss")) for row in rows]


@each("name", [name for name in LAYOUTS if name != "one process"])
def test_a_split_model_trains_on_to_the_losses_of_one_process(jobs: Jobs, name: str) -> None:
    """From one checkpoint.

    Stages compute what one process does, in its order; two tensor-parallel ranks round each half of
    a sum to BF16.
    """
    one, split = _losses(jobs[0]["one process"]), _losses(jobs[0][name])
    assert len(one) >= 4
    assert split == (pytest.approx(one, rel=1e-4) if "tp" in name else one)
