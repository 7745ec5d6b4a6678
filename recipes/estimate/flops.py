"""Model FLOPs and peaks: the two conventions that stand behind a published TFLOP/s, and what an MFU
divides by.

Model FLOPs count what the mathematics of a step needs, two a multiply-add, the backward pass twice
the forward one, and nothing that an implementation does again.  Attention is counted in two ways:
NeMo 2 counts every score of the sequence (nemo/utils/flops_formulas.py, functions llama3 and
nemotron, v2.3.2), Megatron-LM from core 0.12 on and Megatron-Bridge the half that a causal mask
leaves.  Tokens/s are the same under both, TFLOP/s are not: a number without its convention and its
peak says little.
"""

from __future__ import annotations

from recipes.estimate.sizes import linear_layers
from recipes.plan import Gpu, Model, Precision

PASSES = 3  # one forward, two backward: gradients of the input and of the weight


def layer_flops_per_token(model: Model) -> float:
    """Return forward FLOPs a token of one layer's four linear maps."""
    return sum(2.0 * shape.n * shape.k for shape in linear_layers(model, tokens=1))


def attention_flops_per_token(model: Model, seq_length: int, causal: bool) -> float:
    """Return forward FLOPs a token of one layer's scores and their product with the values, all of
    them or those that a query sees.
    """
    keys = visible_keys(model, seq_length) if causal else seq_length
    return 4.0 * model.num_attention_heads * model.head * keys


def visible_keys(model: Model, seq_length: int) -> float:
    """Return the keys that a query sees under a causal mask, on average over the sequence: half,
    fewer in a sliding window.
    """
    window = min(model.sliding_window or seq_length, seq_length)
    return window - window**2 / (2 * seq_length)


def flops_per_token(model: Model, seq_length: int, causal: bool) -> float:
    """Return model FLOPs a token of a training step, forward and backward, the output layer
    included (the embedding costs none).

    `causal`: attention counted as Megatron-Bridge does (half); otherwise as NeMo 2 does (full).
    """
    layer = layer_flops_per_token(model) + attention_flops_per_token(model, seq_length, causal)
    return PASSES * (model.num_layers * layer + 2.0 * model.vocab_size * model.hidden_size)


def peak_tflops(gpu: Gpu, precision: Precision) -> float | None:
    """Return the dense peak that a number format's MFU is taken against, as NVIDIA's tables do:
    FP8's for FP8; None where unknown.
    """
    return gpu.bf16_dense_tflops if precision.fp8 is None else gpu.fp8_dense_tflops


def mfu(
    tokens_per_s_per_gpu: float, model: Model, seq_length: int, causal: bool, peak: float
) -> float:
    """Return model FLOPs utilisation, a share of `peak` (TFLOP/s) under the convention that
    `causal` names.
    """
    return tokens_per_s_per_gpu * flops_per_token(model, seq_length, causal) / (peak * 1e12)
