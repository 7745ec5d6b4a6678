"""What a run writes while it trains: a line a step, held-out loss, events, status, and the evidence
that FP8 was on.

The loggers that the plan names (W&B, TensorBoard) get the same numbers under the same names.
"""

from __future__ import annotations

import gc
import math
import re
import resource
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from nemo.lightning import megatron_init

from recipes.code import code
from recipes.errors import InputError, one_line
from recipes.estimate.fp8_gemms import refusal
from recipes.gpu_record import GpuRecord
from recipes.plan import Fp8, plan_from_json
from recipes.run_folder import (
    append_line,
    event,
    flatten,
    keep_until,
    rows_of,
    set_status,
    sha256,
    write_json,
)
from recipes.training import devices, stop, watchdog
from recipes.training.console import training_line, validation_line
from recipes.training.deferred import Moment, Number
from recipes.training.layers import Fp8Mixin, fp8_modules
from recipes.training.manifest import complete, complete_gpus, manifest
from recipes.training.te_layers import Watched, watch

NON_FINITE = re.compile(
    r"found (NaN|Inf) in"
)  # megatron/core/distributed/param_and_grad_buffer.py, v0.12.3


@dataclass(frozen=True)
class Ended:
    """A step that the host has launched to its end: its numbers, and points in the device's
    work.
    """

    step: int
    loss: Number
    grad_norm: Number
    lr: Number
    started: Moment
    backward_ended: Moment | None
    ended: Moment
    skipped: list[Number]  # not 0 where the update was
    memory_gb: float
    fp8_gemms: int
    gpu: devices.Sampled | None  # of rank 0's; None on a CPU


class RunFolderCallback(Callback):  # type: ignore[misc]
    """Lightning callback that fills the run folder, from rank 0 alone.

    On a GPU a step's line is written while the next one is under way
    (recipes/training/deferred.py), or before what comes between them: an evaluation, a checkpoint,
    the end.  `plan_json` is the plan as text: NeMo's recipe objects hold plain values.
    """

    def __init__(self, folder: str, plan_json: str) -> None:
        self.folder, self.plan = Path(folder), plan_from_json(plan_json)
        self.layers: dict[str, Fp8Mixin | Watched] = {}
        self.heldout: list[torch.Tensor] = []
        self.started: Moment | None = None
        self.backward_ended: Moment | None = None
        self.unwritten: Ended | None = None
        self.ahead = torch.cuda.is_available()
        self.sampler: devices.Sampler | None = None
        self.gemms_before = self.stage = 0
        self.attention_recorded = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Seed the initial weights: NeMo 2.3 (lightning/_strategy_lib.py:96) always seeds with
        1234, just before this.
        """
        megatron_init._set_random_seed(self.plan.seed)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Record what runs, and the step from which it goes on; what was written beyond that step
        is dropped.

        An evaluation that was due at that step and is not written, for a pause left it out or the
        job died, is made up for.
        """
        self._alive()
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.layers = {**fp8_modules(pl_module), **watch(pl_module, self._looked_at())}
        stop.listen()
        _count_batches_of(trainer)
        # NeMo's GarbageCollectionCallback walks all objects every 100 steps, 0.4 s of it over
        # imported modules
        gc.freeze()
        gpus = self._watch_gpu(trainer) if torch.cuda.is_available() else []
        if trainer.is_global_zero:
            self._begin(trainer, gpus)
        if trainer.strategy.broadcast(
            trainer.is_global_zero and self._lacks_evaluation(trainer.global_step)
        ):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def _watch_gpu(self, trainer: Any) -> list[GpuRecord]:
        """Return the GPU of each rank; rank 0 looks at its own from now on."""
        gpu = devices.Gpu()
        if trainer.is_global_zero:
            self.sampler = devices.Sampler(gpu)
            self.sampler.start()
        return devices.gathered(gpu.record(trainer.global_rank))

    def _begin(self, trainer: Any, gpus: list[GpuRecord]) -> None:
        step = trainer.global_step
        for name in ("metrics.jsonl", "fp8.jsonl"):
            keep_until(self.folder / name, step)
        write_json(
            self.folder / "manifest.json", manifest(self.plan, self.folder, gpus, resumed=step > 0)
        )
        event(self.folder, "resume" if step else "start", step=step, code=code())
        set_status(self.folder, "running", step=step)
        for logger in trainer.loggers:
            logger.log_hyperparams(flatten(self.plan.model_dump()))

    def _lacks_evaluation(self, step: int) -> bool:
        due = (
            step > 0 and step % self.plan.train.eval_interval == 0 and self.plan.settings.evaluation
        )
        return due and not any(
            "heldout_loss" in row and row["step"] == step
            for row in rows_of(self.folder / "metrics.jsonl")
        )

    def _alive(self) -> None:
        watchdog.got_further(self.plan.train.step_timeout_s)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a step, and look closely at the layers where it is time to."""
        diagnose = self._is_diagnosed(trainer.global_step + 1)
        for layer in self.layers.values():
            if layer.fp8_quantiser:
                layer.fp8_quantiser.diagnose = diagnose
        self.gemms_before = self._gemms()
        self.started = Moment()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Mark where the last backward pass ends."""
        self.backward_ended = Moment()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's numbers, and write those of the step before; on a CPU, and on a diagnosed
        step, these at once.
        """
        self._alive()
        ended, step, logged = Moment(), trainer.global_step, trainer.callback_metrics
        if stop.asked_on_rank_0(self.folder) or (
            self.plan.train.stop_after and step >= self.plan.train.stop_after
        ):
            trainer.should_stop = True
            if (
                step < self.plan.train.max_steps
            ):  # Lightning evaluates where it stops: it would cost the time that is left to save
                trainer.limit_val_batches = 0
        gemms = self._gemms() - self.gemms_before
        self._runs_as_planned(gemms, step, trainer.global_rank)
        if not trainer.is_global_zero:
            return
        if not self.attention_recorded:  # Transformer Engine chooses when it is first asked
            self.attention_recorded = True
            complete(self.folder, attention=devices.attention(pl_module))
        loss, grad_norm, lr = (
            Number(logged.get(name)) for name in ("reduced_train_loss", "grad_norm", "lr")
        )
        assert self.started
        skipped = _skipped_updates(trainer)
        before = self.unwritten
        gpu = self.sampler.take() if self.sampler else None
        self.unwritten = Ended(
            step,
            loss,
            grad_norm,
            lr,
            self.started,
            self.backward_ended,
            ended,
            skipped,
            _memory_gb(),
            gemms,
            gpu,
        )
        if before:
            self._write_step(trainer, before)
        if not self.ahead or self._is_diagnosed(
            step
        ):  # what the layers met is theirs until the next step begins
            self._catch_up(trainer)

    def _runs_as_planned(self, gemms: int, step: int, rank: int) -> None:
        """End the run where a rank ran other FP8 GEMMs in a step than the plan implies."""
        if wrong := refusal(self.plan, gemms, self.stage):
            what = f"step {step} of rank {rank} ran {wrong}"
            raise InputError(f"{what}; the run is not what its plan says")

    def _catch_up(self, trainer: Any) -> None:
        """Write the step that is not written yet."""
        before, self.unwritten = self.unwritten, None
        if before:
            self._write_step(trainer, before)

    def _write_step(self, trainer: Any, ended: Ended) -> None:
        """Append a step's metrics; a loss that is no number is an event."""
        step, step_time, skipped = (
            ended.step,
            ended.started.until(ended.ended),
            any(found.read() for found in ended.skipped),
        )
        row = {
            "step": step,
            "tokens": step * self.plan.tokens_per_step,
            "loss": ended.loss.read(),
            "grad_norm": (
                math.nan if skipped else ended.grad_norm.read()
            ),  # else that of an earlier step
            "lr": ended.lr.read(),
            "step_time_s": step_time,
            "optimizer_time_s": (
                ended.backward_ended.until(ended.ended) if ended.backward_ended else math.nan
            ),
            "tokens_per_s_per_gpu": self.plan.tokens_per_step / step_time / self.plan.num_gpus,
            "memory_gb": ended.memory_gb,
            "fp8_gemms": ended.fp8_gemms,
            **(
                {f"gpu_{name}": value for name, value in asdict(ended.gpu).items()}
                if ended.gpu
                else {}
            ),
        }
        self._write(trainer, row)
        if self.plan.train.is_printed(step):
            print(training_line(row, trainer.current_epoch, self.plan), flush=True)
        self._judge(row, skipped)
        if self._is_diagnosed(step):
            self._write_diagnostics(step)

    def _judge(self, row: dict[str, float], skipped: bool) -> None:
        """Record what is wrong with a step, and end the run where it is lost or the plan says so.

        A gradient norm of exactly 0 is that of an optimizer which no gradient reached: nothing is
        trained.
        """
        if row["grad_norm"] == 0:
            event(self.folder, "no_gradients", step=row["step"])
            raise FloatingPointError(
                f"the gradient norm of step {row['step']} is 0: no gradient reaches the optimizer,"
                " and nothing is trained"
            )
        if skipped:
            event(self.folder, "skipped_update", step=row["step"], why="NaN or Inf in gradients")
        if not math.isfinite(row["loss"]):
            event(self.folder, "non_finite_loss", step=row["step"])
            if self.plan.train.on_non_finite == "stop":
                raise FloatingPointError(f"the loss of step {row['step']} is {row['loss']}")
        elif not skipped and not math.isfinite(
            row["grad_norm"]
        ):  # where Megatron-Core does not look (settings.check_gradients=false)
            event(self.folder, "non_finite_gradients", step=row["step"])
            if self.plan.train.on_non_finite == "stop":
                raise FloatingPointError(
                    f"the gradient norm of step {row['step']} is {row['grad_norm']}"
                )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Record, from whichever rank it is, that Megatron-Core met NaN or Inf in gradients; write
        what is known of the step before.
        """
        if NON_FINITE.search(str(exception)):
            event(
                self.folder,
                "non_finite_gradients",
                step=trainer.global_step + 1,
                rank=trainer.global_rank,
                why=one_line(str(exception))[:200],
            )
        with suppress(
            Exception
            # The disk may be full or the GPU lost, and the exception that came first is the one to
            # tell
        ):
            self._catch_up(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the step before its held-out loss."""
        self._catch_up(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the steps before the checkpoint that a run would go on from."""
        self._catch_up(trainer)

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the loss of a global batch: Lightning's own mean (val_loss) weighs the first batch
        less than the others.

        NeMo 2.3 (pytorch/strategies/megatron_strategy.py, validation_step) logs it without a batch
        size, and Lightning 2.4 takes the size of the micro-batch before, one for the first.
        """
        self._alive()
        self.heldout.append(outputs.detach().float())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Append the held-out loss; Lightning evaluates at the end too, whatever the interval."""
        if not self.heldout:
            return
        step, loss = trainer.global_step, _mean_over_pipeline(self.heldout)
        self.heldout.clear()
        if trainer.is_global_zero and step % self.plan.train.eval_interval == 0:
            self._write(
                trainer,
                {"step": step, "tokens": step * self.plan.tokens_per_step, "heldout_loss": loss},
            )
            print(validation_line(step, loss, self.plan), flush=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last step and what else ran on the GPUs, and give the last checkpoint its
        time.
        """
        self._alive()
        self._catch_up(trainer)
        if torch.cuda.is_available():
            at_end = devices.gathered(devices.Gpu().others())
            if self.sampler:
                self.sampler.stop()
                complete_gpus(
                    self.folder, at_end, self.sampler.most_others, self.sampler.capped_share
                )

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the end, or the pause, now that the last checkpoint is written."""
        watchdog.at_end()
        if not trainer.is_global_zero:
            return
        done = trainer.global_step >= self.plan.train.max_steps
        facts = {"metrics_sha256": sha256(self.folder / "metrics.jsonl")} if done else {}
        facts |= {"why": "asked to stop"} if stop.asked() else {}
        event(self.folder, "end" if done else "pause", step=trainer.global_step, **facts)
        set_status(self.folder, "done" if done else "paused", step=trainer.global_step)

    def _write(self, trainer: Any, row: dict[str, Any]) -> None:
        append_line(self.folder / "metrics.jsonl", row)
        for logger in trainer.loggers:
            logger.log_metrics(
                {k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"]
            )

    def _looked_at(self) -> Fp8 | None:
        """Return the recipe that Transformer Engine's layers are diagnosed for; none on random
        tokens, whose numbers say nothing.
        """
        return None if self.plan.data.kind == "mock" else self.plan.precision.fp8

    def _is_diagnosed(self, step: int) -> bool:
        return step == 1 or step % self.plan.train.diagnostics_interval == 0

    def _gemms(self) -> int:
        return sum(layer.fp8_calls.total for layer in self.layers.values())

    def _write_diagnostics(self, step: int) -> None:
        for name, layer in self.layers.items():
            for role, seen in layer.fp8_quantiser.seen.items() if layer.fp8_quantiser else ():
                append_line(
                    self.folder / "fp8.jsonl",
                    {"step": step, "module": name, "role": role, **asdict(seen)},
                )


def _count_batches_of(trainer: Any) -> None:
    """Set Lightning's count of batches to the step that training goes on from.

    Lightning 2.4 (loops/training_epoch_loop.py:269-273) saves checkpoints before it counts the
    batch, so a resumed run would be one behind and evaluate a step late.
    """
    counted = trainer.fit_loop.epoch_loop.batch_progress.current
    counted.ready = counted.started = counted.processed = counted.completed = trainer.global_step


def _skipped_updates(trainer: Any) -> list[Number]:
    """Return, an entry an optimizer, whether Megatron-Core found NaN or Inf in the gradients and
    left the parameters as they were.
    """
    optimizer = getattr(trainer.optimizers[0], "mcore_optimizer", None)
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        Number(part.found_inf) for part in parts if getattr(part, "grad_scaler", None) is not None
    ]


def _mean_over_pipeline(losses: list[torch.Tensor]) -> float:
    """Return the mean loss; only the last pipeline stage has losses, the others zeros."""
    mean = torch.stack(losses).mean()
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.all_reduce(mean, group=parallel_state.get_pipeline_model_parallel_group())
    return float(mean)


def _memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
