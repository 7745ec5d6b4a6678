"""Parameters and bytes of a model, from its dimensions alone.

The counts follow Megatron-Core's GPT model: grouped-query attention, two RMSNorms a layer without bias, a gated
(SwiGLU) or plain (squared ReLU) MLP, an input embedding and an output layer.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Shape:
    """A GEMM of an (m, k) by a (k, n) matrix; `name` says whose it is."""

    name: str
    m: int
    n: int
    k: int


def linear_layers(model: Model, tokens: int) -> list[Shape]:
    """Return the forward GEMMs of a model's four linear layers for a number of tokens, unsharded."""
    h, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * head
    fc1 = model.ffn_hidden_size * (2 if model.activation == "swiglu" else 1)
    sizes = {"linear_qkv": (qkv, h), "linear_proj": (h, h), "linear_fc1": (fc1, h), "linear_fc2": (h, model.ffn_hidden_size)}
    return [Shape(f"{model.name} {name}", tokens, n, k) for name, (n, k) in sizes.items()]
