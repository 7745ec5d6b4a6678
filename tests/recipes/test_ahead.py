"""Steps that run ahead of the device: what is logged, and that a run folder misses no step, in
order, before what comes between steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector import result
from torch import Tensor

from recipes.compose.tree import compose_plan
from recipes.run_folder import rows_of
from recipes.training import stop
from recipes.training.callback import RunFolderCallback
from recipes.training.deferred import Moment, Number, _to_tensor, log_without_waiting

pytestmark = pytest.mark.nemo
PLAN = compose_plan(
    [
        "gpu=cpu",
        "model=llama3_tiny",
        "data=text",
        "settings=convergence",
        "train.diagnostics_interval=1000",
    ]
)


def test_a_number_is_read_and_none_is_no_number() -> None:
    assert (
        Number(torch.tensor([2.5])).read() == 2.5
        and Number(3).read() == 3
        and math.isnan(Number(None).read())
    )


def test_a_number_is_what_it_was_when_it_was_sent() -> None:
    x = torch.tensor([1.0])
    number = Number(x)
    x.zero_()
    assert number.read() == 1.0


def test_moments_are_that_far_apart() -> None:
    first = Moment()
    time.sleep(0.02)
    assert 0.02 <= first.until(Moment()) < 10


class Batches:
    """Three of them; a DataLoader would ask for a number itself."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.ones(1)] * 3)

    def __len__(self) -> int:
        return 3


class Logs(LightningModule):
    """Logs as NeMo does: a number and a loss, both for the progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = (self.weight - batch).square().mean()
        self.log("step", self.global_step, prog_bar=True, batch_size=1)
        self.log("loss", loss, prog_bar=True, batch_size=1)
        self.log("norm", 0.1, batch_size=1)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", (self.weight - batch).square().mean(), prog_bar=True, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def logged(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], int]:
    """Return what three steps leave as metrics, and how often they asked for a tensor's number,
    which waits for a device.
    """
    asked: list[Tensor] = []
    item = Tensor.item
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "item", lambda x: asked.append(x) or item(x))
        trainer = Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(Logs(), Batches(), Batches())
    return dict(trainer.callback_metrics), len(asked)


def test_lightning_logs_the_same_and_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = logged(monkeypatch)
    monkeypatch.setattr(
        LightningModule, "_LightningModule__to_tensor", LightningModule._LightningModule__to_tensor
    )  # to be put back
    monkeypatch.setattr(result, "convert_tensors_to_scalars", result.convert_tensors_to_scalars)
    log_without_waiting()
    after, still_asked = logged(monkeypatch)
    assert asked > 0 and still_asked == 0
    assert (
        before == after
        and before["norm"] == torch.tensor(0.1)
        and set(before) == {"step", "loss", "norm", "val_loss"}
    )
    assert {name: (x.dtype, x.shape) for name, x in before.items()} == {
        name: (x.dtype, x.shape) for name, x in after.items()
    }


def test_two_numbers_under_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="loss is logged with 2 elements"):
        _to_tensor(SimpleNamespace(device="cpu"), torch.ones(2), "loss")


def test_another_lightning_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LightningModule, "_LightningModule__to_tensor", LightningModule._LightningModule__to_tensor
    )
    monkeypatch.delattr(result, "convert_tensors_to_scalars")
    with pytest.raises(AttributeError, match="convert_tensors_to_scalars"):
        log_without_waiting()


class Run:
    """A run folder's callback that runs ahead, and the little of a trainer that it looks at."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.callback = folder, RunFolderCallback(str(folder), PLAN.model_dump_json())
        self.callback.ahead = True
        (folder / "manifest.json").write_text("{}")
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            is_global_zero=True,
            global_rank=0,
            loggers=[],
            optimizers=[None],
            should_stop=False,
        )

    def steps(self, number: int, loss: float = 2.0) -> None:
        for _ in range(number):
            self.callback.on_train_batch_start(self.trainer, None, None, 0)
            self.callback.on_before_optimizer_step(self.trainer, None, None)
            self.trainer.global_step += 1
            self.trainer.callback_metrics = {
                "reduced_train_loss": torch.tensor(loss + self.trainer.global_step),
                "grad_norm": torch.tensor(1.0),
            }
            self.callback.on_train_batch_end(self.trainer, torch.nn.Module(), None, None, 0)

    @property
    def written(self) -> list[int]:
        return [row["step"] for row in rows_of(self.folder / "metrics.jsonl")]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_step_is_written_while_the_next_one_runs(run: Run) -> None:
    run.steps(4)
    assert run.written == [1, 2, 3]  # the first is diagnosed and does not wait
    row = list(rows_of(run.folder / "metrics.jsonl"))[1]
    assert (
        row["loss"] == 4.0 and row["grad_norm"] == 1.0 and row["tokens"] == 2 * PLAN.tokens_per_step
    )
    assert 0 < row["optimizer_time_s"] < row["step_time_s"] and row["memory_gb"] > 0


@pytest.mark.parametrize(
    "comes",
    [
        lambda c, t: c.on_validation_start(t, None),
        lambda c, t: c.on_save_checkpoint(t, None, {}),
        lambda c, t: c.on_train_end(t, None),
        lambda c, t: c.on_exception(t, None, RuntimeError("lost")),
    ],
    ids=["evaluation", "checkpoint", "end", "exception"],
)
def test_it_is_written_before_what_comes_between_steps(comes: Any, run: Run) -> None:
    run.steps(3)
    comes(run.callback, run.trainer)
    assert run.written == [1, 2, 3]
    comes(run.callback, run.trainer)
    run.steps(2)
    assert run.written == [1, 2, 3, 4]


def test_a_loss_that_is_no_number_ends_the_run_a_step_later_at_most(run: Run) -> None:
    run.steps(2)
    run.steps(1, math.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        run.callback.on_save_checkpoint(run.trainer, None, {})
    assert run.written == [1, 2, 3]
    run.steps(1, math.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 4 is nan"):
        run.steps(1)
    run.callback.on_exception(run.trainer, None, FloatingPointError("the loss of step 4 is nan"))
    assert run.written == [1, 2, 3, 4, 5]


def test_a_full_disk_does_not_hide_what_came_first(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.steps(3)
    with monkeypatch.context() as patch:
        patch.setattr(
            "recipes.training.callback.append_line",
            lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        run.callback.on_exception(run.trainer, None, RuntimeError("found NaN in local grad norm"))
    assert run.written == [1, 2]
    assert [row["event"] for row in rows_of(run.folder / "events.jsonl")] == [
        "non_finite_gradients"
    ]


def test_an_update_that_was_skipped_is_known_a_step_later(run: Run) -> None:
    run.trainer.optimizers = [
        SimpleNamespace(
            mcore_optimizer=SimpleNamespace(grad_scaler=object(), found_inf=torch.tensor([0.0]))
        )
    ]
    run.steps(2)
    run.trainer.optimizers[0].mcore_optimizer.found_inf = torch.tensor([1.0])
    run.steps(1)
    run.trainer.optimizers[0].mcore_optimizer.found_inf = torch.tensor([0.0])
    run.steps(2)
    run.callback.on_train_end(run.trainer, None)
    norms = [row["grad_norm"] for row in rows_of(run.folder / "metrics.jsonl")]
    assert [math.isnan(norm) for norm in norms] == [False, False, True, False, False]
    assert [(row["event"], row["step"]) for row in rows_of(run.folder / "events.jsonl")] == [
        ("skipped_update", 3)
    ]


def test_all_ranks_hear_the_word_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is asked in step 2: it and another rank, whose own word is no, both stop after
    step 3.
    """
    sent: list[Tensor] = []

    def heard_by(rank: int, asked: list[bool]) -> list[bool]:
        words = iter(list(sent))
        monkeypatch.setattr(stop, "_said", None)
        monkeypatch.setattr(
            stop.dist,
            "broadcast",
            lambda word, source: word.copy_(next(words)) if rank else sent.append(word),
        )
        heard = []
        for word in asked:
            monkeypatch.setattr(stop, "_asked", word)
            heard.append(stop._said_before(torch.device("cpu")))
        return heard

    assert (
        heard_by(0, [False, True, True])
        == heard_by(1, [False, False, False])
        == [False, False, True]
    )
