"""Bytes a GPU needs for a plan, counted before a job is submitted.

Training memory is three things.  State: weights, gradients and Adam's moments, whose size follows
from the parameters a rank holds and from who shares them.  Activations: what each layer keeps for
its backward pass, times the micro-batches a pipeline stage has in flight.  And what is neither:
logits, gathered weights, buffers of NCCL and cuBLAS.  FP8 makes the second smaller and, unless
parameters themselves are FP8, the first larger: a GEMM needs its FP8 weight by rows in the forward
pass and by columns in the backward pass, and Transformer Engine keeps both beside the BF16 weight.

What is kept is read from source: Megatron-Core 0.12.3 ("MCore"), Transformer Engine 2.2 ("TE") and
NeMo v2.3.2.  Every stage of the pipeline is counted and the one that needs most is returned.

Left out: fragmentation beyond the margin; CUDA graphs' private pools; weight gradients of the
output layer that are deferred into the pipeline's bubble (NeMo's defer_embedding_wgrad_compute);
pipeline send and receive buffers; what offloading has in transit; amax histories and scales of
whole tensors; evaluation and checkpoint copies; the CPU.

`python -m recipes.measure.memory` compares the estimate with measured peaks:
`reference/peak_memory.csv` and run folders.  No constant is fitted to one row.  Four were read from
our own runs and not from source: what lies outside PyTorch's allocator, for which the runs are no
independent test; the second FP32 copy of the logits under the native loss, which others measured
too; that zeros are counted in every optimizer step; and the copies of diagnosed emulated FP8.
MXFP8 in hardware, context parallelism, FSDP, offloading and several nodes were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from recipes.estimate.sizes import (
    layer_parameters,
    linear_layers,
    linear_parameters,
    norm_parameters,
)
from recipes.overlap import overlaps_tp
from recipes.plan import Fp8, Plan

BF16, FP32 = 2, 4  # bytes an element
MX_SCALES = 1 / 32  # bytes an element: one E8M0 byte for 32 elements (OCP MX v1.0)
ROW_SCALES = 4 / 128  # one FP32 scale for a 1x128 tile (TE 2.5 Float8BlockScaling, activations)
BLOCK_SCALES = 4 / 128**2  # one FP32 scale for a 128x128 block (the same, weights)

# Adam with FP32 main parameter and two FP32 moments (MCore optimizer/distrib_optimizer.py).  TE's
# FusedAdam, asked to be precision-aware, keeps only the 16 bits of a main parameter that its BF16
# weight lacks (store_param_remainders).
MAIN_PARAMETER, REMAINDER = 4, 2
MOMENTS = {"fp32": 4 + 4, "bf16": 2 + 2}

# Logits, bytes an element.  te: TE's kernel writes the BF16 gradient over the BF16 logits
# (pytorch/triton/cross_entropy.py). native: beside the BF16 logits stand their FP32 copy and its
# exponential (MCore fusions/fused_cross_entropy.py updates in place, but torch.compile, in which it
# runs, does not: 10 bytes in our runs and in NovaSky-AI/SkyRL pull request 1841).
LOGITS = {"te": BF16, "native": BF16 + 2 * FP32}

COUNT_NONZERO = (
    8 + 1
    # Bytes an element of torch.count_nonzero on a GPU: a mask and the 64-bit integers that are
    # summed
)
# CUDA context (0.55e9), loaded kernels, NCCL of one kind of parallelism: measured on 2 H100s
OUTSIDE_PYTORCH = 2.6e9
NCCL_GROUP = (
    0.4e9  # each further kind of parallelism: measured 0.15e9 to 0.77e9 for pipeline parallelism
)
# Workspaces of 32 MiB each from Hopper on: TE's (pytorch/module/base.py) and PyTorch's two, one for
# each thread that multiplies, the main one and autograd's (ATen/cuda/CublasHandlePool.cpp keeps a
# handle a thread and a workspace a handle).
CUBLAS = 3 * 32 * 2**20
# FP32 copies of the widest operand where emulated FP8 is diagnosed
# (recipes/training/fp8/scaling.py, recipe.py): 8 by reading, 9.5 measured beside all other terms
# (analysis/results/fig2_h200, MXFP8).
DIAGNOSED_COPIES = 10
# [tokens, hidden] buffers of tensor-parallel overlap, one a GEMM (TE pytorch/module/base.py,
# initialize_ub)
USERBUFFERS = 10

GIB_PER_GB = (
    2**30 / 1e9
    # A data sheet's GB are GiB: nvidia-smi reads 81559 MiB for "80 GB", 143771 for 141, 183359 for
    # 180, 189471 for 186
)
DRIVER_SHARE = 0.01  # of the device: of an H100's 80 GiB PyTorch sees 79.18
# Of the device, for fragmentation: the caching allocator gives unused blocks back before it fails
MARGIN = 0.02
CACHED_DUMMIES = (2, 3)  # the first TE that keeps them (pytorch/module/base.py, get_dummy_wgrad)
BSHD_UNTIL = (0, 14)  # the first MCore whose TEDotProductAttention takes [s, b] as it is


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU of the pipeline stage that needs most, by what they are for."""

    terms: dict[str, float]
    stage: int = 0

    @property
    def total_gb(self) -> float:
        """All terms, in GB of 1e9 bytes."""
        return sum(self.terms.values()) / 1e9

    @property
    def dominant(self) -> str:
        """The name of the largest term."""
        return max(self.terms, key=lambda name: self.terms[name])


def estimate(plan: Plan, with_step: bool = True) -> Memory:
    """Return the memory of the pipeline stage that needs most, with or without the optimizer's
    step.
    """
    return max(
        (_stage(plan, stage, with_step) for stage in range(plan.mapping.pp)),
        key=lambda memory: memory.total_gb,
    )


def usable_gb(plan: Plan) -> float | None:
    """Return what a job can have of a device, in GB of 1e9 bytes; None where the plan does not
    say.
    """
    return plan.gpu.memory_gb and plan.gpu.memory_gb * GIB_PER_GB * (1 - DRIVER_SHARE - MARGIN)


# -------------------------------------------------------------------------------------------- state


class Weights(NamedTuple):
    """Parameters of one rank: of layers that run in FP8, of layers in BF16 with all norms, of
    embedding and output layer.
    """

    fp8: float
    bf16: float
    vocabulary: float


def _matrices(plan: Plan) -> float:
    """Return the parameters of one layer's linear maps on one tensor-parallel rank."""
    return linear_parameters(plan.model) / plan.mapping.tp


def _vocabulary(plan: Plan) -> int:
    """Return the vocabulary of one tensor-parallel rank.

    It is not padded: recipes/training/recipe.py presets it (NeMo v2.3.2 llm/gpt/model/base.py:340).
    """
    return -(-plan.model.vocab_size // plan.mapping.tp)


def _weights(plan: Plan, stage: int) -> Weights:
    chunks, h = layers_by_chunk(plan, stage), plan.model.hidden_size
    layers, in_fp8 = sum(map(len, chunks)), sum(map(sum, chunks))
    first, last = stage == 0, stage == plan.mapping.pp - 1
    tables = 1 if first and last and plan.model.tied_embeddings else first + last
    beside = layer_parameters(plan.model) - linear_parameters(plan.model)  # norms and biases
    small = beside * layers + norm_parameters(plan.model, h) * last
    positions = (
        plan.seq_length * h if first and plan.model.position_embedding == "learned_absolute" else 0
    )
    vocabulary = tables * _vocabulary(plan) * h + positions
    return Weights(
        in_fp8 * _matrices(plan), (layers - in_fp8) * _matrices(plan) + small, vocabulary
    )


def layers_by_chunk(plan: Plan, stage: int) -> list[list[bool]]:
    """Return a stage's model chunks, each a list with one entry a layer: whether it runs in FP8."""
    m, model, fp8 = plan.mapping, plan.model, plan.precision.fp8
    lent = int(model.embedding_and_loss_count_as_layers)
    per_chunk = (model.num_layers + 2 * lent) // (m.pp * m.vp)
    chunks = []
    for chunk in range(m.vp):
        start = (chunk * m.pp + stage) * per_chunk - lent
        layers = range(max(start, 0), min(start + per_chunk, model.num_layers))
        chunks.append(
            [
                fp8 is not None
                and fp8.first_layers_bf16 <= i < model.num_layers - fp8.last_layers_bf16
                for i in layers
            ]
        )
    return chunks


def _fp8_copies(plan: Plan, fp8: Fp8) -> float:
    """Return bytes of FP8 a weight that runs in FP8.

    Hopper's FP8 GEMM takes one layout only, so that per-tensor scaling keeps a transpose;
    Blackwell's takes both (TE pytorch/utils.py, non_tn_fp8_gemm_supported).  Scales of blocks
    depend on the direction: always two copies.  Emulated FP8 keeps the copy that the backward pass
    multiplies, in BF16 (recipes/training/fp8/linear.py).
    """
    if plan.emulated:
        return BF16
    if fp8.scaling == "mxfp8":
        return 2 * (1 + MX_SCALES)
    if fp8.scaling == "subchannel":
        return 2 * (1 + BLOCK_SCALES)
    return (
        1 if _blackwell(plan) or (plan.mapping.fsdp and fp8.param_gather) else 2
    )  # FSDP drops transposes after use


def _blackwell(plan: Plan) -> bool:
    return int((plan.gpu.compute_capability or "0").split(".")[0]) >= 10


def _shards(plan: Plan) -> int:
    """Return the ranks that share optimizer state: data- and context-parallel (MCore's distributed
    optimizer), of one instance.
    """
    return plan.data_parallel * plan.mapping.cp // plan.optimizer_instances


def _state(plan: Plan, weights: Weights) -> dict[str, float]:
    fp8, fsdp, shards = plan.precision.fp8, plan.mapping.fsdp, _shards(plan)
    primary = (
        weights.fp8 if fp8 and fp8.param_gather else 0.0
    )  # parameters that are FP8 and nothing else
    everything = sum(weights)
    shared = shards if fsdp else 1
    copies = weights.fp8 * _fp8_copies(plan, fp8) if fp8 else 0.0
    small = plan.settings.precision_aware_optimizer and not fsdp
    adam = (
        MOMENTS[plan.settings.adam_moments] * everything
        + MAIN_PARAMETER * primary
        + (REMAINDER if small else MAIN_PARAMETER) * (everything - primary)
    )
    return {
        "weights": BF16 * (everything - primary) / shared,
        "fp8_weights": (
            copies / (shared if primary else 1)
        ),  # TE caches the copies of BF16 weights whole, also under FSDP
        "gradients": _gradient(plan) * everything / shared + _dummies(plan),
        "optimizer": adam / shards,
    }


def stage_state(plan: Plan, stage: int) -> tuple[Weights, dict[str, float]]:
    """Return the parameters of a stage's rank, and bytes of what Megatron-Core makes of them before
    the first step.

    Without what Transformer Engine adds in it: FP8 copies of weights and what it hands autograd.
    """
    weights, fp8 = _weights(plan, stage), plan.precision.fp8
    state, shared = _state(plan, weights), _shards(plan) if plan.mapping.fsdp else 1
    kept = weights.fp8 / shared if fp8 and fp8.param_gather else 0.0
    gradients = state["gradients"] - _dummies(plan)
    return weights, {**state, "fp8_parameters": kept, "gradients": gradients}


def _gradient(plan: Plan) -> int:
    """Return bytes a gradient (MCore distributed_data_parallel.py: FP32, or the BF16 of the
    parameter).
    """
    return FP32 if plan.settings.grad_reduce_in_fp32 else BF16


def _fused_accumulation(plan: Plan) -> bool:
    """Whether weight gradients are added to their buffer inside the GEMM (MCore's FSDP cannot)."""
    asked = plan.settings.gradient_accumulation_fusion
    return asked and not plan.mapping.fsdp and not plan.emulated


def _dummies(plan: Plan) -> float:
    """Return bytes of what TE hands autograd for weight gradients that it added to the buffer.

    One BF16 matrix for each shape of a linear map, shared by all layers and kept for the whole run
    (TE 2.3 and later, pytorch/module/base.py get_dummy_wgrad; before, a linear map makes one in its
    backward pass).
    """
    if not _fused_accumulation(plan) or plan.stack.version("transformer_engine") < CACHED_DUMMIES:
        return 0.0
    shapes = {(shape.n, shape.k) for shape in linear_layers(plan.model, 1, plan.mapping.tp)}
    return float(BF16 * sum(n * k for n, k in shapes))


def _gathered(plan: Plan, weights: Weights) -> float:
    """Return bytes of weights that FSDP holds whole: two layers, embedding and output layer.

    MCore distributed/custom_fsdp gathers the next layer while one computes; what is in no
    transformer layer is taken to stay from its use forward to its use backward.
    """
    if not plan.mapping.fsdp:
        return 0.0
    fp8 = plan.precision.fp8
    return (
        2 * _matrices(plan) * (1 if fp8 and fp8.param_gather else BF16) + weights.vocabulary * BF16
    )


# -------------------------------------------------------------------------------------- activations


def layer_bytes_per_token(plan: Plan, in_fp8: bool) -> float:
    """Return bytes that one layer keeps for its backward pass, a token, on one rank.

    TE keeps of a norm its input and of a linear map its input; of attention q, k, v, output and
    softmax statistics (no matrix of scores); MCore keeps of the activation function its input.  In
    BF16 the attention output is the projection's input, kept once; in FP8 the projection keeps its
    own copy.  In FP8 a linear map keeps one direction of its input (TE pytorch/module/linear.py,
    layernorm_linear.py).  With sequence parallelism all of it is shared over tp.
    """
    model, fp8 = plan.model, plan.precision.fp8
    h, f, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads
    head = model.head
    kept = _fp8_input(fp8) if fp8 and in_fp8 and not plan.emulated else BF16
    norms = 2 * h * (BF16 + kept) + (2 * h * BF16 if model.post_norms else 0)
    attention = (
        BF16 * head * (2 * heads + 2 * model.num_query_groups)
        + FP32 * heads
        + _beside_attention(plan)
    )
    projection = heads * head * kept if in_fp8 or _transposed(plan) else 0
    mlp = BF16 * _fc1_width(plan) + f * kept + (BF16 * f if _two_kernels(plan) else 0)
    dropped = 2 * h if model.dropout else 0  # a byte an element that dropout masks
    return (norms + attention + projection + mlp + dropped) / plan.mapping.tp


def _two_kernels(plan: Plan) -> bool:
    """Whether a gated MLP activates one half and then multiplies, which keeps the activated half
    too (MCore mlp.py, unfused).
    """
    return plan.model.gated and plan.model.fused_activation is False


def _beside_attention(plan: Plan) -> float:
    """Return bytes a token of attention beyond q, k, v and its output.

    A norm of queries and keys keeps its inputs.  Attention with a softcap is NeMo's own (v2.3.2
    gpt/model/gemma2.py): keys and values repeated for each head, the capped scores and the
    probabilities, each a row over the whole sequence.
    """
    model = plan.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    norms = BF16 * model.head * (heads + groups) if model.qk_norm else 0
    if model.attention_softcap is None:
        return norms
    return norms + BF16 * (2 * model.head * (heads - groups) + 2 * heads * plan.seq_length)


def _transposed(plan: Plan) -> bool:
    """Whether the projection's BF16 input is a copy of attention's output.

    MCore before 0.14 turns [s, b] into [b, s] for attention and its output back, by strides
    (extensions/transformer_engine.py:773 and :823 in 0.12.3, with fused rotary embedding); with
    several sequences a micro-batch the projection then needs a contiguous copy.
    """
    several = plan.mapping.micro_batch > 1 and not plan.on_cpu
    return several and plan.stack.version("megatron_core") < BSHD_UNTIL


def _fp8_input(fp8: Fp8) -> float:
    return 1 + {"mxfp8": MX_SCALES, "subchannel": ROW_SCALES}.get(fp8.scaling, 0)


def _fc1_width(plan: Plan) -> int:
    """Return the outputs of the first linear map: two a hidden unit if gated."""
    return plan.model.ffn_hidden_size * (2 if plan.model.gated else 1)


def _tokens(plan: Plan) -> int:
    """Return the tokens of a micro-batch on one context-parallel rank."""
    return plan.mapping.micro_batch * plan.seq_length // plan.mapping.cp


def _chunk_activations(plan: Plan, chunk: list[bool]) -> float:
    """Return bytes one model chunk keeps a micro-batch: of its first recomputed layers only the
    input, then whole layers.
    """
    m = plan.mapping
    recomputed = min(m.recompute_layers, len(chunk))
    whole = sum(
        _kept(plan, in_fp8, offloaded=i < m.offload_layers)
        for i, in_fp8 in enumerate(chunk)
        if i >= recomputed
    )
    return _tokens(plan) * (whole + recomputed * BF16 * plan.model.hidden_size / m.tp)


def _kept(plan: Plan, in_fp8: bool, offloaded: bool) -> float:
    """Return bytes a token of a layer on the GPU: TE offloads what it keeps, and MCore SwiGLU's
    input where the stack does.
    """
    if not offloaded:
        return layer_bytes_per_token(plan, in_fp8)
    if plan.stack.offloads_swiglu:
        return 0.0
    return BF16 * _fc1_width(plan) / plan.mapping.tp


def in_flight(plan: Plan, stage: int) -> list[int]:
    """Return micro-batches whose activations a stage holds, a model chunk (MCore
    pipeline_parallel/schedules.py, 1F1B).

    Without chunks a stage runs pp - stage - 1 forward passes before the first backward one;
    interleaved 2 (pp - stage - 1) + (vp - 1) pp of them, pp micro-batches of one chunk after
    another; then one more.
    """
    m = plan.mapping
    after = m.pp - stage - 1
    ahead = 2 * after + (m.vp - 1) * m.pp if m.vp > 1 else after
    total = m.global_batch // (m.micro_batch * plan.data_parallel) * m.vp
    counts = [0] * m.vp
    for forward in range(min(ahead + 1, total)):
        counts[forward // m.pp % m.vp] += 1
    return counts


def _activations(plan: Plan, stage: int) -> float:
    flights = zip(in_flight(plan, stage), layers_by_chunk(plan, stage), strict=True)
    return sum(count * _chunk_activations(plan, chunk) for count, chunk in flights)


def _logits(plan: Plan, stage: int) -> float:
    """Return bytes of the loss on the last stage: inputs of its layers and the larger of two
    moments.

    Inputs are those of the final norm and the output layer.  The moments: the loss itself (LOGITS);
    and the output layer's backward pass, with the BF16 gradient of the logits, that of its input,
    and a BF16 matrix of its weight's size: the weight's gradient, or what MCore hands autograd
    where the GEMM added it to the buffer (tensor_parallel/layers.py:524, 0.12.3).
    """
    if stage < plan.mapping.pp - 1:
        return 0.0
    h, tokens, vocabulary = plan.model.hidden_size, _tokens(plan), _vocabulary(plan)
    inputs = tokens * BF16 * (2 * h / plan.mapping.tp + (2 * h if plan.mapping.tp > 1 else 0))
    backward = BF16 * (tokens * vocabulary + tokens * h + vocabulary * h)
    capped = BF16 if plan.model.logit_softcap else 0  # the tanh's result, for its backward pass
    return (
        max(tokens * vocabulary * (LOGITS[plan.settings.cross_entropy_fusion] + capped), backward)
        + inputs
    )


def _layer_backward(plan: Plan, stage: int) -> float:
    """Return bytes that a layer's work adds to what is kept for it, at the largest of three
    moments.

    At the activation function: gradients of its output and input, and one more of the layer's
    output, when the input of the second linear map is gone already.  A squared ReLU is two
    functions of PyTorch, whose power keeps two temporaries (MCore fuses SwiGLU alone). At the first
    linear map: input and its gradient, whole over tp, and FP8 copies of the gradient by rows and
    columns, when what the function kept is gone.  A recomputed layer is whole once more, if its
    stage keeps no whole layer; with FSDP two layers' gradients wait for their reduction.  The third
    moment is the end of attention's forward pass under context parallelism, before the MLP's.
    """
    model, m, fp8 = plan.model, plan.mapping, plan.precision.fp8
    chunks = layers_by_chunk(plan, stage)
    in_fp8 = any(map(any, chunks))
    kept = _fp8_input(fp8) if fp8 and in_fp8 and not plan.emulated else BF16
    f, h, width = model.ffn_hidden_size, model.hidden_size, _fc1_width(plan)
    function = BF16 * (
        4 * f
        if model.activation == "squared_relu"
        else f + width + (2 * f if _two_kernels(plan) else 0)
    )
    scores = (
        3 * BF16 * model.num_attention_heads * plan.seq_length if model.attention_softcap else 0
    )  # gradients of scores
    copies = 2 * kept * width if in_fp8 else 0
    gathered = kept * h if m.tp > 1 else 0
    freed = kept * f / m.tp
    moments = (
        (function + BF16 * h) / m.tp - freed,
        gathered + BF16 * h + (copies + BF16 * h) / m.tp - freed,
        (_ring(plan) - BF16 * width) / m.tp - freed,
        scores / m.tp - freed,
    )
    all_layers = m.recompute_layers >= max(map(len, chunks))
    again = layer_bytes_per_token(plan, in_fp8) if all_layers else 0
    reduction = 2 * _matrices(plan) * _gradient(plan) if m.fsdp else 0
    return _tokens(plan) * (max(moments) + again) + reduction


def _ring(plan: Plan) -> float:
    """Return bytes a token that context-parallel attention holds until its forward pass ends.

    Keys and values of every rank, an output for each of them, and their sum (TE 2.2
    pytorch/attention.py, AttnFuncWithCPAndKVP2P: p2p_comm_buffers and out_per_step are lists of cp
    tensors).
    """
    model, cp = plan.model, plan.mapping.cp
    if cp == 1:
        return 0.0
    return (
        BF16 * model.head * (cp * 2 * model.num_query_groups + (cp + 1) * model.num_attention_heads)
    )


# ---------------------------------------------------------------------------------------- the stage


def _workspace(plan: Plan) -> float:
    m = plan.mapping
    further = max(0, sum(size > 1 for size in (m.tp, m.pp, m.cp, plan.data_parallel)) - 1)
    overlap = (
        USERBUFFERS * _tokens(plan) * plan.model.hidden_size * BF16 if overlaps_tp(plan) else 0
    )
    diagnosed = DIAGNOSED_COPIES * FP32 * _tokens(plan) * _fc1_width(plan) if plan.emulated else 0
    return OUTSIDE_PYTORCH + further * NCCL_GROUP + CUBLAS + overlap + diagnosed


def _stage(plan: Plan, stage: int, with_step: bool) -> Memory:
    """Return the terms of one stage at its peak: the end of the forward pass, the backward pass or
    the optimizer's step.
    """
    weights, logits, kept = _weights(plan, stage), _logits(plan, stage), _activations(plan, stage)
    state = _state(plan, weights)
    activations = kept + max(
        0.0, _layer_backward(plan, stage) - logits
    )  # logits are gone when layers go backward
    if with_step:
        state["optimizer"] += max(
            0.0, _step(plan, weights) - activations - logits
        )  # and activations when the optimizer steps
    terms = {
        **state,
        "activations": activations,
        "logits": logits,
        "gathered": _gathered(plan, weights),
    }
    return Memory({**terms, "workspace": _workspace(plan)}, stage)


def _step(plan: Plan, weights: Weights) -> float:
    """Return bytes that live during the optimizer's step alone.

    FP32 copies of BF16 gradients, unless Adam is precision-aware (MCore distrib_optimizer.py:1988);
    and what counting the zeros of the largest gradient takes, which MCore's chained optimizer does
    in every step, asked or not (optimizer.py:1144, clip_grads.py:217; seen in a memory profile of
    NeMo on an H100).
    """
    settings, shards = plan.settings, _shards(plan)
    copies = (
        0.0
        if settings.grad_reduce_in_fp32 or settings.precision_aware_optimizer
        else FP32 * sum(weights) / shards
    )
    table = _vocabulary(plan) * plan.model.hidden_size if weights.vocabulary else 0
    largest = max(table, _fc1_width(plan) * plan.model.hidden_size / plan.mapping.tp)
    return copies + (
        COUNT_NONZERO * min(largest, sum(weights) / shards)
        if settings.count_zero_gradients
        else 0.0
    )
