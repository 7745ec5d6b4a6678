"""What refuses a plan before anything runs: each rule is a small function that returns a sentence or None.

A sentence says what is wrong, why, and what to do instead.  The order is that in which a user would want to hear:
the cell first (can this stack run this recipe on this device?), then the shapes, then what fits.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from recipes.errors import InputError
from recipes.plan import Plan
from recipes.sizes import training_state_gb


def capability(text: str) -> tuple[int, int]:
    """Return a compute capability such as "9.0" as (major, minor)."""
    major, minor = text.split(".")
    return int(major), int(minor)


def cell_is_supported(plan: Plan) -> str | None:
    """The stack must know the scaling, and on this compute capability; the CPU emulates every scaling."""
    fp8, device = plan.precision.fp8, plan.gpu.compute_capability
    if fp8 is None or device is None:
        return None
    cell = f"{plan.precision.name} on {plan.gpu.name} with {plan.stack.name}"
    if fp8.scaling in plan.stack.missing:
        missing = plan.stack.missing[fp8.scaling]
        return f"{cell}: {missing.reason}; {missing.remedy}"
    if fp8.scaling not in plan.stack.fp8:
        return f"{cell}: the stack does not list {fp8.scaling} scaling; choose one of {', '.join(plan.stack.fp8)}"
    support = plan.stack.fp8[fp8.scaling]
    low, high = support.min_capability, support.max_capability
    if capability(device) < capability(low) or (high and capability(device) > capability(high)):
        allowed = f"compute capability {low}" + (f" to {high}" if high else " or higher")
        return f"{cell}: needs {allowed}, {plan.gpu.name} has {device} ({support.source}); use precision=fp8_current or another gpu"
    return None


def delayed_keeps_no_bf16_layers(plan: Plan) -> str | None:
    """Megatron-Core 0.12 transformer_config.py refuses delayed scaling with first or last layers in BF16."""
    fp8 = plan.precision.fp8
    if fp8 and fp8.scaling == "delayed" and fp8.first_layers_bf16 + fp8.last_layers_bf16:
        return "delayed scaling with first or last layers in BF16 is refused by Megatron-Core 0.12; use precision=fp8_current or set both to 0"
    return None


def bf16_layers_leave_some_fp8(plan: Plan) -> str | None:
    """At least one layer must run in FP8, or the run would carry a name that it does not deserve."""
    fp8 = plan.precision.fp8
    if fp8 and fp8.first_layers_bf16 + fp8.last_layers_bf16 >= plan.model.num_layers:
        kept = fp8.first_layers_bf16 + fp8.last_layers_bf16
        return f"precision.fp8 keeps {kept} layers in BF16 but {plan.model.name} has {plan.model.num_layers}: nothing would run in FP8; keep fewer"
    return None


def heads_divide(plan: Plan) -> str | None:
    """Heads share hidden_size evenly, and query groups share the heads."""
    model = plan.model
    if model.hidden_size % model.num_attention_heads:
        return f"model.hidden_size={model.hidden_size} is no multiple of model.num_attention_heads={model.num_attention_heads}; change one"
    if model.num_attention_heads % model.num_query_groups:
        return f"model.num_attention_heads={model.num_attention_heads} is no multiple of model.num_query_groups={model.num_query_groups}; change one"
    return None


def mapping_divides(plan: Plan) -> str | None:
    """Model-parallel sizes must divide devices, heads, groups and layers (Megatron-Core 0.12 transformer_config.py)."""
    m, model = plan.mapping, plan.model
    if plan.num_gpus % (m.tp * m.pp * m.cp):
        return f"num_gpus={plan.num_gpus} is no multiple of tp*pp*cp={m.tp * m.pp * m.cp}; change num_gpus or the mapping"
    for what, size in (("num_attention_heads", model.num_attention_heads), ("num_query_groups", model.num_query_groups)):
        if size % m.tp:
            return f"mapping.tp={m.tp} does not divide model.{what}={size}; choose a divisor"
    if model.num_layers % (m.pp * (m.vp or 1)):
        return f"mapping.pp={m.pp} times vp={m.vp or 1} does not divide model.num_layers={model.num_layers}; choose divisors"
    if m.vp and m.vp > 1 and m.pp == 1:
        return f"mapping.vp={m.vp} needs mapping.pp > 1; set mapping.vp=null"
    return None


def batch_divides(plan: Plan) -> str | None:
    """A global batch is a whole number of micro-batches on every replica."""
    m, replicas = plan.mapping, plan.data_parallel
    if m.global_batch % (m.micro_batch * replicas):
        return (
            f"mapping.global_batch={m.global_batch} is no multiple of micro_batch*data_parallel="
            f"{m.micro_batch}*{replicas}; use e.g. mapping.global_batch={m.micro_batch * replicas}"
        )
    return None


def schedule_is_possible(plan: Plan) -> str | None:
    """The warm-up ends before the run does, and the rate decays downwards."""
    t = plan.train
    if t.warmup_steps >= t.max_steps:
        return f"train.warmup_steps={t.warmup_steps} must be less than train.max_steps={t.max_steps}; lower it"
    if t.min_lr > t.max_lr:
        return f"train.min_lr={t.min_lr} is above train.max_lr={t.max_lr}; lower it"
    return None


def data_is_named(plan: Plan) -> str | None:
    """Each kind of data needs its own fields."""
    data = plan.data
    needed = {"text": ["root"], "indexed": ["train", "heldout", "tokenizer"], "mock": []}[data.kind]
    missing = next((name for name in needed if not getattr(data, name)), None)
    return f"data.{missing} is empty, data={data.kind} needs it; set it" if missing else None


def cpu_runs_data_parallel_only(plan: Plan) -> str | None:
    """The CPU path is tried with data parallelism; the other ways to split a model need the GPU's collectives."""
    m = plan.mapping
    if plan.emulated and max(m.tp, m.pp, m.cp) > 1:
        return f"gpu=cpu runs data-parallel only, mapping has tp={m.tp} pp={m.pp} cp={m.cp}; set them to 1 or choose a GPU"
    return None


def model_fits_machine(plan: Plan) -> str | None:
    """On this machine, the training state of every process must fit in memory before a step is tried."""
    if not plan.emulated:
        return None
    have = plan.gpu.memory_gb or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    need = training_state_gb(plan.model) * plan.num_gpus
    if need > have:
        state = f"{plan.model.name} needs {need:,.0f} GB for weights, gradients and optimizer"
        return f"{state}, this machine has {have:,.0f} GB; use model=llama3_tiny, fewer layers or a GPU"
    return None


RULES: tuple[Callable[[Plan], str | None], ...] = (
    cell_is_supported,
    delayed_keeps_no_bf16_layers,
    bf16_layers_leave_some_fp8,
    heads_divide,
    mapping_divides,
    batch_divides,
    schedule_is_possible,
    data_is_named,
    cpu_runs_data_parallel_only,
    model_fits_machine,
)


def check(plan: Plan) -> Plan:
    """Return `plan` if every rule lets it pass; raise InputError with the first refusal."""
    for rule in RULES:
        if refusal := rule(plan):
            raise InputError(refusal)
    return plan
