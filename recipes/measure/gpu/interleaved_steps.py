"""Bare Megatron-Core steps between the steps of a run, and the time of both: the measurement of
recipes/measure/gpu/overhead.py.

Import it after recipes.training.compat.transformer_engine.activate: it imports NeMo.
"""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback
from torch import Tensor, nn

from recipes.plan import Plan
from recipes.training.callback import RunFolderCallback
from recipes.training.deferred import Moment
from recipes.training.te_layers import Watched

BATCH = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
Step = Callable[[], Tensor]


@dataclass
class Times:
    """Seconds, an entry a block: its harness steps, the run folder's hooks in each, its bare steps.

    `collection`: Python's garbage of `collection_steps` harness steps and the bare ones between
    them collected at once, as NeMo does each `collection_interval` steps (None: Python does, when
    it likes); `collection_again`: the same with none.  `bare_losses`: the mean loss of each bare
    step, in the order of the run.
    """

    harness: list[list[float]] = field(default_factory=list)
    hooks: list[list[float]] = field(default_factory=list)
    bare: list[list[float]] = field(default_factory=list)
    bare_losses: list[float] = field(default_factory=list)
    collection: float = 0.0
    collection_again: float = 0.0
    collection_steps: int = 0
    collection_interval: int | None = None


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: nn.Module
) -> tuple[Tensor, Callable[..., Any]]:
    """Megatron-LM core_v0.12.3 pretrain_gpt.py:230, without timers; no attention mask where the
    data loader makes none.
    """
    batch = next(data_iterator)
    tokens, labels, mask, attention_mask, positions = (
        batch[key].cuda(non_blocking=True) if key in batch else None for key in BATCH
    )
    return model(tokens, positions, attention_mask, labels=labels), functools.partial(loss, mask)


def loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the summed loss of a micro-batch, its tokens, and both to report: pretrain_gpt.py:147,
    without the search for NaN.
    """
    mask = mask.view(-1).float()
    summed = torch.cat([torch.sum(losses.float().view(-1) * mask).view(1), mask.sum().view(1)])
    reported = summed.clone().detach()
    torch.distributed.all_reduce(reported, group=parallel_state.get_data_parallel_group())
    return summed[0].clone(), summed[1].clone().detach().to(torch.int), (reported[0], reported[1])


def bare_step(trainer: Any, plan: Plan) -> Step:
    """Return Megatron-LM's train_step for the model, optimizer, schedule and data that `trainer`
    trains with; it returns the mean loss.
    """
    model = [
        chunk.module for chunk in trainer.strategy.megatron_parallel
    ]  # Megatron-Core's DDP, without NeMo's module around it
    optimizer, schedule = (
        trainer.optimizers[0].mcore_optimizer,
        trainer.lr_scheduler_configs[0].scheduler,
    )
    data = trainer.fit_loop._combined_loader._iterator.iterators[
        0
    ]  # the DataLoader's iterator that Lightning draws from

    def step() -> Tensor:
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reported = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=model,
            num_microbatches=get_num_microbatches(),
            seq_length=plan.seq_length,
            micro_batch_size=plan.mapping.micro_batch,
            decoder_seq_length=None,
            forward_only=False,
        )
        optimizer.step()
        schedule.step()
        losses, tokens = zip(*reported, strict=True)
        return torch.stack(losses).sum() / torch.stack(tokens).sum()

    return step


@contextmanager
def unwatched(layers: Any) -> Iterator[None]:
    """Take the run folder's forward hooks off Transformer Engine's layers."""
    watched = [layer for layer in layers if isinstance(layer, Watched)]
    kept = [(w.layer._forward_hooks, dict(w.layer._forward_hooks)) for w in watched]
    for layer, (hooks, before) in zip(watched, kept, strict=True):
        for key in [key for key, hook in before.items() if hook == layer.forward]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


class HookClock:
    """Times the hooks of the run folder's callback, on the host."""

    def __init__(self, callback: RunFolderCallback) -> None:
        self.seconds = 0.0
        for name in HOOKS:
            setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(hook)
        def timed(*args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            hook(*args, **kwargs)
            self.seconds += time.perf_counter() - started

        return timed

    def taken(self) -> float:
        """Return the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Interleaved(Callback):  # type: ignore[misc]
    """Does the bare steps at the start of Lightning's loop; must be the first callback, so that a
    harness step is a whole turn of it.

    A block is one harness step, some bare ones, one harness step: both kinds lie around the same
    moment of the run, so that a drift of all steps cancels.  Nothing is read from the device before
    the end of the last block: that would make steps wait.
    """

    def __init__(
        self,
        plan: Plan,
        blocks: int,
        bare_steps: int,
        run_folder: RunFolderCallback,
        trace: Path | None = None,
    ) -> None:
        """`bare_steps`: of a block.

        `trace`: where to write torch.profiler's trace of the step that follows the last block and
        is not timed.
        """
        self.plan, self.blocks, self.bare_steps, self.run_folder, self.trace = (
            plan,
            blocks,
            bare_steps,
            run_folder,
            trace,
        )
        self.profiler: torch.profiler.profile | None = None
        self.times, self.clock = Times(), HookClock(run_folder)
        self.started: Moment | None = None
        self.harness: list[tuple[Moment, Moment]] = []
        self.hooks: list[float] = []
        self.bare: list[list[Moment]] = []  # a list a block: before its first step, after each
        self.losses: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the harness step before, do the bare steps of its block, begin the next harness step;
        after the last, read all times.
        """
        if self.started:
            self.harness.append((self.started, Moment()))
            self.hooks.append(self.clock.taken())
            if len(self.harness) % 2:
                self._bare_steps(trainer)
        if len(self.harness) == 1:
            gc.collect()  # what the first step compiled is no step's garbage
        if len(self.harness) == 2 * self.blocks:
            self._read()
            self._collect_garbage(trainer)
            if self.trace:
                self.profiler = torch.profiler.profile()
                self.profiler.start()
        self.clock.taken()
        self.started = Moment()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the trace of the profiled step."""
        if self.profiler:
            Moment().wait()
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.trace))
            self.profiler = None

    def _bare_steps(self, trainer: Any) -> None:
        step = bare_step(trainer, self.plan)
        moments = [Moment()]
        with unwatched(self.run_folder.layers.values()):
            for _ in range(self.bare_steps):
                self.losses.append(step())
                moments.append(Moment())
        self.bare.append(moments)

    def _read(self) -> None:
        seconds = [start.until(end) for start, end in self.harness]
        self.times.harness, self.times.hooks = (
            [list(values[n : n + 2]) for n in range(0, len(values), 2)]
            for values in (seconds, self.hooks)
        )
        self.times.bare = [
            [a.until(b) for a, b in itertools.pairwise(moments)] for moments in self.bare
        ]
        self.times.bare_losses = [float(value) for value in self.losses]

    def _collect_garbage(self, trainer: Any) -> None:
        theirs = [c for c in trainer.callbacks if isinstance(c, GarbageCollectionCallback)]
        self.times.collection_interval = theirs[0].gc_interval_train if theirs else None
        self.times.collection_steps = len(self.harness) - 1
        self.times.collection, self.times.collection_again = (_collection() for _ in range(2))


def _collection() -> float:
    started = time.perf_counter()
    gc.collect()
    return time.perf_counter() - started
