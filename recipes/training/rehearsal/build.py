"""Build what NeMo builds on a rank of a plan, up to the first step: llm.pretrain, stopped before it
trains.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run

from recipes.plan import Plan
from recipes.training import recipe as nemo_recipe
from recipes.training.callback import RunFolderCallback
from recipes.training.compat.transformer_engine import know_block_scaling
from recipes.training.rehearsal.world import as_rank


class Built(Exception):
    """Ends llm.pretrain when everything is built."""


class Stop(pl.Callback):
    """Ends the run where training would begin, once Lightning's strategy has set up model and
    optimizer.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """End it."""
        raise Built


def _leave() -> None:
    """Leave the trainer as it is."""


@contextmanager
def built(plan: Plan, rank: int) -> Iterator[Any]:
    """Yield Lightning's trainer of a rank, with NeMo's strategy, model and optimizer built."""
    know_block_scaling()
    with as_rank(plan, rank), tempfile.TemporaryDirectory() as folder:
        pretrain = fdl.build(_recipe(plan, Path(folder)))
        trainer = pretrain.keywords["trainer"]
        trainer._teardown = _leave  # Lightning's copies the model to the CPU
        try:
            with suppress(Built):
                pretrain()
            yield trainer
        finally:
            _undo_proxy(trainer)


def _undo_proxy(trainer: Any) -> None:
    """Take back what NeMo v2.3.2 lightning/megatron_parallel.py:661 sets in the model's class for
    the rest of the process.
    """
    for chunk in getattr(trainer.strategy, "megatron_parallel", ()):
        if "__getattr__" in vars(type(chunk)):
            del type(chunk).__getattr__


def _recipe(plan: Plan, folder: Path) -> Any:
    recipe = nemo_recipe.build(plan, folder)
    callbacks = [
        each for each in recipe.trainer.callbacks if each.__fn_or_cls__ is not RunFolderCallback
    ]
    recipe.trainer.callbacks = [*callbacks, run.Config(Stop)]
    recipe.trainer.accelerator = "cpu"
    return recipe
