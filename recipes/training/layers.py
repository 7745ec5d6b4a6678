"""Megatron-Core layers whose FP8 is this project's own: linear layers, and attention for a CPU, put in by module spec.

`layer_spec` takes Megatron-Core's local transformer layer and puts, in place of its linear layers (linear_qkv,
linear_proj, linear_fc1, linear_fc2), subclasses whose three GEMMs run in FP8.  The vocabulary layers stay in BF16, as
with Transformer Engine.

On a GPU the rest is Transformer Engine's, as in NeMo's default layers: attention, norms, and the linear maps of layers that are
kept in BF16.  There the norm before linear_qkv and linear_fc1 is fused with them, here it stands alone; both hand BF16 on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from recipes.plan import Fp8
from recipes.training.fp8.linear import Calls, fp8_linear
from recipes.training.fp8.recipe import quantiser


class Fp8Mixin(nn.Module):
    """A parallel linear layer whose GEMMs run in FP8; `fp8_calls` counts them."""

    fp8_calls: Calls

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert _recipe is not None, "set_recipe comes before the model is built"
        self.fp8_quantiser = quantiser(_recipe)  # one with buffers is kept in checkpoints
        self.fp8_calls = Calls()

    @property
    def _forward_impl(self) -> Callable[..., Tensor]:
        return self._fp8_forward

    @_forward_impl.setter
    def _forward_impl(self, value: object) -> None:
        """Megatron-Core 0.12 layers.py:939 and :1174 assign the BF16 GEMM in every forward pass: ignored."""

    def _fp8_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, gradient_accumulation_fusion: bool = False, **kwargs: Any) -> Tensor:
        training = self.training and torch.is_grad_enabled()
        into_main_grad = gradient_accumulation_fusion and hasattr(weight, "main_grad")  # which the data-parallel wrapper gives
        y = fp8_linear(input, weight, self.fp8_quantiser, self.fp8_calls, training, into_main_grad)
        return y if bias is None else y + bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Weights as the parent shards them; amax histories and scales replicated, one copy a layer."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        buffers = {k: v for k, v in self.state_dict(prefix="", keep_vars=True).items() if k.startswith("fp8_quantiser.")}
        state = {k: v for k, v in state.items() if "fp8_quantiser." not in k}
        state.update(make_sharded_tensors_for_checkpoint(buffers, prefix, {}, sharded_offsets))
        return state


class Fp8ColumnParallelLinear(Fp8Mixin, ColumnParallelLinear):
    """ColumnParallelLinear in FP8."""


class Fp8RowParallelLinear(Fp8Mixin, RowParallelLinear):
    """RowParallelLinear in FP8."""


class CpuAttention(DotProductAttention):
    """Causal attention with BF16 operands and FP32 arithmetic, grouped queries included."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Take (sequence, batch, heads, dim) and return (sequence, batch, heads * dim).

        `attention_mask` (batch, 1, sequence, sequence) is True where a token must not look; without document masks it holds
        nothing but causality.
        """
        q, k, v = (t.permute(1, 2, 0, 3).float() for t in (query, key, value))
        seen = ~attention_mask if _document_masks and attention_mask is not None else None
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1).to(query.dtype)


_recipe: Fp8 | None = None
_document_masks = False


def set_recipe(fp8: Fp8 | None, document_masks: bool = False) -> None:
    """Set the recipe of the FP8 layers built from now on, and whether attention on a CPU stays within documents.

    A process-wide setting, because NeMo writes its recipe objects into checkpoints and can write only named functions:
    the spec function below cannot carry a value.
    """
    global _recipe, _document_masks
    _recipe, _document_masks = fp8, document_masks


def _layer(config: Any, with_fp8: bool) -> ModuleSpec:
    """Return one layer; on a GPU all have the same modules for norms, for a checkpoint stacks what layers have in common."""
    from nemo.collections.llm.gpt.model.base import HAVE_TE, local_layer_spec

    spec = local_layer_spec(config)
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.core_attention = CpuAttention
    if HAVE_TE:
        from megatron.core.extensions import transformer_engine as te

        attention.core_attention = te.TEDotProductAttention
        attention.linear_qkv = mlp.linear_fc1 = te.TEColumnParallelLinear
        attention.linear_proj = mlp.linear_fc2 = te.TERowParallelLinear
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = te.TENorm
    if with_fp8:
        attention.linear_qkv = mlp.linear_fc1 = Fp8ColumnParallelLinear
        attention.linear_proj = mlp.linear_fc2 = Fp8RowParallelLinear
    return spec


def layer_spec(config: Any) -> TransformerBlockSubmodules:
    """Return the layers of a GPTConfig: FP8 ones where a recipe is set, its first and last layers kept in BF16."""
    first, last = (_recipe.first_layers_bf16, _recipe.last_layers_bf16) if _recipe else (config.num_layers, 0)
    fp8_layers = range(first, config.num_layers - last)
    layers = [_layer(config, number in fp8_layers) for number in range(config.num_layers)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=LayerNormImpl)


def fp8_modules(model: nn.Module) -> dict[str, Fp8Mixin]:
    """Return the FP8 linear layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Fp8Mixin)}
