"""The cost model: counts against hand calculations and both FLOPs conventions, and what must hold
whatever its constants are.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from analysis.predictor.calibration.gemm_efficiency import fitted
from analysis.predictor.calibration.published_steps import rows
from analysis.predictor.forecast import compose, forecast
from analysis.predictor.model.cost import (
    GRAPHED_GAP,
    HIDDEN_EXPOSED,
    KNOWN,
    NAMES,
    PRIOR,
    Constants,
    seconds,
    waiting,
)
from analysis.predictor.model.gemm import measured
from analysis.predictor.model.hardware import Hardware, domains, hardware, ring_bandwidth
from analysis.predictor.model.step import TERMS, Stage, count, predict, price
from analysis.predictor.model.work import (
    BACKWARD_ATTENTION,
    KERNELS,
    KERNELS_FP8,
    layer,
    step,
    vocabulary,
)
from analysis.speed.layer import load as layer_profile
from recipes.compose.tree import CONF, compose_plan
from recipes.errors import InputError
from recipes.estimate.flops import attention_flops_per_token, flops_per_token
from recipes.plan import Plan
from recipes.run_folder import comparable, differences, read_plan

RESULTS = Path(__file__).parents[2] / "analysis" / "results"
MEASURED = RESULTS / "llama3_8b_h100" / "llama3_8b.bf16.layers2"
FASTER = ("bf16", "fp8", "memory", "nvlink", "network", "power")
CELLS = [
    ("llama3_8b", "bf16", "h100"),
    ("llama3_70b", "fp8_current", "h100"),
    ("llama31_405b", "fp8_delayed", "gb200"),
    ("nemotron4_340b", "mxfp8", "b200"),
    ("llama3_70b", "bf16", "gb200"),
]


def plan_of(model: str, precision: str = "bf16", gpu: str = "h100", *more: str) -> Plan:
    return compose_plan(
        [f"model={model}", f"precision={precision}", f"gpu={gpu}", "experiment=throughput", *more]
    )


def test_terms_are_not_negative_and_add_up() -> None:
    for row in rows():
        found = predict(row.plan, PRIOR)
        assert set(found.terms) == set(TERMS) and min(found.terms.values()) >= 0, row
        assert found.step_time_s == pytest.approx(sum(found.terms.values()), rel=1e-12)
        assert found.tokens_per_s_per_gpu * found.step_time_s * row.plan.num_gpus == pytest.approx(
            row.plan.tokens_per_step
        )


@pytest.mark.parametrize("what", FASTER)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_faster_hardware_is_never_slower(cell: tuple[str, str, str], what: str) -> None:
    plan = plan_of(*cell)
    hw = hardware(plan.gpu)
    times = [
        sum(price(count(plan, replace(hw, **{what: getattr(hw, what) * factor})), PRIOR).values())
        for factor in (0.5, 1, 2, 8)
    ]
    assert times == sorted(times, reverse=True)
    if what == "bf16":
        assert times[0] > times[-1]


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_matters_and_in_its_direction(name: str) -> None:
    """Shares of a peak make steps shorter, exposed shares and overheads longer; each moves at least
    one published row.
    """
    slower = {"sustained", "attention", "memory", "blackwell", "mxfp8"}
    more = replace(PRIOR, **{name: getattr(PRIOR, name) * 1.1})
    found = [row for row in rows() if row.held == "fit"]
    changes = [
        predict(row.plan, more).step_time_s - predict(row.plan, PRIOR).step_time_s for row in found
    ]
    assert (
        (max(changes) <= 1e-9 and min(changes) < 0)
        if name in slower
        else (min(changes) >= -1e-9 and max(changes) > 0)
    )


@pytest.mark.parametrize(
    ("pp", "vp", "micro_batches"), [(4, 1, 8), (8, 1, 8), (8, 5, 64), (4, 12, 8)]
)
def test_bubble_is_that_of_the_formula(pp: int, vp: int, micro_batches: int) -> None:
    """(pp - 1) / (vp m) of the time without it, where stages are equal (arXiv 2104.04473, 2.2):
    3/8, 7/8, 7/320, 1/32.
    """
    plan = plan_of("llama3_70b")
    counted = replace(
        count(plan),
        stages=(Stage(10, 0, 0, False, False),) * pp,
        pp=pp,
        vp=vp,
        micro_batches=micro_batches,
    )
    counted = replace(counted, once={counted.stages[0]: next(iter(counted.once.values()))})
    terms = price(counted, replace(PRIOR, stragglers=0.0))
    in_stage = sum(
        terms[name]
        for name in (
            "gemm",
            "casts",
            "attention",
            "elementwise",
            "vocabulary",
            "recompute",
            "tp_comm",
            "cp_comm",
            "launch",
        )
    )
    assert terms["bubble"] / in_stage == pytest.approx((pp - 1) / (vp * micro_batches))


def test_no_pipeline_no_bubble_and_one_gpu_does_not_talk() -> None:
    terms = predict(
        plan_of(
            "llama3_8b",
            "bf16",
            "h200",
            "num_gpus=1",
            "mapping=single",
            "mapping.micro_batch=1",
            "model.num_layers=4",
        ),
        PRIOR,
    ).terms
    assert [
        terms[name]
        for name in (
            "bubble",
            "tp_comm",
            "cp_comm",
            "pp_comm",
            "dp_comm",
            "recompute",
            "casts",
            "stragglers",
        )
    ] == [0.0] * 8


@pytest.mark.parametrize("model", ["llama3_8b", "nemotron4_15b"])
def test_counted_operations_are_the_model_flops(model: str) -> None:
    """GEMMs and attention of one GPU's micro-batch, against recipes.estimate.flops, where
    attention's backward pass is twice its forward.
    """
    plan = plan_of(model, "bf16", "b200")
    hw, gemms, tokens = hardware(plan.gpu), measured(), plan.mapping.micro_batch * plan.seq_length
    block, head = layer(plan, hw, gemms, in_fp8=False), vocabulary(plan, hw, gemms)
    at_peak = hw.bf16 * gemms.share["bf16"]
    multiplied = (
        plan.model.num_layers * (block.forward.gemm + block.backward.gemm)
        + head.forward.gemm
        + head.backward.gemm
    )
    attention = plan.model.num_layers * block.forward.attention * hw.bf16 * 3
    counted = (multiplied * at_peak + attention) / tokens
    assert counted == pytest.approx(
        flops_per_token(plan.model, plan.seq_length, causal=True), rel=1e-9
    )
    full = counted + plan.model.num_layers * 3 * attention_flops_per_token(
        plan.model, plan.seq_length, causal=True
    )
    assert full == pytest.approx(
        flops_per_token(plan.model, plan.seq_length, causal=False), rel=1e-9
    )
    assert block.backward.attention == pytest.approx(BACKWARD_ATTENTION * block.forward.attention)


def test_tensor_and_context_parallel_ranks_share_the_work() -> None:
    """Of a layer's multiplications and attention, tp x cp ranks do a share each, and nothing is
    lost.
    """
    more = [
        "mapping.tp=4",
        "mapping.cp=2",
        "mapping.pp=1",
        "mapping.vp=1",
        "num_gpus=64",
        "mapping.fsdp=true",
        "mapping.recompute_layers=80",
    ]
    plan = plan_of("llama3_70b", "bf16", "gb200", *more)
    alone = plan.model_copy(update={"mapping": plan.mapping.model_copy(update={"tp": 1, "cp": 1})})
    hw, gemms = hardware(plan.gpu), measured()
    split, whole = (layer(p, hw, gemms, in_fp8=False) for p in (plan, alone))
    for one, other in ((split.forward, whole.forward), (split.backward, whole.backward)):
        assert (one.gemm * 8, one.attention * 8) == pytest.approx((other.gemm, other.attention))
        assert one.tp_bare > 0 and one.cp > 0 and other.tp == other.tp_bare == other.cp == 0


def test_fp8_casts_by_hand() -> None:
    """Llama 3 8B, current scaling, one token: six bytes for each element of four inputs and four
    gradients.
    """
    plan = plan_of("llama3_8b", "fp8_current", "b200")
    work = layer(plan, hardware(plan.gpu), measured(), in_fp8=True)
    tokens = plan.mapping.micro_batch * plan.seq_length
    h, f, kv = 4096, 14336, 1024
    assert work.forward.cast_bytes == 6 * tokens * (3 * h + f)
    assert work.backward.cast_bytes == 6 * tokens * ((h + 2 * kv) + h + 2 * f + h)
    assert layer(plan, hardware(plan.gpu), measured(), in_fp8=False).forward.cast_bytes == 0


def test_data_parallel_messages_by_hand() -> None:
    """Llama 3 8B on 16 H100s, two nodes: the ring crosses them over the 8 adapters of a node;
    parameters travel in BF16, and in FP8 half.
    """
    plan = plan_of("llama3_8b", "bf16", "h100", "num_gpus=16")
    hw = hardware(plan.gpu)
    parameters = 32 * (4096 * 4096 * (2 + 0.5) + 3 * 4096 * 14336) + 2 * 128256 * 4096
    found = step(plan, hw, 32, 0, 2)
    assert (
        found.gather == pytest.approx(2 * parameters * 15 / 16 / 400e9, rel=1e-3)
        and found.domains == 2
    )
    fp8 = step(plan_of("llama3_8b", "fp8_delayed", "h100", "num_gpus=16"), hw, 32, 32, 2)
    assert found.gather > fp8.gather > found.gather / 2 and fp8.reduce == found.reduce


def test_rings_and_domains() -> None:
    hw = hardware(plan_of("llama3_8b").gpu)
    assert (
        ring_bandwidth(hw, 8, 1) == hw.nvlink == 450e9
        and ring_bandwidth(hw, 2, 8) == hw.network == 50e9
    )
    assert ring_bandwidth(hw, 16, 1) == 400e9 and (domains(hw, 8, 1), domains(hw, 2, 8)) == (1, 2)
    rack = hardware(plan_of("llama3_8b", "bf16", "gb200").gpu)
    assert ring_bandwidth(rack, 64, 1) == rack.nvlink and rack.domain == 72


def test_fsdp_gathers_hide_behind_computation_until_they_do_not() -> None:
    plan = plan_of("llama3_70b", "fp8_current", "gb200")
    hw = hardware(plan.gpu)
    assert plan.mapping.fsdp
    fast, slow = (
        price(count(plan, replace(hw, nvlink=hw.nvlink * factor)), PRIOR) for factor in (1, 0.05)
    )
    assert fast["dp_comm"] < 0.15 * sum(fast.values()) and slow["dp_comm"] > 0.5 * sum(
        slow.values()
    )


def test_data_parallel_messages_hide_behind_the_micro_batches_beside_them() -> None:
    """As long as they are shorter; interleaved stages have more of these micro-batches, and a
    longer message is waited for.
    """
    counted = count(plan_of("llama31_405b", "fp8_current", "h100"))
    once = next(iter(counted.once.values()))
    assert counted.pp > 1 and counted.vp > 1

    def waited(factor: float, vp: int) -> float:
        longer = {
            stage: replace(step, reduce=step.reduce * factor, gather=step.gather * factor)
            for stage, step in counted.once.items()
        }
        return price(replace(counted, once=longer, vp=vp), replace(PRIOR, scale=0.0))["dp_comm"]

    short = waited(0.01, counted.vp)
    assert short == pytest.approx(
        HIDDEN_EXPOSED * 0.01 * (once.reduce + once.gather) / 0.8, rel=0.1
    )
    assert waited(20, counted.vp) > 20 * 100 * short and waited(20, 1) > waited(20, counted.vp)


def test_blackwell_ultra_has_faster_attention_and_the_rest_as_before() -> None:
    gb200, gb300 = (
        layer(
            plan_of("llama3_8b", "bf16", gpu, "stack=nemo_25_07"),
            hardware(plan_of("llama3_8b", "bf16", gpu, "stack=nemo_25_07").gpu),
            measured(),
            False,
        )
        for gpu in ("gb200", "gb300")
    )
    assert gb200.forward.attention / gb300.forward.attention == pytest.approx(4 / 3)
    assert gb200.backward.attention / gb300.backward.attention == pytest.approx(7 / 6)
    assert gb200.forward.gemm == gb300.forward.gemm


def test_long_sequences_have_wider_intervals() -> None:
    """Attention is a larger share of such a step than of any row that chooses, and known less."""
    widths = []
    for seq_length in (8192, 131072):
        found = forecast(
            compose(
                [
                    "model=llama3_8b",
                    "gpu=b200",
                    f"seq_length={seq_length}",
                    "num_gpus=64",
                    "mapping.cp=8",
                    "mapping.micro_batch=1",
                    "mapping.global_batch=8",
                ]
            )
        )
        widths.append((found.prediction.attention, found.step_time.high / found.step_time.low))
    assert widths[0] < (0.3, widths[1][1]) < widths[1] and widths[1][0] > 0.5


def test_what_is_read_off_a_profiled_layer_is_what_the_profile_holds() -> None:
    kernels = layer_profile(RESULTS / "layer_h200")
    counts = kernels.groupby(["precision", "pass"]).size()
    assert tuple(counts["bf16"][["forward", "backward"]]) == KERNELS
    assert (
        tuple((counts["fp8_current"] - counts["bf16"])[["forward", "backward"]])
        == KERNELS_FP8["current"]
    )
    attention = (
        kernels[kernels["kind"] == "attention"].groupby(["precision", "pass"])["microseconds"].sum()
    )
    for precision in ("bf16", "fp8_current"):
        assert attention[precision]["backward"] / attention[precision]["forward"] == pytest.approx(
            BACKWARD_ATTENTION, rel=0.02
        )
    flops = 2 * 4096 * 8192 * 8192  # causal, Llama 3 8B, one sequence
    assert flops / attention["bf16"]["forward"] * 1e6 / 989e12 == pytest.approx(
        KNOWN["attention"].value, rel=0.02
    )


def test_power_lowers_the_speed_of_gemms_alone() -> None:
    plan = plan_of("llama3_8b", "bf16", "gb200")
    hw = hardware(plan.gpu)
    full, capped = (price(count(plan, replace(hw, power=power)), PRIOR) for power in (1.0, 0.64))
    assert (
        full["gemm"] * 1.3 < capped["gemm"] <= full["gemm"] / 0.64
    )  # writing a result takes no power into account
    gemms = {
        "gemm",
        "vocabulary",
        "recompute",
        "launch",
        "dp_comm",
        "bubble",
        "stragglers",
    }  # made of GEMMs, or hidden behind them
    assert {name: capped[name] for name in capped if name not in gemms} == {
        name: full[name] for name in full if name not in gemms
    }
    h100, h200 = (hardware(plan_of("llama3_8b", "bf16", gpu).gpu) for gpu in ("h100", "h200"))
    assert h100.power == h200.power == pytest.approx(1, abs=1e-3) and hw.power < 0.75


def test_the_slower_of_host_and_gpu_decides() -> None:
    busy = waiting(gpu=10e-3, kernels=100, graphs=False, c=PRIOR)
    starved = waiting(gpu=0.1e-3, kernels=1000, graphs=False, c=PRIOR)
    assert busy - 100 * PRIOR.gap * 1e-6 < 0.001 * 10e-3 and starved + 0.1e-3 == pytest.approx(
        1000 * PRIOR.launch * 1e-6, rel=0.01
    )
    assert waiting(0.1e-3, 1000, True, PRIOR) == pytest.approx(
        1000 * GRAPHED_GAP * PRIOR.gap * 1e-6
    )


def test_recomputation_adds_a_forward_pass() -> None:
    plan = plan_of("llama3_70b", "bf16", "gb200")
    assert plan.mapping.recompute_layers == 10
    terms = predict(plan, PRIOR).terms
    once = seconds(
        layer(plan, hardware(plan.gpu), measured(), in_fp8=False).forward, hardware(plan.gpu), PRIOR
    ).total
    micro_batches = plan.mapping.global_batch // (plan.mapping.micro_batch * plan.data_parallel)
    assert terms["recompute"] == pytest.approx(micro_batches * 10 * once)


def test_the_gemm_curve_follows_its_measurements() -> None:
    found = measured()
    assert found.share == pytest.approx(fitted().share, rel=1e-9)
    assert found.traffic == pytest.approx(fitted().traffic, rel=1e-9)
    assert (
        found.error < 0.1
        and all(0.3 < share < 1 for share in found.share.values())
        and found.traffic >= 0
    )
    hw = hardware(plan_of("llama3_8b").gpu)
    rates = [
        2 * 4096 * 4096 * k / sum(found.seconds(hw, "bf16", 4096, 4096, k))
        for k in (1024, 4096, 16384)
    ]
    assert rates == sorted(rates) and rates[-1] < hw.bf16
    assert (
        found.share["tiles"]
        < found.share["blocks"]
        < found.share["tensor_precise"]
        <= found.share["tensor_fast"]
    )


def test_an_unknown_gpu_is_one_line() -> None:
    gpu = plan_of("llama3_8b").gpu.model_copy(update={"name": "h900", "nvlink_gb_s": None})
    with pytest.raises(
        InputError, match=r"gpu=h900 has no nvlink_gb_s to predict from.*conf/gpu/h900\.yaml"
    ):
        hardware(gpu)
    assert isinstance(hardware(gpu.model_copy(update={"nvlink_gb_s": 900.0})), Hardware)


def test_constants_are_few_and_all_documented() -> None:
    assert len(NAMES) <= 12 and set(KNOWN) == set(NAMES) == {
        field.name for field in fields(Constants)
    }
    assert all(KNOWN[name].meaning and KNOWN[name].unit and KNOWN[name].why for name in NAMES)
    assert (
        all(prior.low <= prior.value <= prior.high for prior in KNOWN.values())
        and asdict(PRIOR)["launch"] == KNOWN["launch"].value
    )


def test_a_plan_from_before_bandwidths_loads_and_is_the_same_run() -> None:
    old = read_plan(MEASURED)
    gpu = plan_of("llama3_8b").gpu
    assert old.gpu.hbm_tb_s is None and gpu.hbm_tb_s == 3.35
    now = compose_plan(["stack=nemo_25_04_te_2_11", "mapping=single"])
    stack = old.stack.model_copy(update={"userbuffers": now.stack.userbuffers, "cuda": "12.9"})
    mapping = old.mapping.model_copy(update={"tp_overlap": now.mapping.tp_overlap})
    assert old.stack.userbuffers is None is old.mapping.tp_overlap and now.stack.userbuffers
    changed = differences(
        comparable(old),
        comparable(old.model_copy(update={"gpu": gpu, "stack": stack, "mapping": mapping})),
    )
    assert changed == []
    with pytest.raises(
        InputError, match="no hbm_tb_s, nvlink_gb_s, nic_gbit_s, tdp_w to predict from"
    ):
        hardware(old.gpu)


@pytest.mark.parametrize(
    "gpu", [path.stem for path in sorted((CONF / "gpu").glob("*.yaml")) if path.stem != "cpu"]
)
def test_every_gpu_of_conf_can_be_predicted(gpu: str) -> None:
    found = hardware(
        plan_of("llama32_1b", "bf16", gpu, "cluster.container_image=/images/own.sqsh").gpu
    )
    assert (
        1e12 < found.memory < 1e13
        and found.network < found.nvlink < found.memory < found.bf16 < found.fp8
    )
    assert found.domain == {"gb200": 72, "gb300": 72, "gh200": 4}.get(
        gpu, 8
    ) and found.blackwell == ("b" in gpu)


def test_steps_like_none_that_was_published_have_wider_intervals() -> None:
    """A model of a million parameters is launch gaps and the fixed part; nobody published such a
    step.
    """
    tiny, usual = (
        forecast(compose([f"model={model}", "gpu=h100", "precision=fp8_current"]))
        for model in ("llama3_tiny", "llama3_70b")
    )
    assert tiny.prediction.overhead > 0.9 and usual.prediction.overhead < 0.1
    assert (
        tiny.step_time.high / tiny.step_time.low > 2.5
        and usual.step_time.high / usual.step_time.low < 1.2
    )
    for found in (tiny, usual):
        assert found.step_time.low < found.step_time.value < found.step_time.high
