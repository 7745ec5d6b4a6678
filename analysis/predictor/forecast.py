"""A plan's forecast: step time with its interval, where the time goes, memory, and the speedup over
BF16 in two senses.

iso-mapping: over BF16 in the plan's own layout, so that only precision differs; best-mapping: over
BF16 in the layout that NVIDIA recommends for it, so that the layout may differ too: at NVIDIA's
scale where the plan is at its own, else on as many GPUs with the same global batch.  Everything
here is predicted, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.predictor.constants import (
    Interval,
    basis,
    constants,
    speedup_basis,
    speedup_interval,
    step_time_interval,
)
from analysis.predictor.model.step import Prediction, predict
from recipes.compose.defaults import fill
from recipes.compose.fit import state
from recipes.compose.layout_rules import MAPPING_RULES
from recipes.compose.rules import RULES, model_fits_gpu
from recipes.compose.tree import COMMAND_KEYS, compose_plan, compose_tree, plan_from_tree
from recipes.errors import InputError
from recipes.estimate.flops import flops_per_token, mfu, peak_tflops
from recipes.estimate.memory import Memory, estimate, usable_gb
from recipes.overlap import reopened, resolved
from recipes.plan import Model, Plan

SETTINGS_KEYS = ("experiment", "settings")


@dataclass(frozen=True)
class Forecast:
    """A plan, its prediction, its BF16 twin (None for BF16) and the recommended BF16 plan's
    tokens/s/GPU (None where there is none).
    """

    plan: Plan
    prediction: Prediction
    step_time: Interval
    memory: Memory
    iso: Forecast | None
    best: Forecast | None

    @property
    def speedup_iso(self) -> Interval | None:
        """Speedup over BF16 in the same layout."""
        return _faster(self, self.iso)

    @property
    def speedup_best(self) -> Interval | None:
        """Speedup over BF16 in NVIDIA's layout for it."""
        return _faster(self, self.best)


def _faster(this: Forecast, base: Forecast | None) -> Interval | None:
    if base is None:
        return None
    overhead = max(this.prediction.overhead, base.prediction.overhead)
    return speedup_interval(
        this.prediction.tokens_per_s_per_gpu / base.prediction.tokens_per_s_per_gpu, overhead
    )


def compose(overrides: Sequence[str]) -> Plan:
    """Return the checked plan, under the settings with which NVIDIA measures speed unless the
    overrides name others.
    """
    return _on_a_gpu(compose_plan(_complete(overrides)))


def compose_any_layout(overrides: Sequence[str]) -> Plan:
    """Return the plan without asking whether its layout is possible and fits, for a search that
    changes it.
    """
    tree = compose_tree(_complete(overrides))
    plan = plan_from_tree(
        fill({key: value for key, value in tree.items() if key not in COMMAND_KEYS})
    )
    for rule in RULES:
        if rule not in (*MAPPING_RULES, model_fits_gpu) and (refusal := rule(plan)):
            raise InputError(refusal)
    return _on_a_gpu(plan)


def _on_a_gpu(plan: Plan) -> Plan:
    if plan.emulated:
        raise InputError(
            f"stack={plan.stack.name} emulates {plan.precision.name}, whose speed is no GPU's;"
            " choose a stack that runs it"
        )
    return plan


def _complete(overrides: Sequence[str]) -> list[str]:
    named = {override.lstrip("+~").split("=")[0] for override in overrides}
    if not named & {"gpu", "experiment"}:
        raise InputError(
            "no GPU is named, and steps are predicted for one; add gpu=h100, or another of conf/gpu"
        )
    if "gpu=cpu" in overrides:
        raise InputError(
            "gpu=cpu emulates FP8, and its steps say nothing about a GPU; choose one, e.g. gpu=h100"
        )
    settings = [] if named & set(SETTINGS_KEYS) else ["experiment=throughput"]
    nowhere = (
        []
        if any(name.startswith(("cluster", "executor")) for name in named)
        else ["cluster.container_runtime=none", "cluster.python=python"]
    )
    return [*overrides, *settings, *nowhere]  # nothing is launched, so a stack needs no container


def forecast(plan: Plan, overrides: Sequence[str] | None = None) -> Forecast:
    """Return the forecast of a plan; `overrides`, which made it, are needed to find the recommended
    BF16 layout.
    """
    base = bf16_twin(plan)
    if base is None:
        return _forecast(plan)
    return _forecast(
        plan, _forecast(base), _recommended(plan, overrides) if overrides is not None else None
    )


def _forecast(plan: Plan, iso: Forecast | None = None, best: Forecast | None = None) -> Forecast:
    prediction = predict(plan, constants())
    interval = step_time_interval(
        prediction.step_time_s, plan.gpu, prediction.overhead, prediction.attention
    )
    return Forecast(plan, prediction, interval, estimate(plan), iso, best)


def bf16_twin(plan: Plan) -> Plan | None:
    """Return the plan with nothing changed but its precision, to BF16; None for BF16.

    What depends on the precision follows it: the overlap of tensor-parallel communication, and
    NVIDIA's settings make the optimizer precision-aware.
    """
    if plan.precision.fp8 is None:
        return None
    settings = plan.settings
    if settings.name == "throughput":
        settings = settings.model_copy(
            update={"precision_aware_optimizer": True}
        )  # as recipes.compose.defaults fills it for BF16
    bf16 = plan.precision.model_copy(update={"name": "bf16", "fp8": None})
    return resolved(reopened(plan).model_copy(update={"precision": bf16, "settings": settings}))


def _recommended(plan: Plan, overrides: Sequence[str]) -> Forecast | None:
    """Return the forecast of BF16 in the layout recommended for it, at the plan's scale where that
    was chosen; None where that plan is refused.
    """
    kept = [
        o for o in overrides if not o.lstrip("+~").startswith(("mapping", "precision", "num_gpus"))
    ]
    chosen = any(o.lstrip("+~").startswith(("mapping", "num_gpus")) for o in overrides)
    scale = (
        [f"num_gpus={plan.num_gpus}", f"mapping.global_batch={plan.mapping.global_batch}"]
        if chosen
        else []
    )
    try:
        return _forecast(compose([*kept, "precision=bf16", "mapping=recommended", *scale]))
    except InputError:
        return None


def _beyond_the_rows(model: Model) -> str:
    """Return what a model has that no published row had, which all are of Llama 3 and Nemotron-4;
    "" for such a model.
    """
    found = {
        "attention with a softcap": model.attention_softcap,
        "a sliding window": model.sliding_window and not model.attention_softcap,
        "norms of queries and keys": model.qk_norm,
        "norms behind attention and MLP": model.post_norms,
        "biases": model.qkv_bias or model.linear_bias,
        "a gated activation function in two kernels": (
            model.gated and model.fused_activation is False
        ),
        "GELU": model.activation in ("geglu", "gelu"),
    }
    parts = [what for what, has in found.items() if has]
    return f"; none of them has {', '.join(parts)}, which {model.name} has" if parts else ""


def values(found: Forecast, causal: bool) -> dict[str, Any]:
    """Return everything about a forecast as plain values, under the words that tables and JSON
    use.
    """
    plan, prediction, time = found.plan, found.prediction, found.step_time
    peak, rate = peak_tflops(plan.gpu, plan.precision), prediction.tokens_per_s_per_gpu
    have = usable_gb(plan)
    return {
        "label": "predicted",
        "model": plan.model.name,
        "precision": plan.precision.name,
        "gpu": plan.gpu.name,
        "num_gpus": plan.num_gpus,
        "stack": plan.stack.name,
        "settings": plan.settings.name,
        "seq_length": plan.seq_length,
        "mapping": plan.mapping.model_dump(),
        "data_parallel": plan.data_parallel,
        "step_time_s": time.value,
        "step_time_low_s": time.low,
        "step_time_high_s": time.high,
        "interval": basis(plan.gpu) + _beyond_the_rows(plan.model),
        "tokens_per_s_per_gpu": rate,
        "tokens_per_s_per_gpu_low": rate * time.value / time.high,
        "tokens_per_s_per_gpu_high": rate * time.value / time.low,
        "tflops_per_gpu": rate * flops_per_token(plan.model, plan.seq_length, causal) / 1e12,
        "flops_convention": "causal attention" if causal else "full attention",
        "mfu": mfu(rate, plan.model, plan.seq_length, causal, peak) if peak else None,
        "peak_tflops": peak,
        "peak": f"{plan.gpu.name} {'FP8' if plan.precision.fp8 else 'BF16'} dense",
        "terms_s": prediction.terms,
        "memory_gb": found.memory.total_gb,
        "memory_terms_gb": {name: value / 1e9 for name, value in found.memory.terms.items()},
        "memory_usable_gb": have,
        "memory_fits": state(plan).replace("refused", "does not fit"),
        "speedup_interval": speedup_basis(plan.precision.name) if plan.precision.fp8 else None,
        **_speedup("speedup_over_bf16", found.speedup_iso, found.iso),
        **_speedup("speedup_over_bf16_best_mapping", found.speedup_best, found.best),
    }


def _speedup(name: str, ratio: Interval | None, base: Forecast | None) -> dict[str, Any]:
    known = {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_base_fits": None}
    if ratio is None or base is None:
        return known
    return {
        name: ratio.value,
        f"{name}_low": ratio.low,
        f"{name}_high": ratio.high,
        f"{name}_base_fits": state(base.plan) != "refused",
    }
