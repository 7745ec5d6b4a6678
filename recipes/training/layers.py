"""Megatron-Core layers whose FP8 is this project's own: linear layers, and attention for a CPU, put
in by module spec.

`layer_spec` takes Megatron-Core's local transformer layer and puts, in place of its linear layers
(linear_qkv, linear_proj, linear_fc1, linear_fc2), subclasses whose three GEMMs run in FP8.  The
vocabulary layers stay in BF16, as with Transformer Engine.

On a GPU the rest is Transformer Engine's, as in NeMo's default layers: attention, norms, and the
linear maps of layers that are kept in BF16.  There the norm before linear_qkv and linear_fc1 is
fused with them, here it stands alone; both hand BF16 on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from nemo.collections.llm.gpt.model.gemma2 import (
    Gemma2Config,
    Gemma2DotProductAttention,
    TERowParallelLinearLayerNorm,
)
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

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
        """Megatron-Core 0.12 layers.py:939 and :1174 assign the BF16 GEMM in every forward pass:
        ignored.
        """

    def _fp8_forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        training = self.training and torch.is_grad_enabled()
        into_main_grad = gradient_accumulation_fusion and hasattr(
            weight, "main_grad"
        )  # which the data-parallel wrapper gives
        y = fp8_linear(input, weight, self.fp8_quantiser, self.fp8_calls, training, into_main_grad)
        return y if bias is None else y + bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Weights as the parent shards them; amax histories and scales replicated, one copy a
        layer.
        """
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        buffers = {
            k: v
            for k, v in self.state_dict(prefix="", keep_vars=True).items()
            if k.startswith("fp8_quantiser.")
        }
        state = {k: v for k, v in state.items() if "fp8_quantiser." not in k}
        state.update(make_sharded_tensors_for_checkpoint(buffers, prefix, {}, sharded_offsets))
        return state


class Fp8ColumnParallelLinear(Fp8Mixin, ColumnParallelLinear):
    """ColumnParallelLinear in FP8."""


class Fp8RowParallelLinear(Fp8Mixin, RowParallelLinear):
    """RowParallelLinear in FP8."""


class NormedOutput(nn.Module):
    """A row-parallel linear layer with a norm behind it, as in Gemma 2: NeMo v2.3.2
    gpt/model/gemma2.py, TERowParallelLinearLayerNorm.

    NeMo leaves the norm's epsilon at TENorm's default of 1e-5, and so does this.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = norm_of(config)(config, output_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the normed output, and the bias that is left to add."""
        output, bias = super().forward(x)
        return self.post_layernorm(output), bias


class NormedRowParallelLinear(NormedOutput, RowParallelLinear):
    """RowParallelLinear with a norm behind it."""


class NormedFp8RowParallelLinear(NormedOutput, Fp8RowParallelLinear):
    """RowParallelLinear in FP8 with a norm behind it."""


class ShiftedNorm(nn.Module):
    """RMSNorm or LayerNorm whose gain is stored less one, in FP32 arithmetic: PyTorch has none
    (Transformer Engine: zero_centered_gamma).
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = (
            nn.Parameter(torch.zeros(hidden_size)) if config.normalization == "LayerNorm" else None
        )
        _of_part_of_sequence(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm over the last dimension, in the type of `x`."""
        gain, shape = self.weight.float() + 1, x.shape[-1:]
        if self.bias is None:
            return rms_norm(x.float(), shape, gain, self.eps).to(x.dtype)
        return layer_norm(x.float(), shape, gain, self.bias.float(), self.eps).to(x.dtype)


class TorchNorm(nn.Module):
    """PyTorch's norm of a configuration; Megatron-Core's own wrapper of it refuses sequence
    parallelism (transformer/torch_norm.py).

    Its parameters are marked, so that their gradients are summed over the ranks that have a part of
    the sequence each (distributed/finalize_model_grads.py, _allreduce_layernorm_grads).
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = (
            nn.Parameter(torch.zeros(hidden_size)) if config.normalization == "LayerNorm" else None
        )
        _of_part_of_sequence(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm over the last dimension."""
        if self.bias is None:
            return rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def _of_part_of_sequence(norm: Any, config: Any) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel


def norm_of(config: Any) -> Any:
    """Return the class of a model's norms: Transformer Engine's where it is there, else PyTorch's
    or, with a shifted gain, ours.
    """
    from nemo.collections.llm.gpt.model.base import HAVE_TE

    if HAVE_TE:
        return LayerNormImpl
    return ShiftedNorm if config.layernorm_zero_centered_gamma else TorchNorm


class CpuAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention with BF16 operands and FP32 arithmetic: grouped queries, sliding window,
    softcap and dropout.

    It takes the place of Megatron-Core's DotProductAttention, which asserts that there is no
    window.  A window of (w, 0) lets a query see w keys before its own, as Transformer Engine's
    (pytorch attention, get_swa_mask).  With a softcap c scores become c tanh(score / c), and their
    scale is that of `query_pre_attn_scalar`, as in NeMo's Gemma 2; its window does not reach them,
    for the plan has no longer sequences (recipes/compose/model_rules.py).
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.softcap: float | None = getattr(config, "attn_logit_softcapping", None)
        of_gemma2: float | None = getattr(config, "query_pre_attn_scalar", None)
        self.scale = of_gemma2**-0.5 if of_gemma2 else softmax_scale  # None: of the head's size
        self.window: int | None = (
            config.window_size[0] if config.window_size and not self.softcap else None
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Take (sequence, batch, heads, dim) and return (sequence, batch, heads * dim).

        `attention_mask` (batch, 1, sequence, sequence) is True where a token must not look; without
        document masks it holds nothing but causality.
        """
        q, k, v = (t.permute(1, 2, 0, 3).float() for t in (query, key, value))
        seen = self._seen(query.shape[0], attention_mask)
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.softcap:
            out = self._capped(q, k, v, seen, dropout)
        else:
            grouped = q.shape[1] != k.shape[1]
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=seen,
                is_causal=seen is None,
                enable_gqa=grouped,
                dropout_p=dropout,
                scale=self.scale,
            )
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1).to(query.dtype)

    def _seen(self, length: int, attention_mask: Tensor | None) -> Tensor | None:
        """Return the keys that each query sees; None: all up to its own."""
        seen = ~attention_mask if _document_masks and attention_mask is not None else None
        if self.window is None or self.window >= length:
            return seen
        place = torch.arange(length)
        before = place[:, None] - place
        inside = (before >= 0) & (before <= self.window)
        return inside if seen is None else seen & inside

    def _capped(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float
    ) -> Tensor:
        heads = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(heads, dim=1), v.repeat_interleave(heads, dim=1)
        scores = self.softcap * torch.tanh(q @ k.transpose(-1, -2) * self.scale / self.softcap)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if seen is None else seen
        return nn.functional.dropout(scores.masked_fill(~seen, -torch.inf).softmax(-1), dropout) @ v


_recipe: Fp8 | None = None
_document_masks = False


def set_recipe(fp8: Fp8 | None, document_masks: bool = False) -> None:
    """Set the recipe of the FP8 layers built from now on, and whether attention on a CPU stays
    within documents.

    A process-wide setting, because NeMo writes its recipe objects into checkpoints and can write
    only named functions: the spec function below cannot carry a value.
    """
    global _recipe, _document_masks
    _recipe, _document_masks = fp8, document_masks


def _layer(config: Any, with_fp8: bool) -> ModuleSpec:
    """Return one layer; on a GPU all have the same modules for norms, for a checkpoint stacks what
    layers have in common.
    """
    from nemo.collections.llm.gpt.model.base import HAVE_TE, local_layer_spec

    spec = local_layer_spec(config)
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.core_attention = CpuAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm_of(config)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm_of(config)
    if HAVE_TE:
        from megatron.core.extensions import transformer_engine as te

        attention.core_attention = (
            Gemma2DotProductAttention if _is_gemma2(config) else te.TEDotProductAttention
        )
        attention.linear_qkv = mlp.linear_fc1 = te.TEColumnParallelLinear
    if with_fp8:
        attention.linear_qkv = mlp.linear_fc1 = Fp8ColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = _row_parallel(config, with_fp8)
    return spec


def _row_parallel(config: Any, with_fp8: bool) -> Any:
    """Return the class of linear_proj and linear_fc2: in FP8 or not, with a norm behind it or
    not.
    """
    from nemo.collections.llm.gpt.model.base import HAVE_TE

    if with_fp8:
        return NormedFp8RowParallelLinear if _is_gemma2(config) else Fp8RowParallelLinear
    if not HAVE_TE:
        return NormedRowParallelLinear if _is_gemma2(config) else RowParallelLinear
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    return TERowParallelLinearLayerNorm if _is_gemma2(config) else TERowParallelLinear


def _is_gemma2(config: Any) -> bool:
    """Whether a model has the layers of Gemma 2: norms behind attention and MLP, and a softcap on
    its scores.
    """
    return isinstance(config, Gemma2Config)


def layer_spec(config: Any) -> TransformerBlockSubmodules:
    """Return the layers of this rank's chunk of a GPTConfig: FP8 ones where a recipe is set, its
    first and last layers kept in BF16.
    """
    first, last = (
        (_recipe.first_layers_bf16, _recipe.last_layers_bf16) if _recipe else (config.num_layers, 0)
    )
    fp8_layers = range(first, config.num_layers - last)
    start = get_transformer_layer_offset(config)
    layers = [
        _layer(config, number in fp8_layers)
        for number in range(start, start + get_num_layers_to_build(config))
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_of(config))


def fp8_modules(model: nn.Module) -> dict[str, Fp8Mixin]:
    """Return the FP8 linear layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Fp8Mixin)}
