"""The forms of training lines that are printed to a console, field by field.

NeMo 2 (nemo/lightning/pytorch/callbacks/progress_printer.py, ProgressPrinter) prints its logged metrics with four
significant digits, this project with more (recipes/training/console.py); iterations count from 0.  Megatron-LM
(megatron/training/training.py, training_log) and Megatron-Bridge (src/megatron/bridge/training/utils/train_utils.py)
print losses as `{:.6E}`, seven significant digits; iterations count from 1, every field ends with a bar, and a loss that
is NaN is not printed at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

VALUE = r"[-+.0-9A-Za-z]{1,32}"  # whether it is a number is seen when it is read as one

STAMP = re.compile(r"(\[20[-0-9T:.+Z ]{0,40}\])")  # [2025-06-02 12:00:00.123456]


@dataclass(frozen=True)
class Dialect:
    """How one framework prints a training step.

    `head`: the beginning of the line, with the groups iteration, total and epoch.  `marks`: texts that each whole line
    holds once.  `columns`: printed field -> column.  `closed`: whether a field ends with a bar, the last one too.
    """

    name: str
    marks: tuple[str, ...]
    head: re.Pattern[str]
    columns: dict[str, str]
    loss_digits: int
    first_iteration: int
    closed: bool


NEMO = Dialect(
    name="NeMo console log",
    marks=("Training epoch ",),
    head=re.compile(r"Training epoch (?P<epoch>\d{1,9}), iteration (?P<iteration>\d{1,15})/(?P<total>\d{1,15})[ \t]*"),
    columns={
        "global_step": "global_step",
        "reduced_train_loss": "loss",
        "grad_norm": "grad_norm",
        "lr": "lr",
        "train_step_timing in s": "step_time_s",
        "global_batch_size": "global_batch",
        "val_loss": "val_loss",
        "max_memory_allocated": "memory_bytes",
        "max_memory_reserved": "reserved_bytes",
        "peak_memory_usage": "reserved_bytes",  # nemo/lightning/pytorch/strategies/megatron_strategy.py:721, v2.3.2
        "tokens_per_sec_per_gpu": "tokens_per_s",
        "tokens_per_s_per_gpu": "tokens_per_s",
        "TFLOPS_per_GPU": "tflops",
    },
    loss_digits=4,
    first_iteration=0,
    closed=False,
)
MEGATRON = Dialect(
    name="Megatron console log",
    marks=("consumed samples:", "number of nan iterations:"),
    head=re.compile(r"iteration[ \t]+(?P<iteration>\d{1,15})/[ \t]*(?P<total>\d{1,15})[ \t]*"),
    columns={
        "lm loss": "loss",
        "grad norm": "grad_norm",
        "learning rate": "lr",
        "elapsed time per iteration (ms)": "step_time_ms",
        "elapsed time per iteration (s)": "step_time_s",
        "consumed samples": "samples",
        "global batch size": "global_batch",
        "throughput per GPU (TFLOP/s/GPU)": "tflops",
        "tokens per gpu per second (tgs)": "tokens_per_s",
        "number of skipped iterations": "skipped",
        "number of nan iterations": "nan",
    },
    loss_digits=7,
    first_iteration=1,
    closed=True,
)


@dataclass(frozen=True)
class Shape:
    """The fields that a training line had, and patterns that read such lines, a group a column.

    `match` reads one line; `block` every line of a text that has the first one's prefix (and so its rank) too.
    """

    match: Callable[[str, int], re.Match[str] | None]
    block: re.Pattern[str]
    columns: list[str]
    loss_is_last: bool


def learn(dialect: Dialect, line: str, at: int) -> Shape | None:
    """Return the shape of a training line that starts at `at`; None where it is cut, garbled or no training line."""
    head = dialect.head.match(line, at)
    fields = line[head.end() :].rstrip().split("|") if head else []
    if len(fields) < 2 or fields[0].strip():
        return None
    if dialect.closed:
        fields.pop()  # what follows the last bar, or a field that was cut before its bar
    names = [field.rpartition(":")[0].strip() for field in fields[1:]]
    columns = [dialect.columns[name] for name in names if name in dialect.columns]
    if len(set(columns)) < len(columns) or not _is_whole(dialect, columns):
        return None
    values = "".join(_field(name, name in dialect.columns) for name in names)
    body = dialect.head.pattern + values + (r"\|" if dialect.closed else r"[ \t]*$")
    pattern = re.compile(body, re.MULTILINE)
    if not pattern.match(line, at):
        return None
    heads = sorted(dialect.head.groupindex, key=dialect.head.groupindex.__getitem__)
    block = re.compile(f"^{_prefix(line[:at])}{body}", re.MULTILINE)
    return Shape(pattern.match, block, [*heads, *columns], dialect.columns.get(names[-1]) == "loss")


def _is_whole(dialect: Dialect, columns: list[str]) -> bool:
    """A line tells its loss; Megatron's leaves out one that is NaN, and counts it at the line's end."""
    return ("nan" if dialect.closed else "loss") in columns


def _field(name: str, wanted: bool) -> str:
    value = rf"[ \t]*({VALUE})[ \t]*" if wanted else r"[^|\n]*"
    return rf"\|[ \t]*{re.escape(name)}:{value}" if name else r"\|[^|\n]*"


def _prefix(text: str) -> str:
    """Return a pattern of what stands before a training line, in which only a time stamp may change."""
    return "".join(r"\[20[^\]\n]*\]" if STAMP.fullmatch(part) else re.escape(part) for part in STAMP.split(text))
