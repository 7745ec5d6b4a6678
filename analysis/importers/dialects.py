"""The forms of training lines that are printed to a console, field by field.

- NeMo 2 (nemo/lightning/pytorch/callbacks/progress_printer.py, v2.3.2) prints its logged metrics
  with four significant digits, this project with more (recipes/training/console.py); iterations
  count from 0.
- Megatron-LM (megatron/training/training.py, training_log, core_v0.12.3), Megatron-Bridge
  (src/megatron/bridge/training/utils/train_utils.py, v0.3.0) and Megatron-DeepSpeed
  (megatron/training.py, 00caa0e) print losses as `{:.6E}`; iterations count from 1, every field
  ends with a bar, and a loss that is NaN is not printed at all.
- NeMo 1 and Lightning draw a progress bar (nemo/collections/nlp/parts/nlp_overrides.py:1801,
  v2.3.2; tqdm), again and again on one line, with three decimals; global_step counts from 0.
- torchtitan (torchtitan/components/metrics.py, 00fbaaf; b5bcd76) prints the loss with four
  decimals, then with five; steps count from 1.
- MaxText (src/maxtext/common/metric_logger.py, e591f30), litgpt (litgpt/pretrain.py, 2685705),
  nanochat (scripts/base_train.py, 92d63d4), nanoGPT (train.py, 3adf61e) and DeepSpeed's pipeline
  engine (deepspeed/runtime/pipe/engine.py, a DeepSpeed of 2026) print a line a step.
- OLMo-core (src/olmo_core/train/callbacks/console_logger.py, v2.5.0), Composer
  (composer/loggers/console_logger.py, 6405188) and Hugging Face's Trainer (ProgressCallback) print
  several, which multiline.py puts on one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

VALUE = r"[-+.0-9A-Za-z]{1,32}"  # whether it is a number is seen when it is read as one

# [2025-06-02 12:00:00.123456], 2025-06-02T12:00:00Z, 2025-06-02 12:00:00,123
STAMP = re.compile(r"(\[?20\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d[-+.,:\dZ]{0,20}\]?)")
ANY_STAMP = r"\[?20\d\d-\d\d-[-+.,:\dTZ ]{8,40}\]?"


@dataclass(frozen=True)
class Dialect:
    """How one framework prints a training step.

    `mark`: where a line begins to tell a step.  `head`: that beginning, with the groups iteration,
    total and epoch, as far as it has them.  `marks`: texts that each whole line holds once.
    `columns`: printed field -> column. `split`: what lies between fields; `before` and `equals`:
    patterns of what stands before a field's name and value; `other`: of a value that is not read;
    `value` and `unit`: of one that is, and of what may follow it; `end`: of what follows the last
    field; `after`: of the blanks behind a value. `closed`: whether a separator ends every field,
    the last one too.  `counts_garbled`: whether a head without a loss is a line that was cut.
    `digits`: significant digits of the loss, or, where `decimals` is given, those follow from its
    size. `total_counts`: whether the printed total is the number of steps, also where iterations
    count from 0. `averages`: whether a line's loss is the mean of the steps since the line before.
    `note`: what a reader of these losses should know. `heldout`: an evaluation's line, with the
    groups step, loss and test.
    """

    name: str
    mark: str
    marks: tuple[str, ...]
    head: re.Pattern[str]
    columns: dict[str, str]
    first_iteration: int
    split: re.Pattern[str]
    before: str
    equals: str
    other: str
    end: str
    value: str = VALUE
    unit: str = ""
    after: str = r"[ \t]*"
    closed: bool = False
    counts_garbled: bool = True
    digits: int = 7
    decimals: int | None = None
    heldout: re.Pattern[str] | None = None
    total_counts: bool = False
    averages: bool = False
    note: str = ""

    def with_loss(self, name: str | None) -> Dialect:
        """Return the dialect with another field as its loss."""
        if name is None:
            return self
        kept = {field: column for field, column in self.columns.items() if column != "loss"}
        return replace(self, columns={**kept, name: "loss"})


BARS = re.compile(r"\|")
NEMO = Dialect(
    name="NeMo console log",
    mark="Training epoch ",
    marks=("Training epoch ",),
    head=re.compile(
        r"Training epoch (?P<epoch>\d{1,9}), iteration (?P<iteration>\d{1,15})/(?P<total>\d{1,15})["
        r" \t]*"
    ),
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
        "peak_memory_usage": (
            "reserved_bytes"
        ),  # nemo/lightning/pytorch/strategies/megatron_strategy.py:721, v2.3.2
        "tokens_per_sec_per_gpu": "tokens_per_s",  # nemo/utils/exp_manager.py:347, v2.3.2
        "tokens_per_s_per_gpu": "tokens_per_s",
        "TFLOPS_per_GPU": (
            "tflops"
        ),  # nemo/lightning/pytorch/callbacks/flops_callback.py:143, v2.3.2
    },
    first_iteration=0,
    split=BARS,
    before=r"\|[ \t]*",
    equals=":",
    other=r"[^|\n]*",
    end=r"[ \t]*$",
    digits=4,
    averages=True,
    heldout=re.compile(
        r"Validation: iteration \d{1,9}/\d{1,9} \| global_step: (?P<step>\d{1,15}) "
        r"\| val_loss: (?P<loss>\d{1,15}(?:\.\d{1,15})?(?:e[-+]\d{1,2})?)[ \t]*$(?P<test>)?",
        re.MULTILINE,
    ),
)
MEGATRON = Dialect(
    name="Megatron console log",
    mark="iteration ",
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
        "actual seqlen": "seq_length",
        "number of skipped iterations": "skipped",
        "number of nan iterations": "nan",
    },
    first_iteration=1,
    split=BARS,
    before=r"\|[ \t]*",
    equals=":",
    other=r"[^|\n]*",
    end=r"\|",
    closed=True,
    averages=True,
    heldout=re.compile(
        r"validation loss at (?:iteration (?P<step>\d{1,15})(?: on (?P<set>validation|test)"
        r" set)?|the end of training for (?P<data>val|test) data)"
        r" \| lm loss value: (?P<loss>\d\.\d+E[-+]\d+|-?NAN|INF) \|"
    ),
)
BAR = Dialect(
    name="Lightning progress bar",
    mark="Epoch ",
    marks=("%|",),
    head=re.compile(
        r"Epoch (?P<epoch>\d{1,9}):[ :]{0,3}\s*\d{0,3}%\|[^|\n]{0,400}\| "
        r"(?P<iteration>\d{1,15})/(?P<total>\d{1,15}) \[[^,\]\n]{0,40}"
    ),
    columns={
        "global_step": "global_step",
        "reduced_train_loss": "loss",
        "grad_norm": "grad_norm",
        "lr": "lr",
        "train_step_timing in s": "step_time_s",
        "global_batch_size": "global_batch",
        "consumed_samples": "samples",
        "val_loss": "val_loss",
        "max_memory_allocated": "memory_bytes",
        "max_memory_reserved": "reserved_bytes",
        "peak_memory_usage": "reserved_bytes",
        "TFLOPS_per_GPU": "tflops",
    },
    first_iteration=1,
    split=re.compile(","),
    before=r",[ \t]*",
    equals="=",
    other=r"[^,\]\n]*",
    end=r"\]",
    decimals=3,
    counts_garbled=False,
)
TITAN = Dialect(
    name="torchtitan console log",
    mark="step:",
    marks=("loss:", "tps:"),
    head=re.compile(r"(?<!validate )step:[ \t]*(?P<iteration>\d{1,15})(?=[ \t]+loss:)"),
    columns={
        "loss": "loss",
        "grad_norm": "grad_norm",
        "memory": "reserved_gib",
        "tps": "tokens_per_s",
        "tflops": "tflops",
    },
    first_iteration=1,
    split=re.compile(r"[ \t]+(?=\w{1,40}:)"),
    before=r"[ \t]+",
    equals=":",
    other=r"[ \t]*\S+",
    end=r"[ \t]*$",
    value=r"(?:[-+.,\d]{1,32}|nan|inf)",
    unit=r"(?:GiB\([-.\d]+%\))?",
    after="",
    decimals=4,
    heldout=re.compile(
        r"validate step:[ \t]*(?P<step>\d{1,15})[ \t]+loss:["
        r" \t]*(?P<loss>\d{1,9}\.\d{1,9})(?P<test>)?"
    ),
)
OPEN_BAR = replace(
    BAR,
    name="Lightning progress bar without a total",
    marks=("it/s, ",),
    head=re.compile(
        r"Epoch (?P<epoch>\d{1,9}):[ :]{0,3}\s*(?:\|[^|\n]{0,400}\|["
        r" ]{0,3})?(?P<iteration>\d{1,15})(?:/\?|it) \[[^,\]\n]{0,40}"
    ),
)
MAXTEXT = Dialect(
    name="MaxText console log",
    mark="completed step:",
    marks=("completed step:",),
    head=re.compile(r"completed step:[ \t]*(?P<iteration>\d{1,15})"),
    columns={
        "loss": "loss",
        "seconds": "step_time_s",
        "TFLOP/s/device": "tflops",
        "Tokens/s/device": "tokens_per_s",
    },
    first_iteration=0,
    split=re.compile(","),
    before=r",[ \t]*",
    equals=":",
    other=r"[^,\n]*",
    end=r"[ \t]*$",
    decimals=3,
    heldout=re.compile(
        r"(?:eval metrics after step: |Completed eval after train step )(?P<step>\d{1,15}),"
        r" loss=(?P<loss>\d{1,9}\.\d{1,9})(?P<test>)?"
    ),
)
LITGPT = Dialect(
    name="litgpt console log",
    mark="Epoch ",
    marks=("| loss train: ",),
    head=re.compile(r"Epoch \d{1,9} \| iter \d{1,15} step (?P<iteration>\d{1,15})[ \t]*"),
    columns={"loss train": "loss"},
    first_iteration=1,
    split=re.compile(r"[|,]"),
    before=r"[|,][ \t]*",
    equals=":",
    other=r"[^|,\n]*",
    end=r"[^\n]*$",
    decimals=3,
    note="its iter time is that of a micro-batch, so the log holds no step time",
)
NANOCHAT = Dialect(
    name="nanochat console log",
    mark="step ",
    marks=("| lrm: ",),
    head=re.compile(r"step (?P<iteration>\d{1,15})/(?P<total>\d{1,15}) \(\d{1,3}\.\d\d%\)[ \t]*"),
    columns={"loss": "loss", "dt": "step_time_ms"},
    first_iteration=0,
    split=BARS,
    before=r"\|[ \t]*",
    equals=":",
    other=r"[^|\n]*",
    end=r"[ \t]*$",
    value=r"[-+.\d]{1,32}|nan|inf",
    unit="(?:ms)?",
    decimals=6,
    total_counts=True,
    averages=True,
    note=(
        "its losses are an exponential mean over steps (0.9); compare it with a run of the same"
        " harness"
    ),
)
NANOGPT = Dialect(
    name="nanoGPT console log",
    mark="iter ",
    marks=(": loss ",),
    head=re.compile(r"iter (?P<iteration>\d{1,15})(?=: loss )"),
    columns={"loss": "loss", "time": "step_time_ms"},
    first_iteration=0,
    split=re.compile(r"[:,](?= )"),
    before=r"[:,][ \t]",
    equals=" ",
    other=r"[^,\n]*",
    end=r"[ \t]*$",
    value=r"[-+.\d]{1,32}|nan|inf",
    unit="(?:ms)?",
    decimals=4,
)
DEEPSPEED = Dialect(
    name="DeepSpeed pipeline console log",
    mark="steps: ",
    marks=("iter time (s): ",),
    head=re.compile(r"steps: (?P<iteration>\d{1,15})(?= loss: )"),
    columns={"loss": "loss", "iter time (s)": "step_time_s"},
    first_iteration=1,
    split=re.compile(r" (?=(?:iter time \(s\)|[\w/]{1,40}):)"),
    before=" ",
    equals=":",
    other=r"[ \t]*\S+",
    end=r"[ \t]*$",
    after="",
    decimals=4,
)
JOINED = replace(
    MEGATRON, end=r"[ \t]*$", closed=False, averages=False, heldout=None
)  # fields as multiline.py puts them on a line
OLMO = replace(
    JOINED,
    name="OLMo-core console log",
    mark="[step=",
    marks=("[step=",),
    head=re.compile(
        r"\[step=(?P<iteration>\d{1,15})/(?P<total>\d{1,15}),epoch=\d{1,9}(?:,eta=[^\]\n]{0,60})?\]["
        r" \t]*"
    ),
    columns={
        "train/CE loss": "loss",
        "optim/total grad norm": "grad_norm",
        "throughput/device/TPS": "tokens_per_s",
        "gpu_memory/peak_reserved (GB)": "reserved_gb",
    },
    equals="=",
    value=r"[-+.,\d]{1,32}(?:[eE][-+]?\d{1,3})?|nan|-?inf",
    counts_garbled=False,  # steps without metrics
    digits=4,
)
COMPOSER = replace(
    JOINED,
    name="Composer console log",
    mark="[batch=",
    marks=("[batch=",),
    head=re.compile(r"(?<!Eval )\[batch=(?P<iteration>\d{1,15})/(?P<total>\d{1,15})\]:[ \t]*"),
    columns={
        "Train loss/train/total": "loss",
        "Train throughput/device/tokens_per_sec": "tokens_per_s",
        "Train l2_norm/grad/global": "grad_norm",
    },
    counts_garbled=False,
    decimals=4,
)
HUGGING_FACE = Dialect(
    name="Hugging Face Trainer console log",
    mark="Trainer step ",
    marks=("Trainer step ",),
    head=re.compile(r"Trainer step (?P<iteration>\d{1,15})/(?P<total>\d{1,15})"),
    columns={"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr"},
    first_iteration=1,
    split=re.compile(","),
    before=r",[ \t]*",
    equals=":",
    other=r"[^,}\n]*",
    end=r"\}",
    counts_garbled=False,  # summaries
    digits=4,
    averages=True,
)
DIALECTS = {
    "nemo": NEMO,
    "megatron": MEGATRON,
    "torchtitan": TITAN,
    "progress-bar": BAR,
    "open-progress-bar": OPEN_BAR,
    "maxtext": MAXTEXT,
    "litgpt": LITGPT,
    "nanochat": NANOCHAT,
    "nanogpt": NANOGPT,
    "deepspeed": DEEPSPEED,
    "olmo-core": OLMO,
    "composer": COMPOSER,
    "hugging-face": HUGGING_FACE,
}


@dataclass(frozen=True)
class Shape:
    """The fields that a training line had, and patterns that read such lines, a group a column.

    `match` reads one line; `block` every line of a text that has the first one's prefix (and so its
    rank) too.
    """

    match: Callable[[str, int], re.Match[str] | None]
    block: re.Pattern[str]
    columns: list[str]
    loss_is_last: bool
    fields: list[str]


def learn(dialect: Dialect, line: str, at: int) -> Shape | None:
    """Return the shape of a training line that starts at `at`; None where it is cut, garbled or no
    training line.
    """
    head = dialect.head.match(line, at)
    if head is None:
        return None
    rest = line[head.end() :].rstrip()
    closing = rest.find(dialect.end[1:]) if dialect.end in (r"\]", r"\}") else -1
    fields = dialect.split.split(rest if closing < 0 else rest[:closing])
    if len(fields) < 2 or fields[0].strip():
        return None
    if dialect.closed:
        fields.pop()  # what follows the last bar, or a field that was cut before its bar
    names = [field.rpartition(dialect.equals)[0].strip() for field in fields[1:]]
    columns = [dialect.columns[name] for name in names if name in dialect.columns]
    if len(set(columns)) < len(columns) or not _is_whole(dialect, columns):
        return None
    body = dialect.head.pattern + "".join(_field(dialect, name) for name in names) + dialect.end
    pattern = re.compile(body, re.MULTILINE)
    if not pattern.match(line, at):
        return None
    heads = sorted(dialect.head.groupindex, key=dialect.head.groupindex.__getitem__)
    block = re.compile(f"^{_prefix(line[:at])}{body}", re.MULTILINE)
    return Shape(
        pattern.match, block, [*heads, *columns], dialect.columns.get(names[-1]) == "loss", names
    )


def _is_whole(dialect: Dialect, columns: list[str]) -> bool:
    """A line tells its loss; Megatron's leaves out one that is NaN, and counts it at the line's
    end.
    """
    return ("nan" if dialect.closed else "loss") in columns


def _field(dialect: Dialect, name: str) -> str:
    if not name:
        return dialect.before + dialect.other
    value = (
        rf"[ \t]*({dialect.value}){dialect.unit}{dialect.after}"
        if name in dialect.columns
        else dialect.other
    )
    return rf"{dialect.before}{re.escape(name)}{dialect.equals}{value}"


def _prefix(text: str) -> str:
    """Return a pattern of what stands before a training line, in which only a time stamp may
    change.
    """
    return "".join(
        ANY_STAMP if STAMP.fullmatch(part) else re.escape(part) for part in STAMP.split(text)
    )
