"""Environment variables of a training job on GPUs, each with its reason.

NeMo sets them in three places (v2.3.2 scripts/performance/utils.py:68-76,
nemo/lightning/run/plugins.py PerfEnvPlugin, and the scripts of single models).  Here they follow
from the plan alone, so that a job's script can be printed and tested without NeMo.  What versions
of NeMo set differently is data of the stack (conf/stack).
"""

from __future__ import annotations

from dataclasses import dataclass

from recipes.nemo_recipes import recipe_of
from recipes.plan import Plan

NORM_SM_MARGIN = 16  # PerfEnvPlugin.layernorm_sm_margin
PIPELINE_CHUNK_BYTES = 2 * 1024 * 1024  # nccl_pp_comm_chunksize in the scripts of all five models


@dataclass(frozen=True)
class Variable:
    """An environment variable and why it is set."""

    name: str
    value: str
    why: str


def variables(plan: Plan) -> list[Variable]:
    """Return the variables of the plan's job, the site's own last; on the CPU only those."""
    own = [
        Variable(name, value, "cluster.environment")
        for name, value in plan.cluster.environment.items()
    ]
    if plan.on_cpu:
        return own
    return [
        *_always(plan),
        *_connections(plan),
        *_pipeline(plan),
        *_norms(plan),
        *_of_stack(plan),
        *own,
    ]


def _always(plan: Plan) -> list[Variable]:
    on_the_hub = plan.data.tokenizer is not None and not plan.data.tokenizer.startswith(
        ("/", ".", "~")
    )
    return [
        Variable(
            "TORCH_NCCL_AVOID_RECORD_STREAMS", "1", "do not cache the memory of NCCL's buffers"
        ),
        Variable("NCCL_NVLS_ENABLE", "0", "NVLink SHARP costs memory"),
        *_attention(plan),
        Variable("NEMO_LOG_MEMORY_USAGE", "1", "print the memory that each rank allocates"),
        Variable("TOKENIZERS_PARALLELISM", "False", "no warnings from forked data workers"),
        Variable(
            "HF_HUB_OFFLINE",
            "0" if on_the_hub else "1",
            "1: tokenizers come from disk; 0 where data.tokenizer names one on the hub",
        ),
    ]


def _attention(plan: Plan) -> list[Variable]:
    """Which attention Transformer Engine may choose; a recipe that chooses itself (Gemma: heads of
    256) gets no other.

    Megatron-Core (0.12.3 models/common/language_module/language_module.py:45) asserts that both
    agree.
    """
    recipe = recipe_of(plan.stack.versions["nemo"], plan.model.nemo_recipe)
    if recipe and recipe.attention_backend == "flash":
        return [Variable("NVTE_FLASH_ATTN", "1", "flash attention alone, as NeMo's recipe has it")]
    return [
        Variable("NVTE_FLASH_ATTN", "1", "needed beside the next for cuDNN's fused attention"),
        Variable("NVTE_FUSED_ATTN", "1", "cuDNN's fused attention"),
    ]


def _connections(plan: Plan) -> list[Variable]:
    """One queue before compute capability 10 keeps the order in which TP and CP overlap launch;
    from 10.0 on, many.

    Megatron-LM arguments.py refuses a single one under FSDP.
    """
    m = plan.mapping
    if m.tp == 1 and m.cp == 1:
        return []
    blackwell = int((plan.gpu.compute_capability or "0").split(".")[0]) >= 10
    if blackwell:
        return [
            Variable(
                "CUDA_DEVICE_MAX_CONNECTIONS",
                "32",
                "enough hardware queues for TP and CP communication to overlap",
            )
        ]
    return (
        []
        if m.fsdp
        else [
            Variable(
                "CUDA_DEVICE_MAX_CONNECTIONS",
                "1",
                "launch in program order, so that TP and CP communication overlaps",
            )
        ]
    )


def _pipeline(plan: Plan) -> list[Variable]:
    if plan.mapping.pp == 1:
        return []
    return [
        Variable(
            "NCCL_P2P_NET_CHUNKSIZE",
            str(PIPELINE_CHUNK_BYTES),
            "large chunks between pipeline stages",
        )
    ]


def _norms(plan: Plan) -> list[Variable]:
    """Leave multiprocessors to communication beside norms; not on one GPU, where nothing is
    communicated.

    There the margin costs about 1 % of an FP8 step of Llama 3 8B (H200, Transformer Engine 2.11).
    """
    if plan.num_gpus == 1:
        return []
    return [
        Variable(
            f"NVTE_{way}_LAYERNORM_SM_MARGIN",
            str(NORM_SM_MARGIN),
            "leave multiprocessors to communication",
        )
        for way in ("FWD", "BWD")
    ]


def _of_stack(plan: Plan) -> list[Variable]:
    """Return what the scripts of the stack's NeMo set beside, as conf/stack has it."""
    found = (variable for variable in plan.stack.scripts.variables if variable.where.holds(plan))
    return [Variable(variable.name, variable.value, variable.why) for variable in found]
