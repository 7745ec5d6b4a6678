"""Transformer Engine on GPUs: one place for what its versions name differently, and for block
scaling.

NeMo 25.04 was made for Transformer Engine 2.2.  Newer ones moved two names that Megatron-Core 0.12
imports, and brought block scaling, which Megatron-Core learned later.  `activate` fixes both before
NeMo is imported, lets checkpoints be written under newer PyTorch, stands in for the one kernel of
APEX that NeMo's container has and other machines lack, takes out what only leaves garbage, and does
nothing without a GPU.
"""

from __future__ import annotations

import functools
import inspect
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from recipes.plan import Plan
from recipes.training.compat.checkpoint_writer import adapt_writer

PIECE = 2**28  # elements of which FusedAdam copies the moments at once, 2 GiB
# The name of Megatron-Core 0.13's Fp8Recipe; 0.12 takes any string and knows three
BLOCK_SCALING = "blockwise"


def activate(plan: Plan) -> None:
    """Adapt Megatron-Core 0.12 to the Transformer Engine that is there, before NeMo is imported;
    nothing without a GPU.
    """
    if not torch.cuda.is_available():
        return
    _numpy_names()
    _moved_names()
    _fused_weight_gradient()
    know_block_scaling()
    _no_walk_over_arguments()
    adapt_writer()
    if not plan.settings.count_zero_gradients:
        _no_count_of_zeros()
    if plan.settings.adam_kernel == "triton":
        _adam_kernel()
    elif plan.settings.adam_moments != "fp32":
        _moments_in_pieces()
    if plan.settings.swiglu_backward == "transformer_engine":
        _swiglu_backward()


def _numpy_names() -> None:
    """NeMo 2.3 and what it imports use names that NumPy 2 dropped."""
    import numpy as np

    for name, value in {
        "float_": np.float64,
        "complex_": np.complex128,
        "Inf": np.inf,
        "product": np.prod,
        "cumproduct": np.cumprod,
    }.items():
        if not hasattr(np, name):
            setattr(np, name, value)


def _moved_names() -> None:
    """megatron/core/extensions/transformer_engine.py and models/common/embeddings/rope_utils.py
    import these from .attention.
    """
    import transformer_engine.pytorch.attention as attention

    for name, home, there in (
        ("apply_rotary_pos_emb", "attention.rope", "apply_rotary_pos_emb"),
        ("_SplitAlongDim", "utils", "SplitAlongDim"),
    ):
        if not hasattr(attention, name):
            module = __import__(f"transformer_engine.pytorch.{home}", fromlist=[there])
            setattr(attention, name, getattr(module, there))


def _fused_weight_gradient() -> None:
    """Give NeMo and Megatron-Core the GEMM of APEX that adds a weight's gradient to main_grad
    (tensor_parallel/layers.py:508).

    Without it NeMo (llm/gpt/model/base.py:43) turns the fusion off for every layer, Transformer
    Engine's own included.
    """
    name = "fused_weight_gradient_mlp_cuda"
    if name in sys.modules or find_spec(name):
        return
    module: Any = ModuleType(name)
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate_weight_gradient
    sys.modules[name] = module


def accumulate_weight_gradient(
    x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor
) -> None:
    """Add grad^T x to `main_grad` (out, in; FP32 or BF16) in one GEMM; x (tokens, in), grad
    (tokens, out).
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    more = {}
    if "workspace" in inspect.signature(general_gemm).parameters:  # 2.2 and 2.5
        from transformer_engine.pytorch.module.base import get_workspace

        more["workspace"] = get_workspace()
    general_gemm(
        x,
        grad,
        out_dtype=main_grad.dtype,
        layout="NT",
        out=main_grad,
        accumulate=True,
        grad=True,
        **more,
    )


def _no_walk_over_arguments() -> None:
    """Take out a walk over the arguments of every call on a quantised tensor (TE 2.10 and 2.11,
    pytorch/quantized_tensor.py, __torch_function__).

    It changes none of them, for its check asks whether a class is an instance of itself.  Each walk
    leaves a cycle of references, which only a garbage collection takes away: 30,000 objects in a
    step of the whole Llama 3 8B on one GPU.
    """
    try:
        from transformer_engine.pytorch.quantized_tensor import QuantizedTensor
    except ImportError:
        return  # older ones have the class in tensor/, without the walk
    code = getattr(getattr(QuantizedTensor.__torch_function__, "__func__", None), "__code__", None)
    if code and "tree_map" in code.co_names:
        QuantizedTensor.__torch_function__ = classmethod(_straight)


def _straight(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return torch._C._disabled_torch_function_impl(
        func, types, args, kwargs or {}
    )  # what it ends in


def _no_count_of_zeros() -> None:
    """megatron/core/optimizer/optimizer.py:1144 counts the zeros of all gradients in each step,
    whatever log_num_zeros_in_grad says.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    ChainedOptimizer.count_zeros = lambda self: None


def _adam_kernel() -> None:
    """Have FusedAdam step by this project's kernel, which reads and writes BF16 moments as they
    are.
    """
    from transformer_engine.pytorch.optimizers import FusedAdam

    from recipes.training.adamw import step

    FusedAdam.step = step


def _swiglu_backward() -> None:
    """megatron/core/fusions/fused_bias_swiglu.py (0.12, 0.13) has PyTorch compile SwiGLU's
    gradient: take Transformer Engine's kernel.

    Both compute in FP32 and round once to BF16.
    """
    import transformer_engine_torch
    from megatron.core.fusions import fused_bias_swiglu

    @torch.compiler.disable  # what is compiled around it, for models with biases, calls it as it is
    def swiglu_back(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gradient: torch.Tensor = transformer_engine_torch.dswiglu(grad, x, None)
        return gradient

    fused_bias_swiglu.swiglu_back = swiglu_back


def _moments_in_pieces() -> None:
    """Let FusedAdam step over a part of the parameters at a time, each entry of param_groups cut
    into pieces.

    TE 2.11 pytorch/optimizers/fused_adam.py step makes FP32 copies of the narrow moments of a whole
    entry: with Megatron-Core's two entries all of them live at once, 8 bytes a parameter, and the
    memory that narrow moments save is gone.
    """
    from transformer_engine.pytorch.optimizers import FusedAdam

    whole_step = FusedAdam.step

    @functools.wraps(whole_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        groups = self.param_groups
        pieces = [pieces_of(group) for group in groups]
        try:
            self.param_groups = [piece for of_group in pieces for piece in of_group]
            return whole_step(self, *args, **kwargs)
        finally:
            self.param_groups = groups
            for group, of_group in zip(groups, pieces, strict=True):
                group.update(
                    {key: value for key, value in (of_group or [{}])[-1].items() if key != "params"}
                )  # its count of steps

    FusedAdam.step = step


def pieces_of(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `group` cut into groups of at most PIECE elements, or one parameter; their order is
    kept.
    """
    pieces: list[dict[str, Any]] = []
    size = PIECE
    for parameter in group["params"]:
        if size + parameter.numel() > PIECE or not pieces:
            pieces.append({**group, "params": []})
            size = 0
        pieces[-1]["params"].append(parameter)
        size += parameter.numel()
    return pieces


@functools.cache
def know_block_scaling() -> None:
    """megatron/core/fp8_utils.py get_fp8_context raises on any recipe but its three: answer for
    block scaling before it does.

    Megatron-Core 0.13 has block scaling of its own (enums.py, Fp8Recipe.blockwise): left as it is.
    """
    from megatron.core import fp8_utils
    from megatron.core.enums import Fp8Recipe
    from megatron.core.transformer import transformer_block

    if hasattr(Fp8Recipe, BLOCK_SCALING):
        return
    original = fp8_utils.get_fp8_context

    @functools.wraps(original)
    def get_fp8_context(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        if config.fp8_recipe != BLOCK_SCALING:
            return original(config, layer_no, is_init)
        kept = config.first_last_layers_bf16 and layer_no >= 0
        first, last = (
            config.num_layers_at_start_in_bf16,
            config.num_layers - config.num_layers_at_end_in_bf16,
        )
        if is_init or (kept and not first <= layer_no < last):
            return nullcontext()  # parameters stay in BF16
        return _block_context(config.fp8)

    fp8_utils.get_fp8_context = transformer_block.get_fp8_context = get_fp8_context


def _block_context(fp8_format: str) -> Any:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    chosen = recipe.Float8BlockScaling(
        fp8_format={"e4m3": recipe.Format.E4M3, "hybrid": recipe.Format.HYBRID}[fp8_format]
    )
    return te.fp8_autocast(enabled=True, fp8_recipe=chosen)
