"""Which layouts are possible: Megatron-Core's own checks, asked before a job is queued and not after.

Megatron-Core finds an impossible layout when the job has started on all its nodes.  Each rule below is one of its
checks (0.12, commit 3cdfd613, file and what it raises in the docstring), or one of Transformer Engine's or Slurm's, on
the plan alone.  A rule returns None, or a sentence: what, why, what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable

from recipes.overlap import tp_overlap_is_possible
from recipes.plan import Plan

Rule = Callable[[Plan], str | None]
FP8_MULTIPLE = {"mxfp8": 32}  # dimensions of an operand; every other scaling: 16
TOKENS_MULTIPLE = 8


def heads_divide(plan: Plan) -> str | None:
    """Heads share hidden_size evenly, unless they have a size of their own, and query groups share the heads."""
    model = plan.model
    if model.head_size is None and model.hidden_size % model.num_attention_heads:
        return f"model.hidden_size={model.hidden_size} is no multiple of model.num_attention_heads={model.num_attention_heads}; change one"
    if model.num_attention_heads % model.num_query_groups:
        return f"model.num_attention_heads={model.num_attention_heads} is no multiple of model.num_query_groups={model.num_query_groups}; change one"
    return None


def devices_divide(plan: Plan) -> str | None:
    """parallel_state.py: the world size is a multiple of tp*pp*cp; Slurm: beyond one node, jobs take whole nodes."""
    m, node = plan.mapping, plan.gpu.devices_per_node
    if plan.num_gpus % (m.tp * m.pp * m.cp):
        return f"num_gpus={plan.num_gpus} is no multiple of tp*pp*cp={m.tp * m.pp * m.cp}; change num_gpus or the mapping"
    if plan.num_gpus > node and plan.num_gpus % node:
        whole = _next_multiple(plan.num_gpus, node)
        return f"num_gpus={plan.num_gpus} is no whole number of {plan.gpu.name} nodes with {node} GPUs each; use num_gpus={whole}"
    return None


def tensor_parallel_divides(plan: Plan) -> str | None:
    """transformer_config.py: heads and query groups are multiples of tp; so is the MLP's width."""
    sizes = {name: getattr(plan.model, name) for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    bad = next((name for name, size in sizes.items() if size % plan.mapping.tp), None)
    return f"mapping.tp={plan.mapping.tp} does not divide model.{bad}={sizes[bad]}; choose a divisor" if bad else None


def layers_per_stage(plan: Plan) -> int:
    """Return the layers of a pipeline stage, embedding and loss counted where the model counts them."""
    return (plan.model.num_layers + 2 * plan.model.embedding_and_loss_count_as_layers) // plan.mapping.pp


def layers_divide(plan: Plan) -> str | None:
    """transformer_config.py: layers are shared evenly by the stages, and a stage's by its virtual stages."""
    m, model = plan.mapping, plan.model
    if m.pp == 1 and m.vp == 1:
        return None
    counted = model.num_layers + 2 * model.embedding_and_loss_count_as_layers
    if counted % m.pp or (counted // m.pp) % m.vp:
        with_two = ", embedding and loss counted," if model.embedding_and_loss_count_as_layers else ""
        return f"mapping.pp={m.pp} times vp={m.vp} does not divide the {counted} layers{with_two} of {model.name}; choose divisors"
    return None


def interleaving_has_a_pipeline(plan: Plan) -> str | None:
    """parallel_state.py: virtual stages need a pipeline; schedules.py: and at least as many micro-batches as stages.

    Its remainder (micro-batches modulo stages) must be zero as well, or the run ends in its first step.
    """
    m = plan.mapping
    if m.vp > 1 and m.pp == 1:
        return f"mapping.vp={m.vp} needs mapping.pp > 1; set mapping.vp=1"
    micro_batches = m.global_batch // (m.micro_batch * max(1, plan.data_parallel))
    if m.vp > 1 and micro_batches % m.pp:
        more = m.micro_batch * plan.data_parallel * m.pp
        return (
            f"mapping.vp={m.vp} wants the {micro_batches} micro-batches of a replica to be a multiple of mapping.pp={m.pp}; "
            f"use mapping.vp=1, or mapping.global_batch a multiple of {more}"
        )
    return None


def batch_divides(plan: Plan) -> str | None:
    """num_microbatches_calculator.py: a global batch is a whole number of micro-batches on every replica."""
    m, replicas = plan.mapping, plan.data_parallel
    if m.global_batch % (m.micro_batch * replicas):
        return (
            f"mapping.global_batch={m.global_batch} is no multiple of micro_batch*data_parallel="
            f"{m.micro_batch}*{replicas}; use e.g. mapping.global_batch={_next_multiple(m.global_batch, m.micro_batch * replicas)}"
        )
    return None


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def sequence_divides(plan: Plan) -> str | None:
    """utils.py get_batch_on_this_cp_rank: a rank takes two of 2*cp pieces; sequence parallelism shares one by tp."""
    m = plan.mapping
    pieces = (2 * m.cp if m.cp > 1 else 1) * m.tp
    if plan.seq_length % pieces:
        return f"seq_length={plan.seq_length} is no multiple of {pieces} (2*cp*tp, the pieces it is cut in); change it, mapping.cp or mapping.tp"
    return None


def fp8_shapes_divide(plan: Plan) -> str | None:
    """Transformer Engine pytorch/utils.py assert_dim_for_fp8_exec: tokens a multiple of 8, features of 16 (MXFP8: 32)."""
    fp8, m, model = plan.precision.fp8, plan.mapping, plan.model
    if fp8 is None or plan.emulated:
        return None
    multiple = FP8_MULTIPLE.get(fp8.scaling, 16)
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * model.head
    features = {"hidden_size": model.hidden_size, "ffn_hidden_size / tp": model.ffn_hidden_size // m.tp, "qkv width / tp": qkv // m.tp}
    bad = next((name for name, size in features.items() if size % multiple), None)
    if bad:
        return f"{plan.precision.name} wants {bad}={features[bad]} to be a multiple of {multiple}; change mapping.tp, or use precision=bf16"
    tokens = m.micro_batch * plan.seq_length // m.cp
    rows = max(TOKENS_MULTIPLE, FP8_MULTIPLE.get(fp8.scaling, 0))
    if tokens % rows:
        return f"{plan.precision.name} wants the {tokens} tokens of a micro-batch to be a multiple of {rows}; change seq_length"
    return None


def bf16_layers_fit_a_stage(plan: Plan) -> str | None:
    """transformer_config.py: the first and the last layers in BF16 are at most a pipeline stage each."""
    fp8, most = plan.precision.fp8, plan.model.num_layers // plan.mapping.pp
    if fp8 and max(fp8.first_layers_bf16, fp8.last_layers_bf16) > most:
        kept = max(fp8.first_layers_bf16, fp8.last_layers_bf16)
        return f"precision.fp8 keeps {kept} layers in BF16 at one end, Megatron-Core allows no more than a pipeline stage has ({most}); keep fewer"
    return None


def recompute_fits_a_stage(plan: Plan) -> str | None:
    """transformer_block.py recomputes the first recompute_num_layers of each (virtual) stage: there are no more than it has."""
    m = plan.mapping
    most = -(-layers_per_stage(plan) // m.vp)
    if m.recompute_layers > most:
        return f"mapping.recompute_layers={m.recompute_layers} is more than the {most} layers of a (virtual) pipeline stage; use at most {most}"
    return None


def offload_is_possible(plan: Plan) -> str | None:
    """transformer_config.py: activations are offloaded without pipeline or recompute, and not for all layers."""
    m = plan.mapping
    if not m.offload_layers:
        return None
    if m.pp > 1:
        return f"mapping.offload_layers={m.offload_layers} does not work with pipeline parallelism (pp={m.pp}); set one of them off"
    if m.recompute_layers:
        return f"mapping.offload_layers={m.offload_layers} does not work with mapping.recompute_layers={m.recompute_layers}; set one to 0"
    if m.offload_layers >= plan.model.num_layers:
        return f"mapping.offload_layers={m.offload_layers} must be less than the {plan.model.num_layers} layers of {plan.model.name}"
    return None


def cuda_graphs_are_possible(plan: Plan) -> str | None:
    """transformer_config.py: no CUDA graphs with offloading or recompute; NeMo scripts/performance/utils.py: nor with FSDP."""
    m = plan.mapping
    against = {"fsdp": m.fsdp, "recompute_layers": m.recompute_layers > 0, "offload_layers": m.offload_layers > 0}
    bad = next((name for name, is_on in against.items() if is_on), None)
    if m.cuda_graphs and bad:
        return f"mapping.cuda_graphs does not work with mapping.{bad}={getattr(m, bad)}; set mapping.cuda_graphs=false"
    fp8, dropped = plan.precision.fp8, plan.stack.graphs_drop_bf16_layers
    if m.cuda_graphs and dropped and fp8 and fp8.first_layers_bf16 + fp8.last_layers_bf16:
        none = "precision.fp8.first_layers_bf16=0 and precision.fp8.last_layers_bf16=0"
        return f"mapping.cuda_graphs=true: {dropped}; set mapping.cuda_graphs=false, or {none}"
    return None


def fp8_parameters_are_possible(plan: Plan) -> str | None:
    """transformer_config.py (0.12): no FP8 parameters with MXFP8; and not every stack can shard them under FSDP (conf/stack).

    MXFP8's go through the gradient buffer of Megatron-Core 0.13's DistributedDataParallel, which its FSDP has not
    (distributed/custom_fsdp @ 03f77931).

    megatron/core/optimizer/__init__.py:350 has the precision-aware optimizer keep what BF16 parameters lack to FP32, 16 bits each; given FP8
    parameters, Transformer Engine 2.11's FusedAdam raises at the first update (measured on an H200).
    """
    fp8 = plan.precision.fp8
    if fp8 is None or not fp8.param_gather:
        return None
    off = "set precision.fp8.param_gather=false"
    kept_in_mxfp8 = fp8.scaling == "mxfp8" and plan.stack.scripts.mxfp8_parameters
    if (fp8.scaling in ("mxfp8", "subchannel") and not kept_in_mxfp8) or plan.stack.emulates_fp8:
        return f"precision.fp8.param_gather: no parameters are kept in FP8 under {fp8.scaling} scaling with {plan.stack.name}; {off}"
    if plan.mapping.fsdp and (kept_in_mxfp8 or not plan.stack.fp8_parameters_with_fsdp):
        what = "MXFP8" if kept_in_mxfp8 else "FP8"
        return f"precision.fp8.param_gather: {plan.stack.name} cannot shard {what} parameters with mapping.fsdp; {off}"
    if plan.settings.precision_aware_optimizer:
        return f"precision.fp8.param_gather: settings.precision_aware_optimizer keeps the rest of BF16 parameters, FP8 ones have none; {off}"
    return None


def fsdp_gives_the_optimizer_its_gradients(plan: Plan) -> str | None:
    """A precision-aware optimizer trains nothing under some stacks' FSDP (conf/stack, `fsdp_drops_gradients`)."""
    why = plan.stack.fsdp_drops_gradients
    if not (why and plan.mapping.fsdp and plan.settings.precision_aware_optimizer):
        return None
    moments = "" if plan.settings.adam_moments == "fp32" else " settings.adam_moments=fp32"
    return (
        f"settings.precision_aware_optimizer=true with mapping.fsdp=true: {why} (conf/stack/{plan.stack.name}.yaml, fsdp_drops_gradients); "
        f"set settings.precision_aware_optimizer=false{moments}, or mapping.fsdp=false"
    )


def gather_overlap_is_possible(plan: Plan) -> str | None:
    """Megatron-LM arguments.py: gathering parameters during the optimizer step needs virtual stages, and breaks checkpoints."""
    if not plan.settings.overlap_param_gather_with_optimizer_step:
        return None
    off = "set settings.overlap_param_gather_with_optimizer_step=false"
    if plan.mapping.vp == 1:
        return f"settings.overlap_param_gather_with_optimizer_step needs mapping.vp > 1; {off}"
    if plan.settings.checkpoints:
        return f"settings.overlap_param_gather_with_optimizer_step does not work with checkpoints; {off} or settings.checkpoints=false"
    return None


MAPPING_RULES: tuple[Rule, ...] = (
    heads_divide,
    devices_divide,
    tensor_parallel_divides,
    layers_divide,
    batch_divides,
    interleaving_has_a_pipeline,
    sequence_divides,
    fp8_shapes_divide,
    bf16_layers_fit_a_stage,
    recompute_fits_a_stage,
    offload_is_possible,
    cuda_graphs_are_possible,
    fp8_parameters_are_possible,
    fsdp_gives_the_optimizer_its_gradients,
    gather_overlap_is_possible,
    tp_overlap_is_possible,
)
