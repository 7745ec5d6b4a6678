"""Parameters and bytes of a model, from its dimensions alone.

The counts follow Megatron-Core's GPT model: grouped-query attention, two RMSNorms a layer without bias, a gated
(SwiGLU) or plain (squared ReLU) MLP, an input embedding and an output layer.
"""

from dataclasses import dataclass, replace

from recipes.errors import InputError
from recipes.plan import Model

# BF16 weight 2 + FP32 gradient 4 + FP32 main weight 4 + two FP32 Adam moments 8 (Megatron-Core, mixed precision).
BYTES_PER_PARAMETER_TRAINING = 18


def layer_parameters(model: Model) -> int:
    """Return the parameters of one transformer layer, norms included."""
    head = model.hidden_size // model.num_attention_heads
    qkv = model.hidden_size * (model.num_attention_heads + 2 * model.num_query_groups) * head
    out = model.num_attention_heads * head * model.hidden_size
    matrices = 3 if model.activation == "swiglu" else 2
    return qkv + out + matrices * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size


def parameters(model: Model) -> int:
    """Return the parameters of the whole model, embedding and output layer included."""
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return model.num_layers * layer_parameters(model) + vocabulary + model.hidden_size


def training_state_gb(model: Model) -> float:
    """Return GB (1e9 bytes) of weights, gradients and Adam state of one unsharded replica, activations not counted."""
    return parameters(model) * BYTES_PER_PARAMETER_TRAINING / 1e9


MODELS = ("llama3_8b", "llama3_70b", "llama31_405b", "nemotron4_15b", "nemotron4_340b")  # those of NVIDIA's post


@dataclass(frozen=True)
class Shape:
    """A GEMM of an (m, k) by a (k, n) matrix.

    `name` says whose it is; `model`, `layer` and `role` (fprop, dgrad, wgrad) say it in parts, where it is a linear layer's.
    """

    name: str
    m: int
    n: int
    k: int
    model: str = ""
    layer: str = ""
    role: str = "fprop"


def linear_layers(model: Model, tokens: int, tp: int = 1) -> list[Shape]:
    """Return the forward GEMMs of a model's four linear layers for a number of tokens, one tensor-parallel rank's share.

    Megatron-Core cuts linear_qkv and linear_fc1 along their output, linear_proj and linear_fc2 along their input; the tokens stay
    whole, for sequence parallelism gathers them before the GEMM.  InputError where `tp` does not divide heads, groups and MLP.
    """
    uncut = tp < 1 or any(size % tp for size in (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size))
    if uncut:
        raise InputError(f"tensor parallelism of {tp} does not divide {model.name}'s heads, query groups or MLP; choose a divisor of them")
    h, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * head
    fc1 = model.ffn_hidden_size * (2 if model.activation == "swiglu" else 1)
    sizes = {
        "linear_qkv": (qkv // tp, h),
        "linear_proj": (h, h // tp),
        "linear_fc1": (fc1 // tp, h),
        "linear_fc2": (h, model.ffn_hidden_size // tp),
    }
    return [Shape(f"{model.name} {layer}", tokens, n, k, model.name, layer) for layer, (n, k) in sizes.items()]


def training_gemms(layer: Shape) -> list[Shape]:
    """Return the three GEMMs that training does for a linear layer, given its forward one: output, input gradient, weight gradient."""
    m, n, k = layer.m, layer.n, layer.k
    return [replace(layer, role=role, m=a, n=b, k=c) for role, a, b, c in (("fprop", m, n, k), ("dgrad", m, k, n), ("wgrad", n, k, m))]
