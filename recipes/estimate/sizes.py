"""Parameters and bytes of a model, from its dimensions alone.

The counts follow Megatron-Core's GPT model: grouped-query attention, two norms a layer (with norms
behind attention and MLP four), a gated or plain MLP, biases where the model has them, an input
embedding and an output layer.
"""

from dataclasses import dataclass, replace

from recipes.errors import InputError
from recipes.plan import Model

# BF16 weight 2 + FP32 gradient 4 + FP32 main weight 4 + two FP32 Adam moments 8 (Megatron-Core,
# mixed precision).
BYTES_PER_PARAMETER_TRAINING = 18


def linear_parameters(model: Model) -> int:
    """Return the weights of one layer's four linear maps, without biases."""
    return sum(shape.n * shape.k for shape in linear_layers(model, tokens=1))


def norm_parameters(model: Model, width: int) -> int:
    """Return the parameters of one norm over `width` values: a gain, in a LayerNorm a bias too."""
    return width * (2 if (model.normalization or "").startswith("layernorm") else 1)


def layer_parameters(model: Model) -> int:
    """Return the parameters of one transformer layer, norms and biases included."""
    qkv, proj, fc1, fc2 = (shape.n for shape in linear_layers(model, tokens=1))
    biases = (qkv if model.qkv_bias else 0) + (proj + fc1 + fc2 if model.linear_bias else 0)
    norms = (4 if model.post_norms else 2) * norm_parameters(model, model.hidden_size)
    of_heads = 2 * norm_parameters(model, model.head) if model.qk_norm else 0
    return linear_parameters(model) + biases + norms + of_heads


def position_parameters(model: Model) -> int:
    """Return the parameters of learned positions, a row a place of the sequence that the model was
    made for.
    """
    return (
        model.seq_length * model.hidden_size
        if model.position_embedding == "learned_absolute"
        else 0
    )


def parameters(model: Model) -> int:
    """Return the parameters of the whole model, embedding and output layer included."""
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    layers = model.num_layers * layer_parameters(model)
    return (
        layers + vocabulary + position_parameters(model) + norm_parameters(model, model.hidden_size)
    )


def training_state_gb(model: Model) -> float:
    """Return GB (1e9 bytes) of weights, gradients and Adam state of one unsharded replica,
    activations not counted.
    """
    return parameters(model) * BYTES_PER_PARAMETER_TRAINING / 1e9


MODELS = (
    "llama3_8b",
    "llama3_70b",
    "llama31_405b",
    "nemotron4_15b",
    "nemotron4_340b",
)  # those of NVIDIA's post


@dataclass(frozen=True)
class Shape:
    """A GEMM of an (m, k) by a (k, n) matrix.

    `name` says whose it is; `model`, `layer` and `role` (fprop, dgrad, wgrad) say it in parts,
    where it is a linear layer's.
    """

    name: str
    m: int
    n: int
    k: int
    model: str = ""
    layer: str = ""
    role: str = "fprop"


def linear_layers(model: Model, tokens: int, tp: int = 1) -> list[Shape]:
    """Return the forward GEMMs of a model's four linear layers for a number of tokens, one
    tensor-parallel rank's share.

    Megatron-Core cuts linear_qkv and linear_fc1 along their output, linear_proj and linear_fc2
    along their input; the tokens stay whole, for sequence parallelism gathers them before the GEMM.
    InputError where `tp` does not divide heads, groups and MLP.
    """
    uncut = tp < 1 or any(
        size % tp
        for size in (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    )
    if uncut:
        raise InputError(
            f"tensor parallelism of {tp} does not divide {model.name}'s heads, query groups or MLP;"
            " choose a divisor of them"
        )
    h, queries = model.hidden_size, model.num_attention_heads * model.head
    qkv = queries + 2 * model.num_query_groups * model.head
    fc1 = model.ffn_hidden_size * (2 if model.gated else 1)
    sizes = {
        "linear_qkv": (qkv // tp, h),
        "linear_proj": (h, queries // tp),
        "linear_fc1": (fc1 // tp, h),
        "linear_fc2": (h, model.ffn_hidden_size // tp),
    }
    return [
        Shape(f"{model.name} {layer}", tokens, n, k, model.name, layer)
        for layer, (n, k) in sizes.items()
    ]


def training_gemms(layer: Shape) -> list[Shape]:
    """Return the three GEMMs that training does for a linear layer, given its forward one: output,
    input gradient, weight gradient.
    """
    m, n, k = layer.m, layer.n, layer.k
    return [
        replace(layer, role=role, m=a, n=b, k=c)
        for role, a, b, c in (("fprop", m, n, k), ("dgrad", m, k, n), ("wgrad", n, k, m))
    ]
