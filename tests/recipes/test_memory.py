"""The memory estimate: against a case counted by hand, against what NVIDIA ran and avoided, against
measured peaks.
"""

import csv
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.compose.defaults import fill, recommended
from recipes.compose.fit import ESTIMATE_ERROR, WORST_MEASURED, fits, margin
from recipes.compose.rules import model_fits_gpu as does_not_fit
from recipes.compose.tree import compose_plan, compose_tree, plan_from_tree
from recipes.estimate import memory
from recipes.estimate.memory import estimate, layer_bytes_per_token, usable_gb
from recipes.measure.memory import PEAKS, summary, validation
from recipes.measure.memory import main as command
from recipes.plan import Plan

TINY = [
    *(
        "model=llama3_tiny",
        "gpu=h100",
        "mapping=single",
        "num_gpus=2",
        "data=mock",
        "mapping.micro_batch=1",
        "mapping.global_batch=2",
    ),
    *(
        "model.num_layers=2",
        "model.hidden_size=256",
        "model.ffn_hidden_size=512",
        "model.num_attention_heads=4",
        "model.num_query_groups=2",
    ),
    *("model.vocab_size=1000", "seq_length=1024"),
]
LARGE = ["model=llama3_70b", "gpu=h100", "settings=throughput", "data=mock"]
FSDP = [
    "mapping.fsdp=true",
    "mapping.pp=1",
    "mapping.cp=1",
    "mapping.vp=1",
    "mapping.cuda_graphs=false",
]
FP8 = ("fp8_delayed", "fp8_current", "mxfp8", "fp8_subchannel")


def plan_of(*overrides: str) -> Plan:
    """Return the plan without the rules: what is refused has a memory too."""
    return plan_from_tree(
        fill(
            {k: v for k, v in compose_tree(overrides).items() if k not in ("experiment", "dry_run")}
        )
    )


def terms(*overrides: str) -> dict[str, float]:
    return estimate(plan_of(*overrides)).terms


# ------------------------------------------------------------------------------------------ by hand


def test_a_small_model_counted_by_hand() -> None:
    """2 layers, 256 wide: q and out 256x256 each, k and v 256x128 each, three 256x512; 1000 x 256
    twice.
    """
    matrices, norms, tables = (
        2 * (2 * 65536 + 2 * 32768 + 3 * 131072),
        2 * 2 * 256 + 256,
        2 * 1000 * 256,
    )
    parameters = matrices + norms + tables
    layer = (
        2 * 256 * 4 + (4 + 2) * 2 * 64 * 2 + 4 * 4 + 2 * 1024 + 512 * 2
    )  # norms; q, o, k, v and statistics; fc1 out; fc2 in
    got = terms(*TINY)
    assert got["weights"] == 2 * parameters
    assert got["gradients"] == 4 * parameters  # settings=convergence reduces in FP32
    assert got["optimizer"] == 12 * parameters / 2  # over two data-parallel ranks
    assert got["activations"] == 2 * 1024 * layer
    assert got["logits"] == 1024 * (1000 * 10 + 2 * 2 * 256)
    assert got["fp8_weights"] == got["gathered"] == 0


def test_fp8_by_hand() -> None:
    """Linear inputs become a byte, and the projection keeps its own copy; weights are FP8 and a
    transpose on Hopper.
    """
    layer = 2 * 256 * 3 + (4 + 2) * 2 * 64 * 2 + 4 * 4 + 256 + 2 * 1024 + 512
    got = terms(*TINY, "precision=fp8_delayed", "precision.fp8.param_gather=true")
    matrices = 2 * (2 * 65536 + 2 * 32768 + 3 * 131072)
    assert got["activations"] == 2 * 1024 * layer
    assert got["fp8_weights"] == 2 * matrices
    assert got["weights"] == 2 * (2 * 2 * 256 + 256 + 2 * 1000 * 256)


@pytest.mark.parametrize(
    ("precision", "gpu", "gather", "bytes_fp8", "bytes_bf16"),
    [
        ("fp8_delayed", "h100", "true", 2, 0),
        ("fp8_delayed", "h100", "false", 2, 2),
        ("fp8_delayed", "b200", "true", 1, 0),
        ("mxfp8", "b200", "false", 2 + 2 / 32, 2),
        ("fp8_subchannel", "h100", "false", 2 + 8 / 128**2, 2),
    ],
)
def test_bytes_of_a_weight_per_recipe(
    precision: str, gpu: str, gather: str, bytes_fp8: float, bytes_bf16: float
) -> None:
    """Transformer Engine issue 1880, a maintainer: Blackwell FP8 1 byte, MXFP8 2, Hopper FP8 2;
    beside BF16 unless parameters are FP8.
    """
    got = terms(
        *TINY, f"gpu={gpu}", f"precision={precision}", f"precision.fp8.param_gather={gather}"
    )
    matrices, rest = 2 * (2 * 65536 + 2 * 32768 + 3 * 131072), 2 * 2 * 256 + 256 + 2 * 1000 * 256
    assert got["fp8_weights"] == pytest.approx(bytes_fp8 * matrices)
    assert got["weights"] == pytest.approx(bytes_bf16 * matrices + 2 * rest)


# ---------------------------------------------------------------------------------- what NVIDIA ran


def published() -> Iterator[tuple[str, Plan]]:
    """Yield NVIDIA's recommended layouts as their scripts run them; with FP8 and FSDP, parameters
    are FP8 (NeMo pull request 13383).
    """
    for row in recommended():
        precisions = {"bf16": ["bf16"], "fp8": ["fp8_delayed", "fp8_current"]}.get(row["dtype"], [])
        for precision in precisions if row["nemo_ref"] in ("v2.3.0", "v2.4.0") else []:
            stack = "nemo_25_04" if row["nemo_ref"] == "v2.3.0" else "nemo_25_07"
            sizes = [
                f"mapping.{key}={row[key] or 1}"
                for key in ("tp", "pp", "cp", "vp", "micro_batch", "global_batch")
            ]
            layers = [
                f"mapping.{key}={row[key] or 0}" for key in ("recompute_layers", "offload_layers")
            ]
            flags = [
                f"mapping.{key}={str(row[key] == '1').lower()}" for key in ("fsdp", "cuda_graphs")
            ]
            axes = [
                f"model={row['model']}",
                f"gpu={row['gpu']}",
                f"precision={precision}",
                f"stack={stack}",
                f"num_gpus={row['num_gpus']}",
            ]
            gather = ["precision.fp8.param_gather=true"] if precision != "bf16" else []
            yield (
                f"{row['nemo_ref']}-{row['model']}-{row['gpu']}-{precision}",
                plan_of(*axes, *sizes, *layers, *flags, *gather, "settings=throughput"),
            )


PUBLISHED = list(published())


def test_there_are_published_layouts_for_all_models_and_gpus() -> None:
    assert {
        (plan.model.name, plan.gpu.name) for name, plan in PUBLISHED if name.startswith("v2.3.0")
    } == set(
        itertools.product(
            ("llama3_8b", "llama3_70b", "llama31_405b", "nemotron4_15b", "nemotron4_340b"),
            ("h100", "b200", "gb200"),
        )
    )


@pytest.mark.parametrize(
    "plan", [plan for _, plan in PUBLISHED], ids=[name for name, _ in PUBLISHED]
)
def test_what_nvidia_ran_fits(plan: Plan) -> None:
    assert does_not_fit(plan) is None


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ["model=llama3_8b", "gpu=h100", "mapping.cp=1"],
            id="8B BF16 on H100: NVIDIA splits the sequence in two",
        ),
        pytest.param(
            ["model=llama3_70b", "gpu=gb200", "mapping.recompute_layers=0"],
            id="70B BF16 on GB200: NVIDIA recomputes 10 layers",
        ),
        pytest.param(
            ["model=llama3_8b", "gpu=gb200", "mapping.micro_batch=4"],
            id="8B BF16 on GB200: NVIDIA takes micro-batch 2, FP8 4",
        ),
        pytest.param(
            ["model=llama3_8b", "gpu=gb200", "precision=mxfp8", "mapping.micro_batch=4"],
            id="8B MXFP8 on GB200: micro-batch 2, FP8 4",
        ),
        pytest.param(
            ["model=llama3_70b", "gpu=gb200", "precision=mxfp8", *FSDP, "mapping.tp=1"],
            id="70B MXFP8 on GB200: no FSDP",
        ),
        pytest.param(
            ["model=llama31_405b", "gpu=gb200", "precision=mxfp8", *FSDP, "mapping.tp=4"],
            id="405B MXFP8 on GB200: no FSDP",
        ),
    ],
)
def test_what_nvidia_avoided_does_not_fit(overrides: list[str]) -> None:
    plan = plan_of(*overrides, "settings=throughput", "data=mock")
    assert estimate(plan).total_gb > (usable_gb(plan) or 0)


# --------------------------------------------------------------------------- against measured peaks


RESULTS = Path(__file__).parents[2] / "analysis" / "results"
MEASURED = ("fig2_h200", "fig3_h200", "llama3_8b_h200", "tuning_h200")
RUNS = [run for name in MEASURED for run in sorted((RESULTS / name).iterdir())]
Rows = list[dict[str, str | float]]


@pytest.fixture(scope="module")
def compared() -> Rows:
    """Return the rows of peak_memory.csv and of every shipped run on a GPU."""
    return validation(RUNS)


def test_whole_steps_are_predicted_within_half_a_percent(compared: Rows) -> None:
    """NeMo and Transformer Engine on one GPU: six models, five recipes, micro-batches 1, 2 and
    32.
    """
    found = [row for row in compared if row["kind"] == "measured"]
    emulated = [row for row in found if row["precision"] == "mxfp8"]
    assert (len(found), len(emulated)) == (74, 3)
    assert max(abs(float(row["error"])) for row in found if row not in emulated) <= 0.005
    assert max(abs(float(row["error"])) for row in emulated) <= 0.02


def test_the_margin_is_that_of_the_worst_measured_error(compared: Rows) -> None:
    """WORST_MEASURED is the worst error, rounded up to half a percent: a better or worse estimate
    moves it.

    Left out: peaks without CUDA graphs' pools, and those that another stack published.
    """
    kinds = ("measured", "measured without step")
    errors = [abs(float(row["error"])) for row in compared if row["kind"] in kinds]
    assert len(errors) == 82
    assert WORST_MEASURED - 0.005 < max(errors) <= WORST_MEASURED
    assert 2 * max(errors) <= ESTIMATE_ERROR


def test_context_parallelism_leaves_a_larger_margin() -> None:
    one, two = (plan_of(*LARGE, f"mapping.cp={cp}", "num_gpus=64") for cp in (1, 2))
    assert margin(one) == ESTIMATE_ERROR and margin(two) >= 0.065


def test_stand_ins_for_weight_gradients_stay_from_transformer_engine_2_3_on() -> None:
    """A layer's matrices in BF16; none before, under FSDP, or without the fusion."""
    base = [*LARGE, "model.num_layers=2", "mapping=single", "num_gpus=1"]
    later, none = [*base, "stack=nemo_25_07"], "settings.gradient_accumulation_fusion=false"
    matrices = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672
    assert terms(*later)["gradients"] - terms(*later, none)["gradients"] == 2 * matrices
    without = terms(*later, none)["gradients"]
    assert terms(*base)["gradients"] == terms(*base, none)["gradients"] == without
    fsdp = [*later, "mapping.fsdp=true", "num_gpus=2"]
    assert terms(*fsdp)["gradients"] == terms(*fsdp, none)["gradients"]


def test_several_sequences_a_micro_batch_copy_attention_in_bf16() -> None:
    """Until Megatron-Core 0.13; a projection in FP8 has a copy of its own anyway."""
    two = [*TINY, "mapping.micro_batch=2", "mapping.global_batch=4"]
    for stack in ("stack=nemo_25_04", "stack=nemo_25_07"):
        more = terms(*two, stack)["activations"] - 2 * terms(*TINY, stack)["activations"]
        assert more == 2 * 2 * 1024 * 256 * 2  # two layers, two sequences of 1024, 256 wide
    fp8 = ["precision=fp8_delayed"]
    assert terms(*two, *fp8)["activations"] == 2 * terms(*TINY, *fp8)["activations"]


def test_a_layer_more_costs_what_is_predicted() -> None:
    """NeMo on one H100: 2 and 6 layers tell the cost of a layer from what does not depend on the
    depth.
    """
    rows = [row for row in validation() if row["kind"] == "measured"]
    for precision in ("fp8_delayed", "fp8_current", "fp8_subchannel"):
        shallow, deep = sorted(
            (row for row in rows if row["precision"] == precision),
            key=lambda row: float(row["peak_gb"]),
        )
        measured, predicted = (
            float(deep[key]) - float(shallow[key]) for key in ("peak_gb", "predicted_gb")
        )
        assert predicted == pytest.approx(measured, rel=0.01)


def test_every_reference_row_says_where_it_comes_from() -> None:
    with PEAKS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(
        row["kind"] in ("published", "measured", "measured without step")
        and row["source"]
        and row["note"]
        for row in rows
    )
    assert len(validation()) == len(rows)


def test_the_validation_ends_with_a_summary_and_cuts_no_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command([]) == 0
    printed, rows = capsys.readouterr().out, validation()
    assert all(word in printed for row in rows for word in str(row["note"]).split())
    assert printed.splitlines()[-3:] == summary(rows)
    planted = [{"kind": "measured", "error": error} for error in (0.01, -0.06, 0.02)]
    assert summary(planted) == [
        "measured: mean size of the error 3.0%, largest -6.0%, 2 of 3 within 5%"
    ]


# --------------------------------------------------------------------------------------- properties


ONE_GPU = ["gpu=b200", "num_gpus=1", "mapping=single", "data=mock", "settings=throughput"]


def layer_of(model: str, **changed: object) -> float:
    """Return bytes a token that a layer of a model keeps, in BF16, with some fields of the model
    changed.
    """
    plan = plan_of(
        f"model={model}",
        *ONE_GPU,
        *(["stack=nemo_25_07"] if model == "qwen3_8b" else []),
        "mapping.micro_batch=1",
    )
    return layer_bytes_per_token(
        plan.model_copy(update={"model": plan.model.model_copy(update=changed)}), in_fp8=False
    )


def test_attention_with_a_softcap_keeps_its_scores() -> None:
    """Gemma 2 9B, 16 heads over 4,096 places: two BF16 matrices of scores, and keys and values
    repeated from 8 to 16 heads.
    """
    kept = layer_of("gemma2_9b") - layer_of("gemma2_9b", attention_softcap=None)
    assert kept == 2 * 2 * 16 * 4096 + 2 * 2 * 8 * 256
    assert (
        40e9
        < 42 * 4096 * 2 * 2 * 16 * 4096
        < terms("model=gemma2_9b", *ONE_GPU, "mapping.micro_batch=1")["activations"]
    )


def test_what_other_models_keep_beyond_a_llama() -> None:
    gemma, qwen3, mistral = 2 * 2 * 3584, 2 * 128 * (32 + 8), 2 * 14336
    assert layer_of("gemma2_9b") - layer_of("gemma2_9b", post_norms=False) == gemma
    assert layer_of("qwen3_8b") - layer_of("qwen3_8b", qk_norm=False) == qwen3
    assert layer_of("mistral_7b") - layer_of("mistral_7b", fused_activation=True) == mistral
    assert layer_of("llama2_7b", num_query_groups=8) == layer_of(
        "llama2_7b", num_query_groups=8, head_size=128
    )


def test_learned_positions_and_biases_are_weights() -> None:
    gpt = plan_of(
        "model=llama3_8b",
        "model.nemo_recipe=gpt3_175b",
        "model.activation=gelu",
        *ONE_GPU,
        "seq_length=2048",
    )
    plain = gpt.model_copy(
        update={"model": gpt.model.model_copy(update={"position_embedding": "rope"})}
    )
    bare = gpt.model_copy(
        update={"model": gpt.model.model_copy(update={"linear_bias": False, "qkv_bias": False})}
    )
    weights = estimate(gpt).terms["weights"]
    assert weights - estimate(plain).terms["weights"] == 2 * 2048 * 4096
    assert weights - estimate(bare).terms["weights"] == 2 * 32 * (6144 + 4096 + 14336 + 4096)


@pytest.mark.parametrize(("axis", "values"), [("tp", (1, 2, 4, 8)), ("pp", (1, 2, 4, 8))])
@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed"])
def test_splitting_the_model_never_needs_more(
    axis: str, values: tuple[int, ...], precision: str
) -> None:
    base = [
        *LARGE,
        "mapping.tp=1",
        "mapping.pp=1",
        "mapping.cp=1",
        "mapping.vp=1",
        "num_gpus=64",
        f"precision={precision}",
    ]
    got = [terms(*base, f"mapping.{axis}={value}") for value in values]
    for less, more in itertools.pairwise(got):
        assert all(more[term] <= less[term] for term in ("weights", "fp8_weights", "gradients"))


@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_more_replicas_never_need_more(fsdp: str) -> None:
    base = [
        *LARGE,
        "mapping.pp=1",
        "mapping.vp=1",
        "mapping.cp=1",
        f"mapping.fsdp={fsdp}",
        "mapping.global_batch=1024",
    ]
    got = [terms(*base, f"num_gpus={n}") for n in (8, 16, 64, 512)]
    for less, more in itertools.pairwise(got):
        assert more["optimizer"] < less["optimizer"]
        assert (
            (more["weights"] < less["weights"])
            == (more["gradients"] < less["gradients"])
            == (fsdp == "true")
        )


def test_context_parallelism_shares_activations_and_optimizer_state() -> None:
    one, two = (terms(*LARGE, f"mapping.cp={cp}", "num_gpus=64") for cp in (1, 2))
    assert two["activations"] == pytest.approx(one["activations"] / 2)
    assert (
        two["optimizer"] == one["optimizer"]
    )  # shared over data- and context-parallel ranks: as many as before


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_recomputation_needs_less(layers: int) -> None:
    assert (
        terms(*LARGE, f"mapping.recompute_layers={layers}")["activations"]
        < terms(*LARGE, f"mapping.recompute_layers={layers - 1}")["activations"]
    )


@pytest.mark.parametrize("precision", FP8)
def test_fp8_weights_only_with_fp8(precision: str) -> None:
    assert terms(*TINY)["fp8_weights"] == 0
    fp8 = terms(
        *TINY,
        f"precision={precision}",
        "precision.fp8.first_layers_bf16=0",
        "precision.fp8.last_layers_bf16=0",
    )
    assert fp8["fp8_weights"] > 0
    assert fp8["activations"] < terms(*TINY)["activations"]


def test_bf16_layers_have_no_fp8_copies() -> None:
    all_fp8 = terms(
        *TINY,
        "precision=fp8_current",
        "precision.fp8.first_layers_bf16=0",
        "precision.fp8.last_layers_bf16=0",
    )
    half = terms(
        *TINY,
        "precision=fp8_current",
        "precision.fp8.first_layers_bf16=1",
        "precision.fp8.last_layers_bf16=0",
    )
    assert half["fp8_weights"] == all_fp8["fp8_weights"] / 2


def test_copies_of_bf16_weights_are_whole_under_fsdp() -> None:
    """Transformer Engine caches them in the module (module/base.py, get_weight_workspace), where no
    sharding reaches.
    """
    fsdp = [*TINY, "mapping.fsdp=true", "precision=fp8_delayed"]
    copies, primary = (
        terms(*fsdp, f"precision.fp8.param_gather={gather}")["fp8_weights"]
        for gather in ("false", "true")
    )
    assert (
        copies == 2 * 2 * primary
    )  # two ranks, and a transpose that FSDP drops where parameters are FP8


@pytest.mark.parametrize(
    ("overrides", "stage", "expected"),
    [
        (["mapping.pp=4", "mapping.vp=1"], 0, [4]),
        (["mapping.pp=4", "mapping.vp=1"], 3, [1]),
        (["mapping.pp=4", "mapping.vp=5"], 0, [7, 4, 4, 4, 4]),  # 2 * 3 + 4 * 4 + 1
        (["mapping.pp=4", "mapping.vp=5"], 3, [4, 4, 4, 4, 1]),
        (
            ["mapping.pp=4", "mapping.vp=1", "mapping.global_batch=4"],
            0,
            [2],
        ),  # two micro-batches a replica in all
    ],
)
def test_micro_batches_in_flight(overrides: list[str], stage: int, expected: list[int]) -> None:
    assert memory.in_flight(plan_of(*LARGE, *overrides), stage) == expected


def test_all_layers_are_on_some_stage() -> None:
    for _, plan in PUBLISHED:
        chunks = [
            chunk
            for stage in range(plan.mapping.pp)
            for chunk in memory.layers_by_chunk(plan, stage)
        ]
        assert sum(map(len, chunks)) == plan.model.num_layers


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "largest", "remedy"),
    [
        (
            [
                "model=llama3_8b",
                "gpu=h100",
                "mapping.cp=1",
                "mapping.micro_batch=2",
                "settings=throughput",
            ],
            "activations",
            "mapping.recompute_layers=",
        ),
        (
            [
                "model=llama3_70b",
                "gpu=h100",
                "mapping=single",
                "num_gpus=64",
                "mapping.global_batch=256",
            ],
            "activations",
            "mapping.tp=",
        ),
        (
            ["model=llama3_70b", "gpu=h100", "mapping=single", "num_gpus=1", "mapping.fsdp=true"],
            "optimizer",
            "num_gpus=",
        ),
        (
            ["model=llama31_405b", "gpu=h100", "mapping=single", "num_gpus=1"],
            "optimizer",
            "smaller model",
        ),
    ],
)
def test_a_refusal_names_the_largest_term_and_a_way_out(
    overrides: list[str], largest: str, remedy: str
) -> None:
    plan = plan_of(*overrides, "data=mock")
    sentence = does_not_fit(plan)
    assert sentence and "\n" not in sentence
    assert f"{largest} alone" in sentence and remedy in sentence


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=llama3_8b", "gpu=h100", "mapping.cp=1", "mapping.micro_batch=2"],
        [*LARGE, "mapping.pp=1", "mapping.vp=1", "num_gpus=16"],
    ],
)
def test_the_way_out_fits(overrides: list[str]) -> None:
    base = [*overrides, "settings=throughput"]
    sentence = does_not_fit(plan_of(*base))
    assert sentence
    remedy = sentence.split("; use ")[1].split(" (about")[0].split()
    names = {word.split("=")[0] for word in remedy}
    assert fits(plan_of(*(word for word in base if word.split("=")[0] not in names), *remedy))


def test_a_device_of_unknown_memory_fits_everything() -> None:
    assert fits(plan_of("model=llama31_405b", "gpu=cpu", "mapping=single"))


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, recipes.estimate.memory; sys.exit(any(name in sys.modules for name in"
        " ('torch', 'nemo', 'megatron')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_emulated_fp8_keeps_bf16_copies_of_what_hardware_keeps_in_fp8() -> None:
    common = [
        "model=llama3_8b",
        "gpu=h200",
        "mapping=single",
        "num_gpus=8",
        "mapping.micro_batch=1",
        "mapping.global_batch=8",
        "executor=local",
    ]
    stacks = {
        "bf16": ("emulated", "bf16"),
        "emulated": ("emulated", "fp8_current"),
        "hardware": ("nemo_25_04_te_2_11", "fp8_current"),
    }
    off = ["precision.fp8.param_gather=false"]
    found = {
        name: (
            estimate(
                compose_plan(
                    [
                        *common,
                        f"stack={stack}",
                        f"precision={precision}",
                        *(off if precision != "bf16" else []),
                    ]
                )
            ).terms
        )
        for name, (stack, precision) in stacks.items()
    }
    assert (
        found["hardware"]["activations"]
        < found["bf16"]["activations"]
        < found["emulated"]["activations"]
    )
    assert (
        found["bf16"]["fp8_weights"] == 0
        and found["emulated"]["fp8_weights"] == found["hardware"]["fp8_weights"]
    )
    assert (
        found["emulated"]["workspace"]
        > found["hardware"]["workspace"]
        == found["bf16"]["workspace"]
    )
