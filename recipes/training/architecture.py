"""What model does a NeMo recipe build?  Read from NeMo's own configuration of it, before the plan's
values are put in.

The job asks this, so that a NeMo that differs from the list (recipes/nemo_recipes.py) is noticed
before a step is made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import nemo_run as run
from nemo.collections.llm.fn.activation import openai_gelu, squared_relu
from nemo.collections.llm.gpt.model.gemma import GemmaModel
from nemo.collections.llm.gpt.model.gemma2 import Gemma2Model, gemma2_layer_spec
from torch.nn import functional

from recipes.errors import InputError
from recipes.nemo_recipes import ARCHITECTURE, FIXED, Value
from recipes.plan import Plan

ACTIVATIONS = {
    (functional.silu, True): "swiglu",
    (functional.gelu, True): "geglu",
    (openai_gelu, True): "geglu",
    (functional.gelu, False): "gelu",
    (openai_gelu, False): "gelu",
    (squared_relu, False): "squared_relu",
}
NORMS = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}


def architecture(model: run.Config) -> dict[str, Value]:
    """Return the architecture of a recipe's model by the names of the plan's fields; KeyError for
    an unknown activation.
    """
    config = model.config
    rope, window = config.position_embedding_type == "rope", _window(config)
    found = {
        "head_size": config.kv_channels,
        "tied_embeddings": config.share_embeddings_and_output_weights,
        "sliding_window": window[0] if window else None,
        "activation": ACTIVATIONS[config.activation_func, config.gated_linear_unit],
        "fused_activation": config.bias_activation_fusion,
        "normalization": NORMS[config.normalization] + "1p" * config.layernorm_zero_centered_gamma,
        "post_norms": config.transformer_layer_spec is gemma2_layer_spec,
        "linear_bias": config.add_bias_linear,
        "qkv_bias": config.add_bias_linear or config.add_qkv_bias,
        "qk_norm": config.qk_layernorm,
        "position_embedding": config.position_embedding_type,
        "rotary_base": float(config.rotary_base) if rope else None,
        "rotary_percent": float(config.rotary_percent) if rope else None,
        "rope_scaling": _optional(config, "scale_factor"),
        "attention_softcap": _optional(config, "attn_logit_softcapping"),
        "logit_softcap": _optional(config, "final_logit_softcapping"),
        "embedding_scaling": issubclass(model.__fn_or_cls__, GemmaModel | Gemma2Model),
        "dropout": float(max(config.hidden_dropout, config.attention_dropout)),
    }
    assert found.keys() == set(ARCHITECTURE)
    return found


def _window(config: run.Config) -> Any:
    """Return the window as set, or the default of the class: Mistral's comes from a factory, which
    Fiddle does not call.
    """
    if "window_size" in config.__arguments__:
        return config.window_size
    field = next(
        field for field in dataclasses.fields(config.__fn_or_cls__) if field.name == "window_size"
    )
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _optional(config: run.Config, name: str) -> float | None:
    return float(getattr(config, name)) if name in dir(config) else None


def refuse_another(model: run.Config, plan: Plan) -> None:
    """Raise InputError where NeMo's model is not the plan's; a field that the plan leaves open is
    not compared.
    """
    theirs = architecture(model)
    for name in FIXED:
        ours = getattr(plan.model, name)
        if ours is not None and ours != theirs[name]:
            what = (
                f"the plan has model.{name}={ours}, the NeMo that is installed builds"
                f" {plan.model.nemo_recipe} with {theirs[name]}"
            )
            raise InputError(f"{what}; launch it anew with the stack that is installed")
