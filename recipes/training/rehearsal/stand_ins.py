"""Transformer Engine's layers and optimizer without kernels: parameters of the right shape, and
nothing to compute with.

NeMo and Megatron-Core build another model where Transformer Engine is missing, and Transformer
Engine cannot be imported without CUDA.  `install` puts modules in its place that hold what both use
while a job is built.  Shapes, attributes and checks are those of Transformer Engine 2.2 (commit
bee4649): pytorch/module/linear.py, layernorm_linear.py and base.py,
pytorch/optimizers/fused_adam.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipes.compose.rules import BF16_MOMENTS_SINCE

# A stack's version of Transformer Engine -> what its `__version__` says.  Megatron-Core compares
# it: the development version of 25.04 is older than 2.2 (fp8_utils.py:72 and :96, core_v0.12).
VERSIONS = {"2.2": "2.2.0.dev0"}


class QuantizedTensor(Tensor):
    """A weight that is kept in FP8: `_data` has one byte per element, and goes into Megatron-Core's
    buffers.
    """

    @property
    def _data(self) -> Tensor:
        found: Tensor | None = self.__dict__.get("raw")
        return (
            torch.empty(self.shape, dtype=torch.uint8, device=self.device)
            if found is None
            else found
        )

    @_data.setter
    def _data(self, value: Tensor) -> None:
        self.__dict__["raw"] = value


def replace_raw_data(tensor: QuantizedTensor, new_raw_data: Tensor) -> None:
    """Have a weight's bytes lie in `new_raw_data` (pytorch/tensor/utils.py of 2.2 and later)."""
    tensor._data = new_raw_data


class _Fp8Parameters:
    enabled = False


@contextmanager
def fp8_model_init(enabled: bool = True, **kwargs: Any) -> Iterator[None]:
    """Keep the weights of linear layers that are made within it in FP8."""
    before, _Fp8Parameters.enabled = _Fp8Parameters.enabled, enabled
    try:
        yield
    finally:
        _Fp8Parameters.enabled = before


@contextmanager
def fp8_autocast(**kwargs: Any) -> Iterator[None]:
    """Nothing is computed here."""
    yield


class TransformerEngineBaseModule(nn.Module):
    """A layer with the extra state that each layer writes into checkpoints; before the first step
    it is empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.primary_weights_in_fp8 = _Fp8Parameters.enabled

    @property
    def param_init_meta(self) -> dict[str, Any]:
        """Return for each parameter which FP8 scale it has: its weight the second, others none
        (base.py:640).
        """
        return {
            name: Recipe(fp8_meta_index=1 if name == "weight" else None)
            for name, _ in self.named_parameters(recurse=False)
        }

    def get_extra_state(self) -> Tensor:
        """Return no bytes, as base.py:554 does for a layer that has not run in FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take nothing."""


class Linear(TransformerEngineBaseModule):
    """A linear layer's share on one tensor-parallel rank: weight [out, in] and, where it has one,
    bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp_group: Any = None,
        tp_size: int = 1,
        sequence_parallel: bool = False,
        parallel_mode: str | None = None,
        bias: bool = True,
        params_dtype: Any = None,
        device: Any = "cuda",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.parallel_mode, self.use_bias = parallel_mode, bias
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features = self._share("out_features", out_features)
        elif parallel_mode == "row":
            self.in_features = self._share("in_features", in_features)
        made = {"device": device, "dtype": params_dtype}
        weight = torch.empty(self.out_features, self.in_features, **made)
        kept_in_fp8 = _Fp8Parameters.enabled
        self.weight = nn.Parameter(weight.as_subclass(QuantizedTensor) if kept_in_fp8 else weight)
        self._is_split(self.weight, dim=1 if parallel_mode == "row" else 0)
        self.bias = nn.Parameter(torch.empty(self.out_features, **made)) if bias else torch.empty(0)
        if bias and parallel_mode == "column":
            self._is_split(self.bias, dim=0)
        elif bias:
            self.bias.sequence_parallel = self.sequence_parallel

    def _share(self, name: str, size: int) -> int:
        if size % self.tp_size:
            raise RuntimeError(
                f"{name}={size} is not divisible by tensor-parallel size {self.tp_size}"
            )
        return size // self.tp_size

    @staticmethod
    def _is_split(parameter: Any, dim: int) -> None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = (
            True,
            dim,
            1,
        )


class LayerNormLinear(Linear):
    """A norm of the input, and the linear layer behind it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        normalization: str = "LayerNorm",
        params_dtype: Any = None,
        device: Any = "cuda",
        **kwargs: Any,
    ) -> None:
        made = {"device": device, "dtype": params_dtype}
        super().__init__(
            in_features, out_features, params_dtype=params_dtype, device=device, **kwargs
        )
        for part in ("weight", "bias") if normalization == "LayerNorm" else ("weight",):
            parameter = nn.Parameter(torch.empty(in_features, **made))
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(f"layer_norm_{part}", parameter)


class RMSNorm(nn.Module):
    """A norm on its own: its gain."""

    parts: tuple[str, ...] = ("weight",)

    def __init__(
        self,
        hidden_size: int,
        sequence_parallel: bool = False,
        params_dtype: Any = None,
        device: Any = "cuda",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for part in self.parts:
            parameter = nn.Parameter(torch.empty(hidden_size, device=device, dtype=params_dtype))
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(part, parameter)


class LayerNorm(RMSNorm):
    """A norm on its own: gain and bias."""

    parts = ("weight", "bias")


class DotProductAttention(TransformerEngineBaseModule):
    """Attention, which has no parameters."""

    def __init__(self, num_attention_heads: int, kv_channels: Any, **kwargs: Any) -> None:
        super().__init__()


class GroupedLinear(TransformerEngineBaseModule):
    """The base of Megatron-Core's mixture-of-experts layers, which no model here has."""


class CudaRNGStatesTracker:
    """States by name; nothing is drawn."""

    def __init__(self) -> None:
        self.states_: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget all states."""
        self.states_ = {}

    def get_states(self) -> dict[str, Any]:
        """Return the states."""
        return self.states_

    def set_states(self, states: dict[str, Any]) -> None:
        """Take states."""
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """Name a state."""
        self.states_[name] = seed

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Nothing is drawn within it."""
        yield


class FusedAdam(torch.optim.Optimizer):
    """Adam's state as Transformer Engine keeps it: two moments and, where it holds them, main
    parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        types = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        allowed = [
            torch.float32,
            torch.float16,
            torch.uint8,
            *[torch.bfloat16] * _has_bf16_moments(),
        ]
        for name, dtype in types.items():
            if dtype not in allowed:
                raise RuntimeError(
                    f"Transformer Engine {sys.modules['transformer_engine'].__version__}'s"
                    f" FusedAdam has no {dtype} {name}"
                )
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": True,
            },
        )
        self.types = {**types, **({"master_param": master_weight_dtype} if master_weights else {})}
        self.store_param_remainders = store_param_remainders and master_weights

    def initialize_state(self, param: Tensor) -> None:
        """Make the state of a parameter, as the first step does."""
        for name, dtype in self.types.items():
            remainder = (
                name == "master_param"
                and self.store_param_remainders
                and param.dtype == torch.bfloat16
            )
            self.state[param][name] = torch.empty_like(
                param, dtype=torch.int16 if remainder else dtype
            )

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """Return a state as checkpoints have it: FP32, but for remainders."""
        state: Tensor = self.state[param][state_name]
        return state if state.dtype == torch.int16 else state.float()

    def step(self, closure: Any = None) -> None:
        """Nothing is trained here."""
        raise NotImplementedError


def _has_bf16_moments() -> bool:
    version = sys.modules["transformer_engine"].__version__.split(".")
    return (int(version[0]), int(version[1])) >= BF16_MOMENTS_SINCE


class FusedSGD(torch.optim.SGD):
    """Named by Megatron-Core beside FusedAdam; not used."""


class Recipe:
    """A scaling recipe: what it was made with."""

    def __init__(self, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)


class DelayedScaling(Recipe):
    """Delayed scaling."""


class Float8CurrentScaling(Recipe):
    """Current scaling."""


class MXFP8BlockScaling(Recipe):
    """MXFP8."""


class Float8BlockScaling(Recipe):
    """Sub-channel scaling."""


class Format:
    """Names of the two pairs of FP8 formats."""

    E4M3 = "E4M3"
    HYBRID = "HYBRID"


def unused(*args: Any, **kwargs: Any) -> None:
    """Stand in for a function that is imported while a job is built and called when it trains."""


TE = "transformer_engine"
MODULES: dict[str, dict[str, Any]] = {
    TE: {"is_stand_in": True},
    f"{TE}.common": {},
    f"{TE}.common.recipe": {
        c.__name__: c
        for c in (
            DelayedScaling,
            Float8CurrentScaling,
            MXFP8BlockScaling,
            Float8BlockScaling,
            Format,
        )
    },
    f"{TE}.pytorch": {
        c.__name__: c
        for c in (
            Linear,
            LayerNormLinear,
            RMSNorm,
            LayerNorm,
            DotProductAttention,
            GroupedLinear,
            fp8_model_init,
            fp8_autocast,
        )
    },
    f"{TE}.pytorch.attention": {
        "apply_rotary_pos_emb": unused,
        "_SplitAlongDim": torch.autograd.Function,
    },
    f"{TE}.pytorch.cpu_offload": {"get_cpu_offload_context": lambda *args: (None, unused)},
    f"{TE}.pytorch.cross_entropy": {"parallel_cross_entropy": unused},
    f"{TE}.pytorch.distributed": {
        "CudaRNGStatesTracker": CudaRNGStatesTracker,
        "checkpoint": unused,
    },
    f"{TE}.pytorch.float8_tensor": {"Float8Tensor": QuantizedTensor},
    f"{TE}.pytorch.fp8": {"FP8GlobalStateManager": Recipe, "fp8_autocast": fp8_autocast},
    f"{TE}.pytorch.graph": dict.fromkeys(
        ("restore_fp8_tensors", "save_fp8_tensors", "set_capture_end", "set_capture_start"), unused
    ),
    f"{TE}.pytorch.module": {},
    f"{TE}.pytorch.module.base": {
        "TransformerEngineBaseModule": TransformerEngineBaseModule,
        "initialize_ub": unused,
    },
    f"{TE}.pytorch.optimizers": {
        **{"FusedAdam": FusedAdam, "FusedSGD": FusedSGD},
        **dict.fromkeys(
            ("multi_tensor_applier", "multi_tensor_scale", "multi_tensor_l2norm"), unused
        ),
    },
    f"{TE}.pytorch.tensor": {"QuantizedTensor": QuantizedTensor},
    f"{TE}.pytorch.tensor.float8_tensor": {"Float8Tensor": QuantizedTensor},
    f"{TE}.pytorch.tensor.utils": {"replace_raw_data": replace_raw_data},
    # Megatron-Core 0.12 ssm/mamba_mixer.py:48 raises without it where Transformer Engine is found.
    "mamba_ssm": {},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNorm},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": unused},
    "mamba_ssm.ops.triton.ssd_combined": dict.fromkeys(
        ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"), unused
    ),
    # APEX's kernel, which NeMo's container has (tensor_parallel/layers.py:46).
    "fused_weight_gradient_mlp_cuda": {},
}


def install(version: str) -> None:
    """Put the modules in place, once, before Megatron-Core is imported; they are of a stack's
    version ("2.2").
    """
    if getattr(sys.modules.get(TE), "is_stand_in", False):
        _set_version(version)
        return
    assert "megatron.core" not in sys.modules, (
        "Megatron-Core has looked for Transformer Engine already"
    )
    for name, content in MODULES.items():
        module = ModuleType(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    _set_version(version)


def _set_version(version: str) -> None:
    sys.modules[TE].__version__ = VERSIONS.get(version, f"{version}.0")  # type: ignore[attr-defined]
    if "megatron.core.utils" in sys.modules:
        sys.modules["megatron.core.utils"]._te_version = None  # utils.py:259 keeps the first answer
