"""Does tensor-parallel communication overlap with GEMMs in a plan, and if not, why?

Transformer Engine overlaps it by userbuffers: buffers of one data type, set up once for all layers.
What a stack's versions do with which number format stands in `conf/stack`; the rest is the layout's
and the GPU's.
"""

from __future__ import annotations

from recipes.plan import Plan, Userbuffers

# Transformer Engine gathers the scales of MXFP8 in whole tiles of 128 rows
# (pytorch/module/base.py:516 @ f05f12c).
MXFP8_ROWS = 128
FIRST_BLACKWELL = 10  # major compute capability


def overlaps_tp(plan: Plan) -> bool:
    """Whether the plan's recipe asks for the overlap."""
    asked = plan.mapping.tp_overlap
    return plan.mapping.tp > 1 and (why_not(plan) is None if asked is None else asked)


def resolved(plan: Plan) -> Plan:
    """Return the plan with `mapping.tp_overlap` set: as given, or on where it is possible."""
    return _with(plan, overlaps_tp(plan)) if plan.mapping.tp_overlap is None else plan


def reopened(plan: Plan) -> Plan:
    """Return a resolved plan to be given another layout: only an overlap that the user turned off
    stays set.
    """
    turned_off = plan.mapping.tp_overlap is False and why_not(plan) is None
    return plan if turned_off else _with(plan, None)


def _with(plan: Plan, tp_overlap: bool | None) -> Plan:
    mapping = plan.mapping.model_copy(update={"tp_overlap": tp_overlap})
    return plan.model_copy(update={"mapping": mapping})


def tp_overlap_is_possible(plan: Plan) -> str | None:
    """Refuse an overlap that was asked for and cannot work: the job would end in its first step."""
    reason = why_not(plan) if plan.mapping.tp_overlap else None
    if reason is None:
        return None
    return f"mapping.tp_overlap=true cannot work: {reason}; set mapping.tp_overlap=false"


def why_off(plan: Plan) -> str | None:
    """Return why tensor-parallel communication does not overlap; None where it does, or where there
    is none.
    """
    if plan.mapping.tp == 1 or overlaps_tp(plan):
        return None
    return why_not(plan) or "mapping.tp_overlap=false"


def why_not(plan: Plan) -> str | None:
    """Return why the overlap cannot work; None where it can."""
    userbuffers = plan.stack.userbuffers
    if plan.mapping.tp == 1:
        return "there is no tensor-parallel communication (mapping.tp=1)"
    if userbuffers is None:
        return f"conf/stack/{plan.stack.name}.yaml does not say what its userbuffers can do"
    return _group(plan, userbuffers) or _fsdp(plan, userbuffers) or _operands(plan, userbuffers)


def _group(plan: Plan, userbuffers: Userbuffers) -> str | None:
    """Userbuffers join GPUs of one NVLink domain, in the sizes that have kernels, by multicast."""
    gpu, tp = plan.gpu, plan.mapping.tp
    domain, node = gpu.nvlink_domain or gpu.devices_per_node, gpu.devices_per_node
    if tp > domain or (node % tp and tp % node):
        return (
            f"userbuffers work inside an NVLink domain: mapping.tp={tp} does not divide the"
            f" {domain} GPUs of {gpu.name}'s"
        )
    if not gpu.nvlink_multicast:
        return f"userbuffers need NVLink with multicast (an NVSwitch), which {gpu.name} has not"
    if tp not in userbuffers.sizes:
        sizes = ", ".join(map(str, userbuffers.sizes))
        return f"userbuffers have kernels for mapping.tp={sizes} alone"
    return None


def _fsdp(plan: Plan, userbuffers: Userbuffers) -> str | None:
    if not plan.mapping.fsdp:
        return None
    if "fsdp" in userbuffers.fails:
        return _named(plan, userbuffers, "fsdp")
    if int((plan.gpu.compute_capability or "0").split(".")[0]) < FIRST_BLACKWELL:
        return (
            "before Blackwell it needs CUDA_DEVICE_MAX_CONNECTIONS=1, which FSDP excludes"
            " (Megatron-LM megatron/training/arguments.py:766-777)"
        )
    return None


def _operands(plan: Plan, userbuffers: Userbuffers) -> str | None:
    """The buffers hold one data type, and gather what a layer multiplies."""
    fp8, m = plan.precision.fp8, plan.mapping
    if fp8 is None:
        return None if "bf16" in userbuffers.overlaps else _named(plan, userbuffers, "bf16")
    if fp8.scaling not in userbuffers.overlaps:
        return _named(plan, userbuffers, fp8.scaling)
    if fp8.first_layers_bf16 + fp8.last_layers_bf16 and "bf16_layers" in userbuffers.fails:
        return _named(plan, userbuffers, "bf16_layers")
    rows = m.micro_batch * plan.seq_length // (m.cp * m.tp)
    if fp8.scaling == "mxfp8" and rows % MXFP8_ROWS:
        return (
            f"userbuffers gather MXFP8 in multiples of {MXFP8_ROWS} tokens, and a rank has {rows}"
        )
    return None


def _named(plan: Plan, userbuffers: Userbuffers, what: str) -> str:
    """Return the reason that the stack's file gives, and where it stands there."""
    where = f"conf/stack/{plan.stack.name}.yaml, userbuffers"
    found = next((each for name, each in userbuffers.fails.items() if name == what), None)
    return f"{found.reason} ({where}.fails.{what})" if found else f"{what} is not listed in {where}"
