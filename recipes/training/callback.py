"""What a run writes while it trains: a line a step, held-out loss, events, status, and the evidence that FP8 was on."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from recipes.plan import plan_from_json
from recipes.run_folder import append_line, event, set_status, write_json
from recipes.training.layers import fp8_modules


class RunFolderCallback(Callback):  # type: ignore[misc]
    """Lightning callback that fills the run folder, from rank 0 alone.

    `plan_json` is the plan as text: NeMo's recipe objects hold plain values.
    """

    def __init__(self, folder: str, plan_json: str) -> None:
        self.folder, self.plan = Path(folder), plan_from_json(plan_json)
        self.started = 0.0
        self.step_time = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Record the start, or the step from which the run goes on."""
        if trainer.is_global_zero:
            step = trainer.global_step
            event(self.folder, "resume" if step else "start", step=step)
            set_status(self.folder, "running", step=step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock of a step."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Append the step's metrics; a loss that is no number is an event."""
        if not trainer.is_global_zero:
            return
        self.step_time = time.perf_counter() - self.started
        step, logged = trainer.global_step, trainer.callback_metrics
        row = {
            "step": step,
            "tokens": step * self.plan.tokens_per_step,
            "loss": _number(logged.get("reduced_train_loss")),
            "grad_norm": _number(logged.get("grad_norm")),
            "lr": _number(logged.get("lr")),
            "step_time_s": self.step_time,
            "tokens_per_s_per_gpu": self.plan.tokens_per_step / self.step_time / self.plan.num_gpus,
            "memory_gb": _memory_gb(),
        }
        append_line(self.folder / "metrics.jsonl", row)
        if not math.isfinite(row["loss"]):
            event(self.folder, "non_finite_loss", step=step)
        if self.plan.train.stop_after and step >= self.plan.train.stop_after:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Append the held-out loss."""
        if trainer.is_global_zero:
            loss = _number(trainer.callback_metrics.get("val_loss"))
            append_line(self.folder / "metrics.jsonl", {"step": trainer.global_step, "heldout_loss": loss})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the evidence and the end."""
        if not trainer.is_global_zero:
            return
        layers = fp8_modules(pl_module)
        write_json(self.folder / "fp8.json", {name: vars(layer.fp8_calls) for name, layer in layers.items()})
        done = trainer.global_step >= self.plan.train.max_steps
        event(self.folder, "end" if done else "pause", step=trainer.global_step)
        set_status(self.folder, "done" if done else "paused", step=trainer.global_step)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
