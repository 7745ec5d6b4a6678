"""What a GPU has to do: operations, bytes and messages of a layer, of the vocabulary and of a step,
counted from the plan alone.

Counts follow Megatron-Core 0.12 with Transformer Engine: sequence parallelism wherever tp > 1,
fused norms, rotary embedding and activation function, causal attention without stored scores,
gradient accumulation inside wgrad.  Nothing here is fitted: `price` turns counts into seconds.
Sizes are one rank's share of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.predictor.model.gemm import OUTPUT, Efficiency
from analysis.predictor.model.hardware import Hardware, domains, ring_bandwidth
from recipes.estimate.flops import visible_keys
from recipes.estimate.sizes import linear_layers, linear_parameters, training_gemms
from recipes.overlap import overlaps_tp
from recipes.plan import Fp8, Plan

BF16, FP32 = 2, 4  # bytes an element
# Five products where forward has two (FlashAttention-2, arXiv 2307.08691, section 3.1), at a lower
# rate: 3.20 ms where forward takes 1.06 (cuDNN on an H200, analysis/results/layer_h200);
# FlashAttention-3's 600 and 500 TFLOP/s (arXiv 2407.08608) come to the same.
BACKWARD_ATTENTION = 3.0
# How much faster attention is on Blackwell Ultra, forward and backward: its exponentials run twice
# as fast. Where half of a forward pass is exponentials, that is 2 / 1.5; NVIDIA measured 1.35 on
# one forward pass in FP8 (published: "Making Softmax More Efficient with NVIDIA Blackwell Ultra").
# Backward they are a smaller part: five products instead of two, that is 3.5 / 3.  Physics, not
# measured here.
ULTRA_ATTENTION = (4 / 3, 7 / 6)
# By role: Transformer Engine accumulates fprop fast, the others precisely (module/base.py)
GEMM_KINDS = {
    "tensor": {"fprop": "tensor_fast", "dgrad": "tensor_precise", "wgrad": "tensor_precise"},
    "subchannel": {"fprop": "blocks", "dgrad": "blocks", "wgrad": "tiles"},
}
# Bytes an element that a cast reads and writes, beside what BF16 moves: BF16 read once (current
# scaling: twice, first for the largest |x|), FP8 written once by rows and once by columns.
CASTS = {
    "delayed": 2 + 2,
    "current": 2 + 2 + 2,
    "mxfp8": 2 + 2 * (1 + 1 / 32),
    "subchannel": 2 + 2 * (1 + 4 / 128),
}
SLOWER_CAST = {
    "subchannel": 1.3
}  # 2556 GB/s where per-tensor casts reach 3319 (median of inputs, analysis/results/gemm_h200)
FUSED_CAST = (
    1 + 1 - 2 + 1
    # Delayed scaling casts inside the norm, which then writes no BF16; the copy by columns is read
    # and written again
)
# Bytes an FP8 parameter that a rank owns, as if moved: what writing it took on one H100 with
# Transformer Engine 2.11 beyond what is counted (0.064 to 0.073 s for four layers of Llama 3 8B,
# analysis/results/llama3_8b_h100).  Published rows, on 2.2 to 2.5, do not show it.
WRITTEN_FP8 = {"2.11": 197}
# Kernels that the host launches, forward and backward: of a layer in BF16, and what FP8, tp > 1 and
# each further rank of a cp ring add. A layer's in BF16 and what current scaling adds are counted in
# a profile, fills and copies too (analysis/results/layer_h200), the others estimated from what the
# modules do; `launch` and `gap` are fitted with these.
KERNELS, KERNELS_TP, KERNELS_CP, KERNELS_VOCABULARY = (20, 36), (4, 6), (20, 36), (6, 6)
COLLECTIVES = (
    4,
    6,
)  # tensor-parallel messages of a layer, forward and backward (`_tensor_parallel`)
KERNELS_FP8 = {"delayed": (4, 4), "current": (14, 16), "mxfp8": (12, 20), "subchannel": (6, 8)}
# Values of width f that an activation function reads and writes: SwiGLU is one fused kernel each
# way (MCore fusions/fused_bias_swiglu.py), GELU too (fused_bias_gelu.py); squared ReLU is
# torch.pow(relu(x), 2) as written (NeMo llm/fn/activation.py): two kernels forward, four backward
# (PyTorch's pow_backward).
ACTIVATION = {"swiglu": (3, 5), "geglu": (3, 5), "gelu": (2, 3), "squared_relu": (4, 10)}
# A gated function that is not fused (MCore transformer/mlp.py): forward the function and the
# product; backward two products, the function's derivative, and the two halves joined.
UNFUSED_GATED = (5, 13)
# NeMo's attention with a softcap (v2.3.2 gpt/model/gemma2.py) writes its scores: bytes a BF16
# score, forward for the product, division, tanh, multiplication, softmax and the product with
# values; backward for their gradients.  Estimated from the code, not measured.
SCORES = (20, 28)
KERNELS_SCORES = (10, 16)
LOGIT_SOFTCAP = (
    12 + 14
)  # bytes a logit of division, tanh and multiplication, forward and backward, in BF16
# Merging the partial results of a context-parallel ring, bytes an element of the attention's output
# and step: FP32 sum read and written, part read (Transformer Engine pytorch/attention,
# AttnFuncWithCPAndKVP2P); backward the same for dq, and dk and dv.
MERGE = (2 + 2 * FP32, 2 + 2 * FP32)


@dataclass(frozen=True)
class Work:
    """One pass of something: seconds of GEMMs at the measured efficiency, by what multiplies; the
    rest as named.

    `mx_gemm` are the GEMMs of MXFP8, at the speed of per-tensor ones; `tp` and `cp` seconds of
    communication at the links' peak. `tp_bare`: those of tensor-parallel communication with no GEMM
    beside it; `collectives`: how many messages.
    """

    gemm: float = 0.0
    mx_gemm: float = 0.0
    gemm_bytes: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0
    cast_bytes: float = 0.0
    tp: float = 0.0
    tp_bare: float = 0.0
    cp: float = 0.0
    collectives: float = 0.0
    kernels: float = 0.0


@dataclass(frozen=True)
class Layer:
    """A transformer layer's forward and backward pass over one micro-batch."""

    forward: Work
    backward: Work


def tokens(plan: Plan) -> int:
    """Return the tokens of a micro-batch on one context-parallel rank."""
    return plan.mapping.micro_batch * plan.seq_length // plan.mapping.cp


def layer(plan: Plan, hw: Hardware, gemms: Efficiency, in_fp8: bool) -> Layer:
    """Return a layer's work, in FP8 or in BF16."""
    fp8 = plan.precision.fp8 if in_fp8 else None
    counted = [_gemms(plan, hw, gemms, fp8, roles) for roles in (("fprop",), ("dgrad", "wgrad"))]
    return Layer(*(_pass(plan, hw, fp8, direction, *counted[direction]) for direction in (0, 1)))


def _gemms(
    plan: Plan, hw: Hardware, gemms: Efficiency, fp8: Fp8 | None, roles: tuple[str, ...]
) -> tuple[float, float]:
    """Return seconds of multiplying, and of writing, of the linear layers' GEMMs with these
    roles.
    """
    kinds = GEMM_KINDS["subchannel" if fp8 and fp8.scaling == "subchannel" else "tensor"]
    multiply, write = 0.0, 0.0
    for linear in linear_layers(plan.model, tokens(plan), plan.mapping.tp):
        for shape in training_gemms(linear):
            if shape.role in roles:
                output = (
                    2 * _gradient(plan) if shape.role == "wgrad" else OUTPUT
                )  # added to what is there
                a, b = gemms.seconds(
                    hw, kinds[shape.role] if fp8 else "bf16", shape.m, shape.n, shape.k, output
                )
                multiply, write = multiply + a, write + b
    return multiply, write


def _gradient(plan: Plan) -> int:
    return FP32 if plan.settings.grad_reduce_in_fp32 else BF16


def _pass(
    plan: Plan, hw: Hardware, fp8: Fp8 | None, direction: int, multiply: float, write: float
) -> Work:
    m, model, t = plan.mapping, plan.model, tokens(plan)
    backward = direction == 1
    queries = model.num_attention_heads * model.head
    keys = (
        visible_keys(model, plan.seq_length) if model.attention_softcap is None else plan.seq_length
    )  # with a softcap all scores
    attention = 4.0 * queries * keys * t / m.tp * (BACKWARD_ATTENTION if backward else 1)
    mx = fp8 is not None and fp8.scaling == "mxfp8"
    tp, tp_bare = _tensor_parallel(plan, hw, fp8, backward)
    return Work(
        gemm=0.0 if mx else multiply,
        mx_gemm=multiply if mx else 0.0,
        gemm_bytes=write,
        attention=attention / hw.bf16 / (ULTRA_ATTENTION[direction] if hw.ultra else 1.0),
        bytes=activation_bytes(plan, backward)
        + _scores(plan, direction)
        + (m.cp - 1) * MERGE[direction] * t * queries / m.tp,
        cast_bytes=_casts(plan, fp8, backward) if fp8 else 0.0,
        tp=tp,
        tp_bare=tp_bare,
        cp=_context_parallel(plan, hw, backward),
        collectives=COLLECTIVES[direction] if m.tp > 1 else 0,
        kernels=KERNELS[direction]
        + (KERNELS_FP8[fp8.scaling][direction] if fp8 else 0)
        + (KERNELS_SCORES[direction] if model.attention_softcap else 0)
        + (KERNELS_TP[direction] if m.tp > 1 else 0)
        + KERNELS_CP[direction] * (m.cp - 1),
    )


def _key_value(plan: Plan) -> int:
    """Return the width of the keys, which is that of the values."""
    return plan.model.head * plan.model.num_query_groups


def _scores(plan: Plan, direction: int) -> float:
    """Return bytes that scores take on their way through memory, where attention writes them."""
    model = plan.model
    if model.attention_softcap is None:
        return 0.0
    return (
        SCORES[direction]
        * float(model.num_attention_heads)
        * plan.seq_length
        * tokens(plan)
        / plan.mapping.tp
    )


def activation_bytes(plan: Plan, backward: bool) -> float:
    """Return bytes that norms, residual sums, rotary embedding and activation function read and
    write, all of them shared by tp.
    """
    model = plan.model
    h, f, kv = model.hidden_size, model.ffn_hidden_size, _key_value(plan)
    q = model.num_attention_heads * model.head
    normed = (4 if model.post_norms else 2) * h + (q + kv if model.qk_norm else 0)
    norms = (3 if backward else 2) * normed
    residuals = 2 * 3 * h
    split = 2 * (
        2 * q + 2 * kv if backward else q
    )  # of queries from keys and values; backward they are joined again
    rotary = 2 * (q + kv) if model.position_embedding != "learned_absolute" else 0
    two_kernels = model.gated and model.fused_activation is False
    activation = (UNFUSED_GATED if two_kernels else ACTIVATION[model.activation])[backward] * f
    return BF16 * (norms + residuals + split + rotary + activation) * tokens(plan) / plan.mapping.tp


def _casts(plan: Plan, fp8: Fp8, backward: bool) -> float:
    """Return bytes that casting moves: forward the inputs of the linear layers, backward the
    gradients of their outputs.
    """
    model, t, tp = plan.model, tokens(plan), plan.mapping.tp
    h, f, kv = model.hidden_size, model.ffn_hidden_size, _key_value(plan)
    q = model.num_attention_heads * model.head
    each = CASTS[fp8.scaling] * SLOWER_CAST.get(fp8.scaling, 1.0)
    if backward:
        return each * t / tp * (2 * h + q + 2 * kv + f * (2 if model.gated else 1))
    after_norm = FUSED_CAST if fp8.scaling == "delayed" else each
    return t / tp * (after_norm * 2 * h + each * (q + f))


def _tensor_parallel(
    plan: Plan, hw: Hardware, fp8: Fp8 | None, backward: bool
) -> tuple[float, float]:
    """Return seconds of gathering and scattering between the sequence-parallel parts and the linear
    layers: with a GEMM beside them, and without.

    Forward two gathers and two scatters; backward two of each, and two gathers more for the
    weights' gradients.  Inputs and gradients are gathered in FP8, sums are scattered in BF16.
    Userbuffers lay all of it beside GEMMs.  Without them Transformer Engine does so with the
    gathers for the weights' gradients and the scatters backward, which are asynchronous
    (pytorch/module/linear.py:490-500 and :553-560 @ bee4649).
    """
    tp = plan.mapping.tp
    if tp == 1:
        return 0.0, 0.0
    one = tokens(plan) * plan.model.hidden_size * (tp - 1) / tp / ring_bandwidth(hw, tp, 1)
    gather, scatter = one * (1 if fp8 else BF16), one * BF16
    in_order = 2 * gather + (0 if backward else 2 * scatter)
    asynchronous = 2 * gather + 2 * scatter if backward else 0.0
    return (asynchronous + in_order, 0.0) if overlaps_tp(plan) else (asynchronous, in_order)


def _context_parallel(plan: Plan, hw: Hardware, backward: bool) -> float:
    """Return seconds of passing keys and values around the ring; backward their gradients too."""
    m = plan.mapping
    if m.cp == 1:
        return 0.0
    volume = 2 * _key_value(plan) / m.tp * tokens(plan) * BF16 * (m.cp - 1) * (2 if backward else 1)
    return volume / ring_bandwidth(hw, m.cp, m.tp)


def vocabulary(plan: Plan, hw: Hardware, gemms: Efficiency) -> Layer:
    """Return the work of the output layer and the loss, always in BF16.

    Logits are read for the largest, for the sum, and overwritten by their gradient (te), or copied
    to FP32 and passed over there (native).
    """
    m, model, t = plan.mapping, plan.model, tokens(plan)
    v, h = model.vocab_size / m.tp, model.hidden_size
    forward = gemms.seconds(hw, "bf16", t, v, h)
    back = [
        gemms.seconds(hw, "bf16", t, h, v),
        gemms.seconds(hw, "bf16", v, h, t, 2 * _gradient(plan)),
    ]
    passes = 3 * BF16 if plan.settings.cross_entropy_fusion == "te" else 2 * BF16 + 6 * FP32
    passes += LOGIT_SOFTCAP if model.logit_softcap else 0
    gather = t * h * BF16 * (m.tp - 1) / m.tp / ring_bandwidth(hw, m.tp, 1)
    return Layer(
        Work(
            gemm=forward[0],
            gemm_bytes=forward[1],
            bytes=passes * t * v,
            tp=gather,
            kernels=KERNELS_VOCABULARY[0],
        ),
        Work(
            gemm=sum(x for x, _ in back),
            gemm_bytes=sum(y for _, y in back),
            tp=2 * gather,
            kernels=KERNELS_VOCABULARY[1],
        ),
    )


def matrices(plan: Plan) -> float:
    """Return the parameters of a layer's linear maps on one tensor-parallel rank."""
    return linear_parameters(plan.model) / plan.mapping.tp


@dataclass(frozen=True)
class Step:
    """What is done once a step by the stage that holds most parameters: seconds at the links' peak,
    bytes, and domains spanned.
    """

    reduce: float
    gather: float
    domains: int
    optimizer_bytes: float
    cast_bytes: float


def step(plan: Plan, hw: Hardware, layers: int, layers_in_fp8: int, tables: int) -> Step:
    """Return the work once a step of a stage with so many layers and vocabulary tables.

    The distributed optimizer reduces gradients to, and gathers parameters from, the data- and
    context-parallel ranks (FSDP does both while it computes, see `fully_sharded`).  Adam reads the
    gradient, reads and writes its state, writes the parameter; gradients are zeroed and scaled, and
    read for their norm.  FP8 weights are cast anew.
    """
    m, fp8 = plan.mapping, plan.precision.fp8
    ranks = plan.data_parallel * m.cp
    linear = layers * matrices(plan)
    in_fp8 = layers_in_fp8 * matrices(plan)
    everything = linear + tables * plan.model.vocab_size / m.tp * plan.model.hidden_size
    primary = in_fp8 if fp8 and fp8.param_gather else 0.0
    gathered = (
        0.0 if fp8 and fp8.scaling == "mxfp8" else primary
    )  # MXFP8's parameters are gathered in BF16 (recipes/training/gpu.py)
    share = (ranks - 1) / ranks / ring_bandwidth(hw, ranks, m.tp)
    state = 2 * FP32 + 2 * (2 * FP32 if plan.settings.adam_moments == "fp32" else 2 * BF16)
    owned = (
        everything
        / ranks
        * (
            state
            + 2 * _gradient(plan)
            + BF16
            + (0 if plan.settings.precision_aware_optimizer else 3 * FP32)
        )
    )
    written = WRITTEN_FP8.get(plan.stack.versions["transformer_engine"], 0) * primary / ranks
    zeroed = 3 * _gradient(plan) * everything / (ranks if m.fsdp else 1)
    copies = in_fp8 * (2 if primary else CASTS[fp8.scaling]) if fp8 else 0.0
    return Step(
        reduce=0.0 if m.fsdp else _gradient(plan) * everything * share,
        gather=0.0 if m.fsdp else (gathered + BF16 * (everything - gathered)) * share,
        domains=domains(hw, ranks, m.tp),
        optimizer_bytes=owned + zeroed + written,
        cast_bytes=copies,
    )


def fully_sharded(plan: Plan, hw: Hardware, in_fp8: bool) -> tuple[float, float]:
    """Return seconds that FSDP gathers a layer's parameters forward, and gathers them and scatters
    their gradients backward.

    Where it shards over a part of the ranks, the parts add up their shards of the gradients, over
    the network.
    """
    m, fp8 = plan.mapping, plan.precision.fp8
    if not m.fsdp:
        return 0.0, 0.0
    copies = plan.optimizer_instances
    ranks = plan.data_parallel * m.cp // copies
    each = matrices(plan) * (ranks - 1) / ranks / ring_bandwidth(hw, ranks, m.tp)
    gather = each * (1 if in_fp8 and fp8 and fp8.param_gather else BF16)
    added = 2 * (copies - 1) / copies * matrices(plan) / ranks / hw.network
    return gather, gather + (each + added) * _gradient(plan)


def pipeline(plan: Plan, hw: Hardware) -> float:
    """Return seconds at the links' peak that a stage sends and receives a micro-batch: activations
    forward, gradients backward, a chunk.
    """
    m = plan.mapping
    if m.pp == 1:
        return 0.0
    inside = plan.num_gpus <= hw.domain
    message = tokens(plan) * plan.model.hidden_size * BF16 / m.tp
    return 2 * m.vp * message / (hw.nvlink if inside else hw.network)
