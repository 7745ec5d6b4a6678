"""Transformer Engine on GPUs: one place for what its versions name differently, for block scaling, and for proof that FP8 ran.

NeMo 25.04 was made for Transformer Engine 2.2.  Newer ones moved two names that Megatron-Core 0.12 imports, and brought
block scaling, which Megatron-Core learned later.  `activate` mends both before NeMo is imported, and does nothing on 2.2 or
without a GPU.  `watch` counts the FP8 GEMMs of a model's linear layers, since NeMo and Megatron-Core train on in BF16
without a word where FP8 is not to be had.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from recipes.training.fp8.linear import Calls

BLOCK_SCALING = "blockwise"  # the name of Megatron-Core 0.13's Fp8Recipe; 0.12 takes any string and knows three


def activate() -> None:
    """Adapt Megatron-Core 0.12 to the Transformer Engine that is there; nothing without a GPU."""
    if not torch.cuda.is_available():
        return
    _numpy_names()
    _moved_names()
    _block_scaling()


def _numpy_names() -> None:
    """NeMo 2.3 and what it imports use names that NumPy 2 dropped."""
    import numpy as np

    for name, value in {"float_": np.float64, "complex_": np.complex128, "Inf": np.inf, "product": np.prod, "cumproduct": np.cumprod}.items():
        if not hasattr(np, name):
            setattr(np, name, value)


def _moved_names() -> None:
    """megatron/core/extensions/transformer_engine.py and models/common/embeddings/rope_utils.py import these from .attention."""
    import transformer_engine.pytorch.attention as attention

    for name, home, there in (("apply_rotary_pos_emb", "attention.rope", "apply_rotary_pos_emb"), ("_SplitAlongDim", "utils", "SplitAlongDim")):
        if not hasattr(attention, name):
            module = __import__(f"transformer_engine.pytorch.{home}", fromlist=[there])
            setattr(attention, name, getattr(module, there))


def _block_scaling() -> None:
    """megatron/core/fp8_utils.py get_fp8_context raises on any recipe but its three: answer for block scaling before it does."""
    from megatron.core import fp8_utils
    from megatron.core.transformer import transformer_block

    original = fp8_utils.get_fp8_context

    @functools.wraps(original)
    def get_fp8_context(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        if config.fp8_recipe != BLOCK_SCALING:
            return original(config, layer_no, is_init)
        kept = config.first_last_layers_bf16 and layer_no >= 0
        first, last = config.num_layers_at_start_in_bf16, config.num_layers - config.num_layers_at_end_in_bf16
        if is_init or (kept and not first <= layer_no < last):
            return nullcontext()  # parameters stay in BF16
        return _block_context(config.fp8)

    fp8_utils.get_fp8_context = transformer_block.get_fp8_context = get_fp8_context


def _block_context(fp8_format: str) -> Any:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    chosen = recipe.Float8BlockScaling(fp8_format={"e4m3": recipe.Format.E4M3, "hybrid": recipe.Format.HYBRID}[fp8_format])
    return te.fp8_autocast(enabled=True, fp8_recipe=chosen)


def watch(model: nn.Module) -> Calls:
    """Return a count of the FP8 GEMMs of `model`'s Transformer Engine linear layers; it grows as the model trains.

    A layer counts when it ran its forward pass in FP8 (its `fp8` attribute, which Transformer Engine sets in each), and its
    two backward GEMMs when the gradient of that pass's output arrives.
    """
    calls = Calls()
    try:
        from transformer_engine.pytorch import LayerNormLinear, Linear
    except ImportError:
        return calls

    def backward(grad: torch.Tensor) -> None:
        calls.dgrad += 1
        calls.wgrad += 1

    def forward(module: Any, inputs: Any, output: Any) -> None:
        if not module.fp8 or not module.training:
            return
        calls.fprop += 1
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(backward)

    for module in model.modules():
        if isinstance(module, (Linear, LayerNormLinear)):
            module.register_forward_hook(forward)
    return calls
