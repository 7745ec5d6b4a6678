"""From a NeMo checkpoint to Hugging Face form, with NeMo's own exporters (`llm.export_ckpt`,
HFLlamaExporter, HFNemotronExporter).

The exporters read a checkpoint by building the model again, on one GPU, with Transformer Engine's
layers.  Each function below fixes one such assumption and names the upstream line that makes it
(NeMo v2.3.2).  The weights come from a model that was loaded already, in the run's own precision,
so no second copy is made.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recipes.errors import InputError, one_line

# gpt/model/llama.py:855-856 and gpt/model/nemotron.py:354-357 know the layer norms by the names
# that Transformer Engine's fused layers give them; Megatron-Core's local layers, which train on the
# CPU, keep them apart.
FUSED_NAMES = {
    r"(.*\.layers\.\d+)\.input_layernorm\.(weight|bias)": (
        r"\1.self_attention.linear_qkv.layer_norm_\2"
    ),
    r"(.*\.layers\.\d+)\.pre_mlp_layernorm\.(weight|bias)": r"\1.mlp.linear_fc1.layer_norm_\2",
}


def export(module: nn.Module, config: Any, checkpoint: Path, target: Path) -> Path:
    """Write `module` (the GPTModel loaded from `checkpoint`, `config` its GPTConfig) to the folder
    `target`.

    Configuration and tokenizer come from the checkpoint.  InputError where NeMo has no exporter for
    the model.
    """
    from nemo.collections import llm

    def connector(path: Path, kind: str) -> Any:
        return _loaded(_exporter(path, kind), module, config)

    llm.export_ckpt(checkpoint, "hf", target, overwrite=True, load_connector=connector)
    if not (target / "tokenizer_config.json").exists():  # llama.py:825-828 only warns
        raise InputError(
            f"{checkpoint}: the tokenizer in its context cannot be exported; train with a Hugging"
            " Face tokenizer"
        )
    return target


def _exporter(path: Path, kind: str) -> Any:
    from nemo.lightning.io.api import load_connector_from_trainer_ckpt

    try:
        return load_connector_from_trainer_ckpt(path, kind)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: NeMo has no Hugging Face exporter for this model ({one_line(str(error))});"
            " evaluate sets only"
        ) from None


def _loaded(exporter: Any, module: nn.Module, config: Any) -> Any:
    """lightning/io/connector.py:223-228 would build a trainer and the model anew: a second process
    group, and no FP8 layers.
    """
    from nemo.lightning.io.state import _ModelState

    exporter.nemo_load = lambda path: (_ModelState(fused_names(module.state_dict()), config), None)
    return exporter


def fused_names(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a state dict under the names of Transformer Engine's layers.

    Amax histories and scales of FP8 stay behind: lightning/io/state.py:211 refuses what the target
    lacks, and the weights are the whole model.
    """
    weights = {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and "fp8_quantiser." not in key
    }
    return {_fused(key): value for key, value in weights.items()}


def _fused(key: str) -> str:
    for local, fused in FUSED_NAMES.items():
        key = re.sub(f"^{local}$", fused, key)
    return key
