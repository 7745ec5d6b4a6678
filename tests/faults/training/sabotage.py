"""What a training process does to itself before it trains, named by `Ranks(sabotage=…)`: numbers
that are none, a hang, FP8 that is none.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

from tests.faults.training.process import wrap

STEP = 5
CALLBACK = "recipes.training.callback:RunFolderCallback"


def _once_at(step: int, does: Callable[[Any, Any], None]) -> None:
    """Do something to trainer and module when a step begins, on the last rank."""

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        def on_train_batch_start(self: Any, trainer: Any, pl_module: Any, *rest: Any) -> None:
            function(self, trainer, pl_module, *rest)
            if trainer.global_step + 1 == step and os.environ["RANK"] == str(
                int(os.environ["WORLD_SIZE"]) - 1
            ):
                does(trainer, pl_module)

        return on_train_batch_start

    wrap(f"{CALLBACK}.on_train_batch_start", made)


def _gradient(value: float) -> None:
    def poison(_: Any, pl_module: Any) -> None:
        parameter = max(
            (p for p in pl_module.parameters() if p.requires_grad), key=lambda p: p.numel()
        )
        hook = parameter.register_hook(lambda gradient: (gradient * value, hook.remove())[0])

    _once_at(STEP, poison)


def nan_in_gradients() -> None:
    _gradient(math.nan)


def inf_in_gradients() -> None:
    _gradient(math.inf)


def _logged_loss(value: float) -> None:
    """The loss that NeMo logs, while the gradients stay finite."""
    armed: list[bool] = []
    _once_at(STEP, lambda *_: armed.append(True))

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        def log(self: Any, name: str, logged: Any, **more: Any) -> None:
            if name == "reduced_train_loss" and armed:
                armed.clear()
                logged = logged.new_full(logged.shape, value)
            function(self, name, logged, **more)

        return log

    wrap("lightning.pytorch:LightningModule.log", made)


def nan_in_loss() -> None:
    _logged_loss(math.nan)


def inf_in_loss() -> None:
    _logged_loss(math.inf)


def hang() -> None:
    """The last rank gets stuck within a step."""
    _once_at(STEP, lambda *_: time.sleep(3600))


def no_fp8() -> None:
    """The FP8 layers are BF16 ones, as where Transformer Engine is missing
    (megatron/core/fp8_utils.py, v0.12.3).
    """
    wrap("recipes.training.recipe:set_recipe", lambda _: lambda *_: None)


def fp8_lost_at_a_step() -> None:
    """From a step on, the FP8 layers multiply in BF16."""
    from recipes.training.fp8.linear import bf16_linear
    from recipes.training.layers import Fp8Mixin

    def lose(*_: Any) -> None:
        Fp8Mixin._fp8_forward = lambda self, input, weight, *_, **__: bf16_linear(input, weight)

    _once_at(STEP, lose)
