"""Which layouts are possible: Megatron-Core's own checks, asked before a job is queued and not
after.

Megatron-Core finds an impossible layout when the job has started on all its nodes.  Each rule below
is one of its checks (0.12, commit 3cdfd613, file and what it raises in the docstring), or one of
Transformer Engine's or Slurm's, on the plan alone.  A rule returns None, or a sentence: what, why,
what to do instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from recipes.compose.remedies import Change, Refusal, divisors, nearest, next_multiple
from recipes.overlap import tp_overlap_is_possible
from recipes.plan import Plan

Rule = Callable[[Plan], str | None]
FP8_MULTIPLE = {"mxfp8": 32}  # dimensions of an operand; every other scaling: 16
# Tokens of a rank's share under sequence parallelism; every other scaling: 8.
SHARE_MULTIPLE = {"mxfp8": 32, "subchannel": 128}

# A layout without each of these fields.
OFF: dict[str, int | bool] = {
    "pp": 1,
    "vp": 1,
    "fsdp": False,
    "recompute_layers": 0,
    "offload_layers": 0,
    "cuda_graphs": False,
}
# Pairs of fields that Megatron-Core does not take together, the one to give up first.
# transformer_config.py: offloading excludes pipeline stages and recompute, CUDA graphs exclude
# offloading and recompute. NeMo v2.3.2 scripts/performance/utils.py: nor are there graphs with
# FSDP.
EXCLUSIVE = (
    ("offload_layers", "pp"),
    ("offload_layers", "recompute_layers"),
    ("cuda_graphs", "fsdp"),
    ("cuda_graphs", "recompute_layers"),
    ("cuda_graphs", "offload_layers"),
)
# Nothing refuses FSDP with pipeline stages, but Megatron-Core 0.12
# (docs/source/api-guide/custom_fsdp.md) lists tensor, expert and context parallelism for it, and no
# published layout has both.
APART = (*EXCLUSIVE, ("fsdp", "pp"))


def excluded(fields: dict[str, Any], key: str) -> Iterator[str]:
    """Yield the fields of a layout that are in use and stay apart from `key`, which is in use as
    well.
    """
    if key not in OFF or fields[key] == OFF[key]:
        return
    for pair in APART:
        if key in pair:
            other = pair[1 - pair.index(key)]
            if fields[other] != OFF[other]:
                yield other


def heads_divide(plan: Plan) -> str | None:
    """Heads share hidden_size evenly, unless they have a size of their own, and query groups share
    the heads.
    """
    model = plan.model
    if model.head_size is None and model.hidden_size % model.num_attention_heads:
        what = (
            f"model.hidden_size={model.hidden_size} is no multiple of"
            f" model.num_attention_heads={model.num_attention_heads}"
        )
        heads = [n for n in divisors(model.hidden_size) if n % model.num_query_groups == 0]
        return Refusal(
            what,
            "change one",
            *({"model.num_attention_heads": n} for n in nearest(heads, model.num_attention_heads)),
        )
    if model.num_attention_heads % model.num_query_groups:
        what = (
            f"model.num_attention_heads={model.num_attention_heads} is no multiple of"
            f" model.num_query_groups={model.num_query_groups}"
        )
        groups = nearest(divisors(model.num_attention_heads), model.num_query_groups)
        return Refusal(what, "change one", *({"model.num_query_groups": n} for n in groups))
    return None


def devices_divide(plan: Plan) -> str | None:
    """parallel_state.py: the world size is a multiple of tp*pp*cp; Slurm: beyond one node, jobs
    take whole nodes.
    """
    m, node = plan.mapping, plan.gpu.devices_per_node
    if plan.num_gpus % (m.tp * m.pp * m.cp):
        what = f"num_gpus={plan.num_gpus} is no multiple of tp*pp*cp={m.tp * m.pp * m.cp}"
        return Refusal(
            what, "change num_gpus or the mapping", *_numbers_of_gpus(plan), *_ranks(plan)
        )
    if plan.num_gpus > node and plan.num_gpus % node:
        what = (
            f"num_gpus={plan.num_gpus} is no whole number of {plan.gpu.name} nodes with {node} GPUs"
            " each"
        )
        return Refusal(
            what, f"use num_gpus={next_multiple(plan.num_gpus, node)}", *_numbers_of_gpus(plan)
        )
    return None


def _numbers_of_gpus(plan: Plan) -> list[Change]:
    """Return the numbers of GPUs around the plan's that are whole replicas, and whole nodes beyond
    one.
    """
    m, node = plan.mapping, plan.gpu.devices_per_node
    ranks = m.tp * m.pp * m.cp
    step = ranks if next_multiple(plan.num_gpus, ranks) <= node else math.lcm(ranks, node)
    above = next_multiple(plan.num_gpus, step)
    return [{"num_gpus": above + i * step} for i in (0, -1, 1, 2, 3) if above + i * step > 0]


def _ranks(plan: Plan) -> list[Change]:
    """Return the ways to split the model that divide the number of GPUs, by one field each; then
    smaller tp on other GPUs.
    """
    m = plan.mapping
    found = list[Change]()
    for name in ("pp", "tp", "cp"):
        others = m.tp * m.pp * m.cp // getattr(m, name)
        if plan.num_gpus % others == 0:
            sizes = nearest(divisors(plan.num_gpus // others), getattr(m, name))
            found += [
                {
                    f"mapping.{name}": size,
                    **({"mapping.vp": 1} if name == "pp" and size == 1 else {}),
                }
                for size in sizes
            ]
    for tp in reversed(divisors(m.tp)[:-1]):
        found.append({"mapping.tp": tp, "num_gpus": next_multiple(plan.num_gpus, tp * m.pp * m.cp)})
    return found


def tensor_parallel_divides(plan: Plan) -> str | None:
    """transformer_config.py: heads and query groups are multiples of tp; so is the MLP's width."""
    sizes = {
        name: getattr(plan.model, name)
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    }
    bad = next((name for name, size in sizes.items() if size % plan.mapping.tp), None)
    if bad is None:
        return None
    what = f"mapping.tp={plan.mapping.tp} does not divide model.{bad}={sizes[bad]}"
    common = divisors(math.gcd(*sizes.values()))
    return Refusal(
        what, "choose a divisor", *({"mapping.tp": tp} for tp in nearest(common, plan.mapping.tp))
    )


def layers_per_stage(plan: Plan) -> int:
    """Return the layers of a pipeline stage, embedding and loss counted where the model counts
    them.
    """
    return (
        plan.model.num_layers + 2 * plan.model.embedding_and_loss_count_as_layers
    ) // plan.mapping.pp


def layers_divide(plan: Plan) -> str | None:
    """transformer_config.py: layers are shared evenly by the stages, and a stage's by its virtual
    stages.
    """
    m, model = plan.mapping, plan.model
    if m.pp == 1 and m.vp == 1:
        return None
    counted = model.num_layers + 2 * model.embedding_and_loss_count_as_layers
    if counted % m.pp or (counted // m.pp) % m.vp:
        with_two = (
            ", embedding and loss counted," if model.embedding_and_loss_count_as_layers else ""
        )
        what = (
            f"mapping.pp={m.pp} times vp={m.vp} does not divide the {counted} layers{with_two} of"
            f" {model.name}"
        )
        return Refusal(what, "choose divisors", *_shares(plan, counted))
    return None


def _shares(plan: Plan, counted: int) -> list[Change]:
    """Return the ways to share layers evenly: embedding and loss counted otherwise, then other
    stages, the nearest first.
    """
    m, counts = plan.mapping, plan.model.embedding_and_loss_count_as_layers
    otherwise: Change = {"model.embedding_and_loss_count_as_layers": not counts}
    stages = [
        {"mapping.pp": pp, "mapping.vp": vp}
        for pp in nearest(divisors(counted), m.pp)
        for vp in nearest(divisors(counted // pp) if pp > 1 else [1], m.vp)
    ]
    changes = [
        {key: value for key, value in each.items() if value != getattr(m, key[-2:])}
        for each in stages
    ]
    for change in changes:  # a number of GPUs that the stages divide
        ranks = m.tp * m.cp * change.get("mapping.pp", m.pp)
        if plan.num_gpus % ranks:
            change["num_gpus"] = next_multiple(
                plan.num_gpus, math.lcm(ranks, min(ranks, plan.gpu.devices_per_node))
            )
    near = sorted(changes, key=len)[:100]
    return (
        [otherwise, *near]
        if (counted - 2 if counts else counted + 2) % (m.pp * m.vp) == 0
        else near
    )


def interleaving_has_a_pipeline(plan: Plan) -> str | None:
    """parallel_state.py: virtual stages need a pipeline; schedules.py: and at least as many
    micro-batches as stages.

    Its remainder (micro-batches modulo stages) must be zero as well, or the run ends in its first
    step.
    """
    m = plan.mapping
    if m.vp > 1 and m.pp == 1:
        return f"mapping.vp={m.vp} needs mapping.pp > 1; use mapping.vp=1"
    micro_batches = m.global_batch // (m.micro_batch * max(1, plan.data_parallel))
    if m.vp > 1 and micro_batches % m.pp:
        more = m.micro_batch * plan.data_parallel * m.pp
        what = (
            f"mapping.vp={m.vp} wants the {micro_batches} micro-batches of a replica to be a"
            f" multiple of mapping.pp={m.pp}"
        )
        advice = f"use mapping.vp=1, or mapping.global_batch a multiple of {more}"
        return Refusal(
            what,
            advice,
            {"mapping.global_batch": next_multiple(m.global_batch, more)},
            {"mapping.vp": 1},
        )
    return None


def batch_divides(plan: Plan) -> str | None:
    """num_microbatches_calculator.py: a global batch is a whole number of micro-batches on every
    replica.
    """
    m, replicas = plan.mapping, plan.data_parallel
    if m.global_batch % (m.micro_batch * replicas):
        what = (
            f"mapping.global_batch={m.global_batch} is no multiple of"
            f" micro_batch*data_parallel={m.micro_batch}*{replicas}"
        )
        batches = [
            next_multiple(m.global_batch, m.micro_batch * replicas * rounds) for rounds in (1, m.pp)
        ]
        changes = ({"mapping.global_batch": batch} for batch in batches)
        return Refusal(
            what,
            f"use e.g. mapping.global_batch={batches[0]}",
            *changes,
            {"mapping.micro_batch": 1},
        )
    return None


def sequence_pieces(plan: Plan) -> int:
    """Return the equal pieces that a sequence is cut in: 2*cp for context parallelism, each by
    tp.
    """
    m = plan.mapping
    return (2 * m.cp if m.cp > 1 else 1) * m.tp


def sequence_divides(plan: Plan) -> str | None:
    """utils.py get_batch_on_this_cp_rank: a rank takes two of 2*cp pieces; sequence parallelism
    shares one by tp.
    """
    pieces = sequence_pieces(plan)
    if plan.seq_length % pieces:
        what = (
            f"seq_length={plan.seq_length} is no multiple of {pieces} (2*cp*tp, the pieces it is"
            " cut in)"
        )
        return Refusal(what, "change it, mapping.cp or mapping.tp", *_sequences(plan, pieces))
    return None


def _sequences(plan: Plan, multiple: int) -> list[Change]:
    """Return the sequence lengths around the plan's that are multiples, of more as well."""
    multiples = [math.lcm(multiple, more) for more in (1, 8, 32, 128)]
    lengths = itertools.chain(
        *(
            (next_multiple(plan.seq_length + 1, of) - of, next_multiple(plan.seq_length, of))
            for of in multiples
        )
    )
    return [{"seq_length": length} for length in lengths if length > 0]


def fp8_features_divide(plan: Plan) -> str | None:
    """Transformer Engine pytorch/utils.py assert_dim_for_fp8_exec: features a multiple of 16
    (MXFP8: 32).

    Under sequence parallelism block scaling gathers inputs in blocks of 128 features
    (pytorch/tensor/float8_blockwise_tensor.py, is_quantizable, 2.5 and 2.11).
    """
    fp8, m, model = plan.precision.fp8, plan.mapping, plan.model
    if fp8 is None or plan.emulated:
        return None
    multiple = FP8_MULTIPLE.get(fp8.scaling, 16)
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * model.head
    gathered = 128 if fp8.scaling == "subchannel" and m.tp > 1 else multiple
    features = {
        "hidden_size": (model.hidden_size, gathered),
        "ffn_hidden_size / tp": (model.ffn_hidden_size // m.tp, multiple),
        "attention width / tp": (model.num_attention_heads * model.head // m.tp, multiple),
        "qkv width / tp": (qkv // m.tp, multiple),
    }
    for name, (size, of) in features.items():
        if size % of:
            what = f"{plan.precision.name} wants {name}={size} to be a multiple of {of}"
            return Refusal(
                what,
                "use precision=bf16",
                *({"mapping.tp": tp} for tp in reversed(divisors(m.tp)[:-1])),
            )
    return None


def fp8_tokens_divide(plan: Plan) -> str | None:
    """The tokens of a GEMM, and those of the share that a rank quantizes before they are gathered.

    A weight's gradient is summed over the tokens of a GEMM, in multiples of 16 (Transformer Engine
    common/gemm/cublaslt_gemm.cu:151 @ f05f12c, :157 @ v2.11) or, with MXFP8, of 32. Sequence
    parallelism gives each tensor-parallel rank a share of them.  Linear and LayerNormLinear check
    the share (pytorch/module/linear.py:131 @ bee4649, :158 @ f05f12c, :177 @ v2.11:
    assert_dim_for_fp8_exec, 8).  MXFP8 quantizes a share in blocks of 32 tokens
    (pytorch/tensor/mxfp8_tensor.py, make_empty), block scaling in blocks of 128 (2.11
    pytorch/utils.py:450 asserts it; 2.5 pytorch/distributed.py:1099 looks only at tensors that are
    not quantized yet).
    """
    fp8, m = plan.precision.fp8, plan.mapping
    if fp8 is None or plan.emulated:
        return None
    tokens = m.micro_batch * plan.seq_length // m.cp
    of_gemm, of_share = FP8_MULTIPLE.get(fp8.scaling, 16), SHARE_MULTIPLE.get(fp8.scaling, 8)
    is_share_wrong = m.tp > 1 and tokens // m.tp % of_share
    if tokens % of_gemm == 0 and not is_share_wrong:
        return None
    what = (
        f"the {tokens // m.tp} tokens of a rank (mapping.micro_batch * seq_length / cp / tp) to be"
        f" a multiple of {of_share}"
        if is_share_wrong
        else (
            f"the {tokens} tokens of a micro-batch (mapping.micro_batch * seq_length / cp) to be a"
            f" multiple of {of_gemm}"
        )
    )
    multiple = math.lcm(of_gemm, of_share * m.tp if m.tp > 1 else 1) * m.cp
    multiple = math.lcm(multiple // math.gcd(multiple, m.micro_batch), sequence_pieces(plan))
    nearest = next_multiple(plan.seq_length, multiple)
    return (
        f"{plan.precision.name} wants {what}; use seq_length={nearest}, or lower mapping.tp or cp"
    )


def bf16_layers_fit_a_stage(plan: Plan) -> str | None:
    """transformer_config.py: the first and the last layers in BF16 are at most a pipeline stage
    each.
    """
    fp8, most = plan.precision.fp8, plan.model.num_layers // plan.mapping.pp
    if fp8 and max(fp8.first_layers_bf16, fp8.last_layers_bf16) > most:
        kept = max(fp8.first_layers_bf16, fp8.last_layers_bf16)
        what = (
            f"precision.fp8 keeps {kept} layers in BF16 at one end, Megatron-Core allows no more"
            f" than a pipeline stage has ({most})"
        )
        ends = {"first": fp8.first_layers_bf16, "last": fp8.last_layers_bf16}
        return Refusal(
            what,
            "keep fewer",
            {
                f"precision.fp8.{end}_layers_bf16": most
                for end, layers in ends.items()
                if layers > most
            },
        )
    return None


def recompute_fits_a_stage(plan: Plan) -> str | None:
    """transformer_block.py recomputes the first recompute_num_layers of each (virtual) stage: there
    are no more than it has.
    """
    m = plan.mapping
    most = -(-layers_per_stage(plan) // m.vp)
    if m.recompute_layers > most:
        what = (
            f"mapping.recompute_layers={m.recompute_layers} is more than the {most} layers of a"
            " (virtual) pipeline stage"
        )
        return Refusal(what, f"use at most {most}", {"mapping.recompute_layers": most})
    return None


def fields_exclude_no_other(plan: Plan) -> str | None:
    """Fields of a layout that Megatron-Core does not take together (`EXCLUSIVE`)."""
    m = plan.mapping
    for pair in EXCLUSIVE:
        if all(getattr(m, name) != OFF[name] for name in pair):
            one, other = (f"mapping.{name}={str(getattr(m, name)).lower()}" for name in pair)
            changes = ({f"mapping.{name}": OFF[name]} for name in pair)
            return Refusal(f"{one} does not work with {other}", "set one of them off", *changes)
    return None


def offload_leaves_a_layer(plan: Plan) -> str | None:
    """transformer_config.py: activations are not offloaded for all layers."""
    m, layers = plan.mapping, plan.model.num_layers
    if m.offload_layers < layers:
        return None
    what = (
        f"mapping.offload_layers={m.offload_layers} must be less than the {layers} layers of"
        f" {plan.model.name}"
    )
    fewer = ({"mapping.offload_layers": number} for number in (layers - 1, 0))
    return Refusal(what, "offload fewer", *fewer)


def cuda_graphs_keep_bf16_layers(plan: Plan) -> str | None:
    """Some stacks' CUDA graphs run layers in FP8 that are kept in BF16 (conf/stack,
    `graphs_drop_bf16_layers`).
    """
    fp8, dropped = plan.precision.fp8, plan.stack.graphs_drop_bf16_layers
    if (
        plan.mapping.cuda_graphs
        and dropped
        and fp8
        and fp8.first_layers_bf16 + fp8.last_layers_bf16
    ):
        none = "precision.fp8.first_layers_bf16=0 and precision.fp8.last_layers_bf16=0"
        return f"mapping.cuda_graphs=true: {dropped}; set mapping.cuda_graphs=false, or {none}"
    return None


def fp8_parameters_are_possible(plan: Plan) -> str | None:
    """transformer_config.py (0.12): no FP8 parameters with MXFP8; and not every stack can shard
    them under FSDP (conf/stack).

    MXFP8's go through the gradient buffer of Megatron-Core 0.13's DistributedDataParallel, which
    its FSDP has not (distributed/custom_fsdp @ 03f77931).

    megatron/core/optimizer/__init__.py:350 has the precision-aware optimizer keep what BF16
    parameters lack to FP32, 16 bits each; given FP8 parameters, Transformer Engine 2.11's FusedAdam
    raises at the first update (measured on an H200).
    """
    fp8 = plan.precision.fp8
    if fp8 is None or not fp8.param_gather:
        return None
    off = "set precision.fp8.param_gather=false"
    kept_in_mxfp8 = fp8.scaling == "mxfp8" and plan.stack.scripts.mxfp8_parameters
    if (fp8.scaling in ("mxfp8", "subchannel") and not kept_in_mxfp8) or plan.stack.emulates_fp8:
        return (
            f"precision.fp8.param_gather: no parameters are kept in FP8 under {fp8.scaling} scaling"
            f" with {plan.stack.name}; {off}"
        )
    if plan.mapping.fsdp and (kept_in_mxfp8 or not plan.stack.fp8_parameters_with_fsdp):
        what = "MXFP8" if kept_in_mxfp8 else "FP8"
        return (
            f"precision.fp8.param_gather: {plan.stack.name} cannot shard {what} parameters with"
            f" mapping.fsdp; {off}"
        )
    if plan.settings.precision_aware_optimizer:
        return (
            "precision.fp8.param_gather: settings.precision_aware_optimizer keeps the rest of BF16"
            f" parameters, FP8 ones have none; {off}"
        )
    return None


def fsdp_gives_the_optimizer_its_gradients(plan: Plan) -> str | None:
    """A precision-aware optimizer trains nothing under some stacks' FSDP (conf/stack,
    `fsdp_drops_gradients`).
    """
    why = plan.stack.fsdp_drops_gradients
    if not (why and plan.mapping.fsdp and plan.settings.precision_aware_optimizer):
        return None
    moments = "" if plan.settings.adam_moments == "fp32" else " settings.adam_moments=fp32"
    return (
        f"settings.precision_aware_optimizer=true with mapping.fsdp=true: {why}"
        f" (conf/stack/{plan.stack.name}.yaml, fsdp_drops_gradients); set"
        f" settings.precision_aware_optimizer=false{moments}, or mapping.fsdp=false"
    )


def gather_overlap_is_possible(plan: Plan) -> str | None:
    """Megatron-LM arguments.py: gathering parameters during the optimizer step needs virtual
    stages, and breaks checkpoints.
    """
    if not plan.settings.overlap_param_gather_with_optimizer_step:
        return None
    off = "set settings.overlap_param_gather_with_optimizer_step=false"
    if plan.mapping.vp == 1:
        return f"settings.overlap_param_gather_with_optimizer_step needs mapping.vp > 1; {off}"
    if plan.settings.checkpoints:
        return (
            "settings.overlap_param_gather_with_optimizer_step does not work with checkpoints;"
            f" {off} or settings.checkpoints=false"
        )
    return None


MAPPING_RULES: tuple[Rule, ...] = (
    heads_divide,
    devices_divide,
    tensor_parallel_divides,
    layers_divide,
    batch_divides,
    interleaving_has_a_pipeline,
    sequence_divides,
    fp8_features_divide,
    fp8_tokens_divide,
    bf16_layers_fit_a_stage,
    recompute_fits_a_stage,
    fields_exclude_no_other,
    offload_leaves_a_layer,
    cuda_graphs_keep_bf16_layers,
    fp8_parameters_are_possible,
    fsdp_gives_the_optimizer_its_gradients,
    gather_overlap_is_possible,
    tp_overlap_is_possible,
)
