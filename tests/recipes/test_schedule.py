"""The schedule that a plan takes where it names none: the model's own, as published, and what is
said where it is not.
"""

import json

import pytest

from launch.__main__ import main
from launch.matrix import GPUS, MODELS, PRECISIONS, cell
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.plan import Plan
from recipes.run_folder import comparable, differences

# Peak and final rate, warm-up and tokens per step, as published (sources in conf/model).
PUBLISHED = {
    "llama3_8b": (3e-4, 3e-5, 2000, 4_194_304),
    "llama3_70b": (1.5e-4, 1.5e-5, 2000, 4_194_304),
    "llama31_405b": (8e-5, 8e-7, 8000, 4_194_304),
    "nemotron4_15b": (4.5e-5, 4.5e-5, 500, 1152 * 4096),
    "nemotron4_340b": (1e-4, 1e-5, 500, 2304 * 4096),
}
H100_8B = ["model=llama3_8b", "gpu=h100"]


def rates(plan: Plan) -> tuple[float, float, int]:
    """Return peak, final rate and warm-up of a plan."""
    return plan.train.max_lr, plan.train.min_lr, plan.train.warmup_steps


def shown(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """Return the schedule in the summary of a dry run."""
    assert main(["--json", *overrides]) == 0
    return dict(json.loads(capsys.readouterr().out)[0]["summary"]["schedule"])


@pytest.mark.slow
def test_every_large_model_trains_with_its_published_schedule_under_convergence_settings() -> None:
    for model in MODELS:
        for gpu in GPUS:
            for precision in PRECISIONS:
                names = [
                    f"model={model}",
                    f"gpu={gpu}",
                    f"precision={precision}",
                    "experiment=convergence",
                ]
                if not cell("nemo_25_04", model, precision, gpu, names[3:])["runs"]:
                    continue
                plan = compose_plan(names)
                peak, final, warm_up, tokens = PUBLISHED[model]
                assert (
                    rates(plan) == (peak, final, min(warm_up, 1000))
                    and plan.tokens_per_step == tokens
                ), names


@pytest.mark.parametrize("model", MODELS)
def test_speed_is_measured_with_nvidias_batch(model: str) -> None:
    common = [f"model={model}", "gpu=b200"]
    batches = {"llama31_405b": 64, "nemotron4_15b": 256, "nemotron4_340b": 32}
    for settings in (["experiment=throughput"], ["settings=tuned"]):
        assert compose_plan([*common, *settings]).mapping.global_batch == batches.get(model, 128)


def test_small_models_and_their_experiments_keep_their_schedules() -> None:
    assert rates(compose_plan([])) == rates(compose_plan(["model=llama3_130m"])) == (3e-4, 3e-5, 10)
    assert compose_plan([]).mapping.global_batch == 8
    assert rates(compose_plan(["experiment=demo"])) == (1e-3, 1e-4, 50) and rates(
        compose_plan(["experiment=fig2"])
    ) == (2e-4, 2e-5, 150)


def test_what_the_user_gives_is_kept() -> None:
    plan = compose_plan(
        [*H100_8B, "train.max_lr=1e-4", "mapping.global_batch=128", "train.warmup_steps=7"]
    )
    assert rates(plan) == (1e-4, pytest.approx(1e-5), 7) and plan.mapping.global_batch == 128
    assert rates(compose_plan([*H100_8B, "train.max_lr=1e-4", "train.min_lr=2e-6"]))[:2] == (
        1e-4,
        2e-6,
    )


@pytest.mark.parametrize(
    ("steps", "warm_up"), [(1, 0), (9, 0), (10, 1), (99, 9), (10_000, 1000), (1_000_000, 2000)]
)
def test_a_short_run_warms_up_for_a_tenth_of_its_steps(steps: int, warm_up: int) -> None:
    assert compose_plan([*H100_8B, f"train.max_steps={steps}"]).train.warmup_steps == warm_up
    assert compose_plan([f"train.max_steps={steps}"]).train.warmup_steps == min(warm_up, 10)
    assert (
        compose_plan(
            [*H100_8B, "experiment=throughput", f"train.max_steps={steps}"]
        ).train.warmup_steps
        == warm_up
    )


@pytest.mark.parametrize(
    ("overrides", "batch"),
    [
        ([*H100_8B, "num_gpus=1024"], 512),
        ([*H100_8B, "num_gpus=192"], 480),  # 96 replicas: 480 is nearer to 512 than 576
        ([*H100_8B, "num_gpus=4096"], 2048),  # at least a micro-batch for each of 2,048 replicas
        (
            ["model=llama3_70b", "gpu=h100", "num_gpus=1536"],
            576,
        ),  # 48 replicas, rounds of 4 micro-batches
        ([*H100_8B, "seq_length=4096"], 1024),  # the same tokens
    ],
)
def test_a_batch_that_does_not_divide_becomes_the_nearest_that_does(
    overrides: list[str], batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compose_plan(overrides).mapping.global_batch == batch
    notes = str(shown(overrides, capsys)["differs_from_published"])
    assert ("nearest multiple" in notes) == (batch not in (512, 1024))


def test_the_summary_says_where_the_schedule_is_not_as_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = [*H100_8B, "train.max_steps=100000"]
    assert shown(long, capsys)["differs_from_published"] == []
    notes = shown([*H100_8B, "train.max_lr=1e-3", "mapping.global_batch=128"], capsys)[
        "differs_from_published"
    ]
    assert notes == [
        "peak 0.001, published 0.0003",
        "published warm-up 2,000 (at most a tenth of max_steps is taken)",
        "1,048,576 tokens per step, published 4,194,304",
    ]
    assert main([*long, "dry_run=true"]) == 0
    assert "as published" in capsys.readouterr().err
    assert main(["dry_run=true"]) == 0
    assert "no published schedule" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        "model.convergence.max_lr=0",
        "model.convergence.warmup_steps=many",
        "model.convergence.batch_tokens=0",
    ],
)
def test_a_wrong_published_schedule_names_its_key(wrong: str) -> None:
    with pytest.raises(InputError, match=wrong.partition("=")[0]):
        compose_plan([*H100_8B, wrong])


def test_plans_from_before_models_had_schedules_are_still_compared() -> None:
    plan = compose_plan(H100_8B)
    old = plan.model_dump()
    del old["model"]["convergence"], old["settings"]["batch"]
    assert differences(comparable(Plan.model_validate(old)), comparable(plan)) == []
