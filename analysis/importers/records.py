"""Loggers that store values by name: what the names are called, and from where their steps count.

One call of a logger is one record; the records of one family of names, in the order in which they
were written, are a log.  TensorBoard, W&B, tables, JSON lines and DLLogger all end here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from analysis.importers.log import Log, put_units
from analysis.runs.metrics import Array
from recipes.errors import InputError

STEP, TIME = "step", "time"  # keys of every record, beside the names that the logger was given
Record = dict[str, float]
SPARSE = frozenset(
    {
        "memory_gb",
        "memory_bytes",
        "reserved_bytes",
        "reserved_gb",
        "reserved_gib",
        "tflops",
        "tokens_per_s",
        "num_gpus",
    }
)
TIMES = ("step_time_s", "step_time_ms")
MOST_NAMED = 12  # names that an error lists


@dataclass(frozen=True)
class Family:
    """The names that one framework logs; `first` is the step that it calls the first.

    `counts_calls`: whether W&B's own step counts calls of the logger there, and not the trainer's
    steps.
    """

    name: str
    loss: tuple[str, ...]
    heldout: tuple[str, ...]
    first: int
    columns: dict[str, str]
    test: tuple[str, ...] = ()
    counts_calls: bool = False


OWN = Family(
    "this project's",
    ("loss",),
    ("heldout_loss",),
    1,
    {key: key for key in ("grad_norm", "lr", "step_time_s", "fp8_gemms", "memory_gb")},
)
# nemo/lightning/pytorch/strategies/megatron_strategy.py:705-750 and :788, v2.3.2 and v2.4.0;
# Lightning's steps count from 0.
NEMO = Family(
    "NeMo's",
    ("reduced_train_loss",),
    ("val_loss",),
    0,
    {
        "grad_norm": "grad_norm",
        "lr": "lr",
        "train_step_timing in s": "step_time_s",
        "global_batch_size": "global_batch",
        "consumed_samples": "samples",
        "max_memory_allocated": "memory_bytes",
        "max_memory_reserved": "reserved_bytes",
        "peak_memory_usage": "reserved_bytes",
        "TFLOPS_per_GPU": "tflops",
        "tokens_per_sec_per_gpu": "tokens_per_s",
    },
    test=("test_loss",),
    counts_calls=True,
)
# megatron/training/training.py (training_log), core_v0.12.3; Bridge
# src/megatron/bridge/training/utils/train_utils.py, v0.3.0.
MEGATRON = Family(
    "Megatron's",
    ("lm loss",),
    ("lm loss validation",),
    1,
    {
        "grad-norm": "grad_norm",
        "learning-rate": "lr",
        "iteration-time": "step_time_s",
        "batch-size": "global_batch",
        "world-size": "num_gpus",
        "mem-max-allocated-bytes": "memory_bytes",
        "memory/mem-max-allocated-gigabytes": "memory_gb",
        "memory/mem-max-reserved-gigabytes": "reserved_gb",
        "throughput": "tflops",
        "throughput/tflops/device": "tflops",
        "throughput/device/tokens_per_sec": "tokens_per_s",
    },
)
# microsoft/Megatron-DeepSpeed megatron/training.py (training_log), 00caa0e; its W&B names are
# others than TensorBoard's.
DEEPSPEED = Family(
    "Megatron-DeepSpeed's",
    ("lm-loss-training/lm loss", "loss/lm loss"),
    ("lm-loss-validation/lm loss validation",),
    1,
    {
        "grad-norm/grad-norm": "grad_norm",
        "learning-rate/learning-rate": "lr",
        "iteration-time/iteration-time": "step_time_s",
        "throughput/iteration-time": "step_time_s",
        "batch-size/batch-size": "global_batch",
        "world-size/world-size": "num_gpus",
        "throughput/tokens_per_gpu_per_sec": "tokens_per_s",
    },
)
# torchtitan/components/metrics.py (MetricsProcessor.log and log_validation), 00fbaaf.
TITAN = Family(
    "torchtitan's",
    ("loss_metrics/global_avg_loss",),
    ("validation_metrics/loss",),
    1,
    {
        "grad_norm": "grad_norm",
        "lr": "lr",
        "time_metrics/end_to_end(s)": "step_time_s",
        "throughput(tps)": "tokens_per_s",
        "tflops": "tflops",
        "memory/max_reserved(GiB)": "reserved_gib",
    },
)
# Names that scripts of their own use, by what they mean: lower case, "_" for all that is no letter
# or digit, and without a leading "train/" and the like.  composer/callbacks/speed_monitor.py
# (v0.32), src/olmo_core/train/callbacks/speed_monitor.py (OLMo-core v2.5.0),
# src/maxtext/common/metric_logger.py (MaxText e591f30), and Hugging Face's Trainer are among them.
ROLES = {
    "loss": (
        "loss ce_loss lm_loss cross_entropy_loss cross_entropy nll_loss step_loss loss_step"
        " loss_train loss_train_total loss_total_train total_loss global_avg_loss"
    ),
    "heldout": (
        "eval_loss valid_loss validation_loss val_loss heldout_loss eval_avg_loss loss_eval"
        " loss_validation loss_val eval_lm_loss val_ce_loss valid_ce_loss"
    ),
    "test": "test_loss loss_test",
    "lr": "lr learning_rate current_learning_rate",
    "grad_norm": "grad_norm gradient_norm global_grad_norm total_grad_norm raw_grad_norm",
    "step_time_s": (
        "step_time step_time_s step_time_sec step_time_seconds iteration_time iteration_time_s"
        " iter_time iter_time_s time_per_step time_per_step_s time_per_iteration time_per_iter"
        " elapsed_time_per_iteration_s seconds_per_step step_duration sec_per_step s_per_step"
        " time_per_step_sec time_per_iteration_s train_step_timing_in_s end_to_end_s"
    ),
    "step_time_ms": (
        "step_time_ms iteration_time_ms iter_time_ms time_per_step_ms time_per_iteration_ms"
        " ms_per_step ms_per_iter elapsed_time_per_iteration_ms step_duration_ms"
        " step_time_milliseconds dt_ms"
    ),
    "tokens_per_s": (
        "tokens_per_s_per_gpu tokens_per_sec_per_gpu tokens_per_second_per_gpu"
        " tokens_per_gpu_per_sec tokens_s_gpu tok_s_gpu tokens_per_gpu_per_second"
        " per_device_tokens_per_sec device_tokens_per_sec device_tps tokens_sec_gpu tokens_s_device"
        " tokens_per_s_per_device tgs tps_gpu"
    ),
    "tflops": (
        "tflops_per_gpu tflop_s_gpu tflops_gpu tflop_s_device per_device_tflops_per_sec"
        " model_tflops_per_gpu tflops_s_gpu"
    ),
    "global_batch": "global_batch_size",
    "samples": "consumed_samples consumed_train_samples",
    "memory_gb": "memory_gb max_memory_allocated_gb peak_memory_gb",
    "fp8_gemms": "fp8_gemms",
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names.split()}
SECTION = re.compile(
    r"^(?:metrics_)?(?:train|training|trainer|perf|throughput|optim|optimizer|learning|time|time_metrics|loss_metrics)_"
)
SPELLED_STEPS = (
    "iter iters iteration iterations step steps global_step train_step training_step trainer_step"
    " num_updates iter_num"
)


def spelled(name: str) -> str:
    """Return a name in lower case, with one "_" for all that is no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@functools.cache
def role_of(name: str) -> str | None:
    """Return what a script's own name means, as a column's name, "heldout" or "test"; None for what
    is not known.
    """
    return ROLE_OF.get(_known_spelling(name))


def _known_spelling(name: str) -> str:
    """Return a name as ROLES writes it, without the section that it stands in unless ROLES has that
    too.
    """
    plain = spelled(name)
    return plain if plain in ROLE_OF else SECTION.sub("", plain)


def is_step(name: str) -> bool:
    """Return whether a name is that of a trainer's step, as frameworks or scripts write it."""
    return name in TRAINER_STEPS or (
        name not in LOGGER_STEPS and spelled(name) in SPELLED_STEPS.split()
    )


def step_of(names: Iterable[str], *, trainers: bool = False) -> str | None:
    """Return the name of the step among names, the trainer's before the logger's own; None where
    there is none, or where the trainer's is asked for and is not there."""
    found = set(names)
    exact = next((name for name in TRAINER_STEPS if name in found), None)
    spelt = next((name for name in sorted(found) if is_step(name)), None)
    own = next((name for name in LOGGER_STEPS if name in found and not trainers), None)
    return exact or spelt or own


def is_loss(name: str, loss_key: str | None) -> bool:
    """Return whether a name is that of a training loss."""
    return (
        name == loss_key
        or role_of(name) == "loss"
        or any(name in family.loss for family in FAMILIES)
    )


PLAIN = Family("plain", ("loss", "train_loss"), ("eval_loss",), 1, {})
FAMILIES = (NEMO, MEGATRON, DEEPSPEED, TITAN)  # PLAIN and OWN have names that others have too
GLOBAL_STEP = "global_step"
# Names of the trainer's step, the first that there is; "_step" and "Step" are W&B's and
# TensorBoard's own.
TRAINER_STEPS = (
    "trainer/global_step",
    "training/iteration",
    "train/global_step",
    "loss/iteration",
    GLOBAL_STEP,
    "iteration",
    "step",
)
LOGGER_STEPS = ("_step", "Step")
STEPS = (*TRAINER_STEPS, *LOGGER_STEPS)
NAMES = frozenset(
    [
        GLOBAL_STEP,
        *(
            name
            for family in (*FAMILIES, PLAIN, OWN)
            for name in (*family.loss, *family.heldout, *family.test, *family.columns)
        ),
    ],
)


def _plain(names: Iterable[str]) -> Family:
    """Return the family of names that are known by their spelling; of several for one thing, that
    which ROLES has first.
    """
    by_role: dict[str, list[str]] = {}
    order = {name: place for place, name in enumerate(ROLE_OF)}
    for name in sorted(
        names, key=lambda name: (order.get(_known_spelling(name), len(order)), name)
    ):
        if role := role_of(name):
            by_role.setdefault(role, []).append(name)
    losses, heldout, test = (tuple(by_role.pop(role, ())) for role in ("loss", "heldout", "test"))
    return replace(
        PLAIN,
        loss=losses,
        heldout=heldout,
        test=test,
        columns={name: role for role, found in by_role.items() for name in found},
    )


@dataclass
class Vocabulary:
    """Which names are read: those that frameworks or ROLES have, and the one that the user calls
    the loss; others are noted.
    """

    loss_key: str | None = None
    others: dict[str, None] = field(default_factory=dict)

    def knows(self, name: str) -> bool:
        """Return whether a value under this name is read."""
        known = name in NAMES or name == self.loss_key or role_of(name) is not None
        if not known and len(self.others) < 1000:
            self.others.setdefault(name)
        return known

    def family(self, names: set[str], what: str) -> Family:
        """Return the family that wrote these names; InputError that lists what was found where
        there is none.
        """
        if self.loss_key is not None:
            if self.loss_key not in names:
                raise InputError(
                    f"no {self.loss_key!r} found in the {what}, which --loss-key names; it holds"
                    f" {_listed([*names, *self.others])}"
                )
            if "samples" in spelled(self.loss_key):
                raise InputError(
                    f"{self.loss_key} is logged by consumed samples, and runs are compared by"
                    " steps; name a loss that has steps"
                )
            near = max(
                (_plain(names - {self.loss_key}), *FAMILIES),
                key=lambda family: len(names & family.columns.keys()),
            )
            return replace(near, loss=(self.loss_key,))
        if {"loss", "fp8_gemms"} <= names:  # our callback's names stand beside NeMo's in one log
            return OWN
        known = (*FAMILIES, _plain(names))
        found = next((family for family in known if names.intersection(family.loss)), None)
        found = found or next(
            (f for f in known if any(f.columns.get(name) in TIMES for name in names)), None
        )
        if found is None:
            wanted = ", ".join(name for family in (*FAMILIES, PLAIN) for name in family.loss)
            held = _listed([*names, *self.others])
            raise InputError(
                f"no training loss found in the {what}: none of {wanted}; it holds {held}; name the"
                " loss with --loss-key, or another source"
            )
        return found


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:MOST_NAMED])[:600]
    return (
        f"{shown} and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else shown
    ) or "no values"


def log_of(
    records: Iterable[Record], what: str, vocabulary: Vocabulary, *, counts_calls: bool = False
) -> Log:
    """Return the log that records tell; `what` names the source's format.

    `counts_calls`: the records' steps are the logger's own count, which the trainer's global_step
    corrects.
    """
    kept = list(records)
    names = {name for record in kept for name in record} - {STEP, TIME}
    family = vocabulary.family(names, what)
    if counts_calls and family.counts_calls and GLOBAL_STEP not in names:
        raise InputError(
            f"the {what} counts calls of the logger, and {family.name} trainer's steps are not in"
            " it; export it with trainer/global_step"
        )
    if family.counts_calls and counts_calls:
        kept = [*_with_trainer_steps(kept)]
    is_known = family.name != PLAIN.name and vocabulary.loss_key is None
    first = family.first if is_known else int(min((r[STEP] for r in kept), default=1) != 0)
    family = replace(family, loss=_by_frequency(family.loss, kept))
    placed = [*_placed(kept, family, first)]
    training = [record for record in placed if any(name in record for name in family.loss)]
    training = training or [
        r for r in placed if any(family.columns.get(name) in TIMES for name in r)
    ]
    log = Log(f"{what} ({family.name} names)", _columns(training, family))
    log.averaged = False if is_known else None  # frameworks log a step's own loss
    for name, found, key in (
        ("heldout", family.heldout, "heldout_loss"),
        ("test", family.test, "test_loss"),
    ):
        setattr(log, name, _evaluations(placed, family.loss, found, key))
    for count in np.unique(log.steps.pop("num_gpus", np.zeros(0))):
        if np.isfinite(count):
            log.facts.key("num_gpus", int(count), f"world size {int(count)}")
    put_units(log)
    _time_steps(log)
    return log


def _by_frequency(losses: Sequence[str], records: Sequence[Record]) -> tuple[str, ...]:
    """Return the name of the loss that most records have: a summary's, as that of Hugging Face's
    Trainer, is no step's.
    """
    found = {name: sum(name in record for record in records) for name in losses}
    return tuple(sorted(losses, key=lambda name: -found[name])[:1])


def _with_trainer_steps(records: Iterable[Record]) -> Iterator[Record]:
    """Yield records at the trainer's step; one that lacks it, as an evaluation's, belongs to the
    last that has it.
    """
    last = math.nan
    for record in records:
        last = record.get(GLOBAL_STEP, last)
        if math.isfinite(last):
            yield {**record, STEP: last}


def _placed(records: Iterable[Record], family: Family, first: int) -> Iterator[Record]:
    """Yield records with their steps counted from 1.

    Lightning's counter falls back by one at each restart; global_step, which NeMo logs beside the
    loss, does not.
    """
    ahead: float = 1 - first
    for record in records:
        if (
            family.name == NEMO.name
            and family.loss[0] in record
            and math.isfinite(record.get(GLOBAL_STEP, math.nan))
        ):
            ahead = record[GLOBAL_STEP] + 1 - record[STEP]
        yield {**record, STEP: record[STEP] + ahead}


def _evaluations(
    records: Iterable[Record], losses: Sequence[str], names: Sequence[str], key: str
) -> dict[str, Array]:
    """Return the losses of evaluations by step.

    Where a step has several in a row, the first counts: Megatron-LM writes the test set's loss
    after training under the validation's name (megatron/training/training.py:2285, core_v0.12.3).
    One that comes after training losses is that of a resumed run, and counts as well.
    """
    kept, trained, last = list[tuple[float, float]](), math.nan, math.nan
    for record in records:
        evaluated = [record[name] for name in names if name in record]
        if any(name in record for name in losses) and record[STEP] != trained:
            trained, last = record[STEP], math.nan
        if evaluated and record[STEP] != last:
            last = record[STEP]
            kept.append((last, evaluated[0]))
    return dict(zip((STEP, key), np.array(kept, dtype=np.float64).T, strict=True)) if kept else {}


def _columns(records: list[Record], family: Family) -> dict[str, Array]:
    """Return columns; one that only some records have is kept where it needs no value a step, for
    not logged is not NaN.
    """
    names = {STEP: STEP, TIME: TIME, **dict.fromkeys(family.loss, "loss"), **family.columns}
    found = dict[str, Array]()
    for name, ours in names.items():
        if ours in found:
            continue
        values = np.array([record.get(name, np.nan) for record in records], dtype=np.float64)
        partly = ours in SPARSE or ours in TIMES
        if all(name in record for record in records) or (partly and not np.isnan(values).all()):
            found[ours] = values
    return found


def _time_steps(log: Log) -> None:
    """Where neither tokens/s nor step times were logged, the clock between records tells them,
    evaluations and pauses included.
    """
    clock = log.steps.pop(TIME, None)
    if (
        log.steps.keys() & {"step_time_s", "tokens_per_s"}
        or clock is None
        or np.isnan(clock).any()
        or clock.size < 2
    ):
        return
    took = np.diff(clock) / np.maximum(np.diff(log.steps[STEP]), 1)
    log.steps["step_time_s"] = np.concatenate([took[:1], took])
    log.said.append(
        "step times are differences of the logger's clock; evaluations and pauses are in them"
    )
