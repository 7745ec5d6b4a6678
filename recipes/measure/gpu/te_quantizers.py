"""Transformer Engine's own quantizers of one linear layer's operands, made as its modules make
them.

A linear layer casts its input and weight in the forward pass and the gradient of its output in the
backward pass, each to a row-wise copy and, where the GPU's FP8 GEMM wants both operands along K
(Hopper), a transposed one beside it.  Which kernel does that is decided by the quantizer, and which
quantizer by the recipe; `RecipeState` is where modules get theirs (module/base.py,
`set_meta_tensor`, the same in Transformer Engine 2.2 and 2.11), so that what is measured here is
what training runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from recipes.plan import Scaling

RECIPES = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "subchannel": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
FORMATS = {
    "delayed": "HYBRID",
    "current": "HYBRID",
    "subchannel": "E4M3",
    "mxfp8": "E4M3",
}  # as in conf/precision


@dataclass(frozen=True)
class Quantizers:
    """A quantizer for each operand; calling one on a BF16 tensor of (rows, columns) returns
    Transformer Engine's FP8 tensor.
    """

    input: Any
    weight: Any
    gradient: Any


def quantizers(scaling: Scaling) -> Quantizers:
    """Return the quantizers that a linear layer has under `scaling`, both copies asked for.

    Whatever Transformer Engine raises passes through: ImportError without it, AttributeError where
    its version lacks the recipe.
    """
    import transformer_engine.pytorch  # noqa: F401  loads the libraries that the next two need
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.fp8 import RecipeState

    chosen = getattr(recipe, RECIPES[scaling])(fp8_format=recipe.Format[FORMATS[scaling]])
    forward = RecipeState.create(
        chosen, mode="forward", num_quantizers=3
    ).make_quantizers()  # input, weight, output
    backward = RecipeState.create(
        chosen, mode="backward", num_quantizers=2
    ).make_quantizers()  # gradients of output and input
    found = Quantizers(forward[0], forward[1], backward[0])
    for quantizer in (found.input, found.weight, found.gradient):
        quantizer.set_usage(rowwise=True, columnwise=True)
        # module/linear.py: a plain storage, which costs the host less than a tensor subclass
        quantizer.internal = True
    return found


def copies(quantized: Any) -> list[Tensor]:
    """Return the tensors that a cast wrote: the FP8 data, row-wise and transposed as far as made,
    and the inverse scales.
    """
    names = (
        "_data",
        "_transpose",
        "_scale_inv",
        "_rowwise_data",
        "_columnwise_data",
        "_rowwise_scale_inv",
        "_columnwise_scale_inv",
    )
    return [found for name in names if (found := getattr(quantized, name, None)) is not None]


def version() -> str | None:
    """Return the version of the Transformer Engine that is there; None without one."""
    try:
        import transformer_engine
    except (ImportError, OSError, RuntimeError):
        return None
    return str(getattr(transformer_engine, "__version__", "unknown"))
