"""No plan, and no NeMo recipe made of one, asks for a tensor-parallel overlap that its stack cannot
do.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from analysis.predictor.constants import constants
from analysis.predictor.model.cost import LATENCY
from analysis.predictor.model.step import predict
from analysis.predictor.model.work import COLLECTIVES
from launch.__main__ import main
from launch.matrix import MODELS, PRECISIONS, options
from recipes.compose.defaults import fill
from recipes.compose.rules import RULES, model_fits_gpu
from recipes.compose.tree import compose_plan, compose_tree, plan_from_tree
from recipes.errors import InputError
from recipes.estimate.memory import estimate
from recipes.overlap import MXFP8_ROWS, overlaps_tp, resolved
from recipes.plan import Plan

# What each stack's Transformer Engine overlaps where no layer is kept in BF16, read from its source
# by hand: "raises" is what its modules do otherwise.
PER_TENSOR = {"bf16", "fp8_delayed", "fp8_current"}
OVERLAPS = {
    "nemo_25_04": PER_TENSOR,
    "nemo_25_04_te_2_11": PER_TENSOR | {"mxfp8"},
    "nemo_25_07": PER_TENSOR | {"mxfp8"},
    "emulated": {"bf16"},
}
SETTINGS = ("convergence", "throughput", "tuned")
LAYOUTS = ("recommended", "iso")
H100_70B = ["model=llama3_70b", "gpu=h100"]


def _combinations() -> Iterator[Plan]:
    """Yield every plan of model, recipe, GPU, stack, settings and layout that the rules take,
    memory apart.
    """
    parts: dict[str, dict[str, Any]] = {}
    for group, names in (
        ("precision", PRECISIONS),
        ("stack", OVERLAPS),
        ("settings", SETTINGS),
        ("mapping", LAYOUTS),
        ("gpu", _gpus()),
    ):
        parts[group] = {name: compose_tree([f"{group}={name}"])[group] for name in names}
    where = compose_tree(["executor=slurm", "cluster.container_runtime=none"])
    rules = [rule for rule in RULES if rule is not model_fits_gpu]
    for model in MODELS:
        base = {
            **compose_tree([f"model={model}"]),
            "executor": where["executor"],
            "cluster": where["cluster"],
        }
        base = {key: value for key, value in base.items() if key not in ("experiment", "dry_run")}
        for chosen in itertools.product(*parts.values()):
            tree = {
                **base,
                **{group: parts[group][name] for group, name in zip(parts, chosen, strict=True)},
            }
            plan = resolved(plan_from_tree(fill(tree)))
            if not any(rule(plan) for rule in rules):
                yield plan


NO_NVSWITCH = ("gh200", "rtx_pro_6000")


def _gpus() -> list[str]:
    return [name for name in options("gpu") if name != "cpu"]


def _possible(plan: Plan) -> bool:
    """Whether the stack overlaps the plan's number format in every layer, by the table above."""
    fp8, m = plan.precision.fp8, plan.mapping
    if plan.precision.name not in OVERLAPS[plan.stack.name] or plan.gpu.name in NO_NVSWITCH:
        return False
    if fp8 and fp8.first_layers_bf16 + fp8.last_layers_bf16:
        return False
    if m.fsdp and (plan.stack.name != "nemo_25_07" or plan.gpu.compute_capability < "10.0"):
        return False
    return (
        fp8 is None
        or fp8.scaling != "mxfp8"
        or m.micro_batch * plan.seq_length // m.cp // m.tp % MXFP8_ROWS == 0
    )


@pytest.mark.slow
def test_no_legal_combination_asks_for_what_its_stack_cannot_do() -> None:
    seen: Counter[tuple[str, bool]] = Counter()
    for plan in _combinations():
        wanted = plan.mapping.tp > 1 and _possible(plan)
        assert plan.mapping.tp_overlap is overlaps_tp(plan) is wanted, plan
        assert plan.stack.userbuffers and plan.stack.userbuffers.bootstrap == "nccl"
        seen[plan.stack.name, wanted] += 1
    both = {(stack, on) for stack in OVERLAPS for on in (True, False)}
    assert set(seen) == both and min(seen.values()) > 10, seen


@pytest.mark.parametrize(
    ("overrides", "on", "why"),
    [
        (["precision=bf16"], True, None),
        (["precision=bf16", "cluster.mpi=pmi2"], True, None),
        (["precision=bf16", "mapping.tp_overlap=false"], False, "mapping.tp_overlap=false"),
        (["precision=fp8_current"], False, "a layer kept in BF16"),
        (["precision=fp8_current", "settings.bf16_layers=false"], True, None),
        (
            [
                "precision=fp8_current",
                "precision.fp8.first_layers_bf16=0",
                "precision.fp8.last_layers_bf16=0",
            ],
            True,
            None,
        ),
        (
            ["precision=fp8_current", "precision.fp8.first_layers_bf16=0"],
            False,
            "a layer kept in BF16",
        ),
        (["precision=fp8_current", "experiment=throughput"], True, None),
        (["precision=fp8_delayed"], True, None),
        (["precision=fp8_subchannel", "stack=nemo_25_07"], False, "scaled in blocks"),
        (["precision=mxfp8", "gpu=b200"], False, "NotImplementedError"),
        (["precision=mxfp8", "gpu=b200", "stack=nemo_25_07"], True, None),
        (
            ["precision=mxfp8", "gpu=b200", "stack=nemo_25_07", "seq_length=8256", "mapping.cp=1"],
            False,
            "multiples of 128",
        ),
        (["precision=bf16", "gpu=gb300", "mapping.fsdp=false", "mapping.tp=8"], True, None),
        (["precision=bf16", "mapping.fsdp=true", "mapping.pp=1", "mapping.vp=1"], False, "jitter"),
        (["precision=bf16", "+gpu.nvlink_multicast=false"], False, "NVSwitch"),
        (
            ["precision=bf16", "+gpu.nvlink_domain=4", "mapping.tp=8", "mapping.pp=4"],
            False,
            "NVLink domain",
        ),
        (["precision=bf16", "stack.userbuffers=null"], False, "does not say"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_plan_says_whether_it_overlaps_and_why_not(
    overrides: list[str], on: bool, why: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["executor=slurm", "gpu.memory_gb=1000", "cluster.container_runtime=none", *overrides]
    named = [
        o
        for o in H100_70B
        if not (o.startswith("gpu=") and any(x.startswith("gpu=") for x in overrides))
    ]
    assert main([*named, *more, "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)
    found = job["summary"]["tp_overlap"]
    assert job["plan"]["mapping"]["tp_overlap"] is found["on"] is on
    assert found["why_off"] is None if why is None else why in found["why_off"]


def test_the_summary_names_the_reason_where_it_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*H100_70B, "precision=fp8_current", "dry_run=true"]) == 0
    said = capsys.readouterr().err
    assert "TP overlap" in said and "conf/stack/nemo_25_04.yaml" in said
    assert main([*H100_70B, "precision=bf16", "dry_run=true"]) == 0
    assert "TP overlap" not in capsys.readouterr().err


def test_bf16_layers_that_the_settings_would_drop_are_refused() -> None:
    asked = [
        *H100_70B,
        "precision=fp8_current",
        "experiment=throughput",
        "precision.fp8.first_layers_bf16=1",
    ]
    with pytest.raises(InputError, match=r"settings\.bf16_layers=true"):
        compose_plan(asked)
    plan = compose_plan([*asked, "settings.bf16_layers=true"])
    assert (
        plan.precision.fp8 and plan.precision.fp8.first_layers_bf16 == 1 and not overlaps_tp(plan)
    )


@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed"])
def test_without_overlap_messages_are_waited_for_and_buffers_are_free(precision: str) -> None:
    """Forward 2 gathers and 2 scatters, backward 2 gathers of 6 messages have no GEMM beside
    them.
    """
    on = compose_plan([*H100_70B, f"precision={precision}", "experiment=throughput"])
    off = compose_plan(
        [*H100_70B, f"precision={precision}", "experiment=throughput", "mapping.tp_overlap=false"]
    )
    c = constants()
    with_it, without = (predict(plan, c).terms for plan in (on, off))
    gather = 1 if precision.startswith("fp8") else 2
    bare, beside = 2 * gather + 2 * 2 + 2 * gather, 2 * gather + 2 * 2
    micro_batches = on.mapping.global_batch // (on.mapping.micro_batch * on.data_parallel)
    late = (
        micro_batches * on.model.num_layers / on.mapping.pp * sum(COLLECTIVES) * LATENCY
    )  # of every message, hidden or not
    ratio = (without["tp_comm"] - late) / (with_it["tp_comm"] - late)
    assert ratio == pytest.approx((bare / 0.5 + beside) / (bare + beside))
    assert without["gemm"] == with_it["gemm"] and sum(without.values()) > sum(with_it.values())
    buffers = estimate(on).terms["workspace"] - estimate(off).terms["workspace"]
    assert buffers == 10 * 8192 // on.mapping.cp * 8192 * 2  # tokens of a rank, hidden size, BF16
