"""Can the numbers of a run be true together, for the plan that they claim and the device that it
names?

Well-formed numbers can be impossible: a step in less time than the GPU's peak allows, more memory
than it has, tokens that are not the plan's, a rate that contradicts its step time, the learning
rate or the loss of another run.  Each check compares a column of metrics.jsonl with the plan, with
another column, or with the times in events.jsonl.  All checks work on whole columns.  Every reader
of run folders calls `refuse_impossible`; importers call the limits before they write one.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray

from recipes.errors import InputError
from recipes.estimate.flops import mfu, peak_tflops
from recipes.estimate.fp8_gemms import refusal
from recipes.estimate.memory import GIB_PER_GB
from recipes.estimate.schedule import rates
from recipes.estimate.sizes import parameters
from recipes.paths import CONF
from recipes.plan import Gpu, Plan
from recipes.run_folder import rows_of, sha256

Columns = Mapping[str, NDArray[np.float64]]
Bad = NDArray[np.bool_]
ANY_GPU = re.compile(r"\b(NVIDIA|Tesla)\b")
CHANGED = "the file was changed or mixed up with another run's; restore it, or run it again"
ROUNDING = 1e-6  # relative: a value computed twice in 64 bits, or kept once in 32 bits
CLOCK_S = 1e-4  # two CUDA events: elapsed_time has microseconds, in 32 bits
# Nats.  Weights drawn at random know nothing of the data, so the first loss is ln(vocabulary) and
# half the variance of the logits, hidden_size x 0.02^2 at most in NeMo's recipes.  Measured: 0.00
# to 0.55 above it, 3.25 at a width of 16,384.
BELOW_FIRST_LOSS, ABOVE_FIRST_LOSS = 0.5, 1.0
INIT_VARIANCE = 0.02**2
LEAST_BYTES = 4  # per parameter: BF16 weight and gradient, sharded over all GPUs at best
UNEVEN = 0.5  # a rank may hold half of the mean share: stages of a pipeline differ
CLOCKS_APART = timedelta(minutes=10)  # of two hosts; Slurm's own authentication refuses more than 5
# A session's steps beside its wall-clock time, which a host may adjust.
WALL_SLACK, WALL_SLACK_S = 0.01, 2.0
MOST_PAUSED = 100  # times the steps' time between start and end: evaluations, checkpoints, data
PAUSES_FROM_S = 30.0
RUN_OF_LOSSES = 6
MIXER = np.uint64(0x9E3779B97F4A7C15)  # an odd multiplier spreads the digests over 64 bits
# Of the limits that the driver enforces; power is a mean, and may shoot over its limit.
CLOCK_OVER, POWER_OVER = 1.01, 1.5
ENERGY_FROM_S = 0.5  # median step: NVML's counter of energy is renewed ten times a second
POWER_RATIO = 2.0  # of a step's energy over its time to the power that was sampled in it


def most_memory_gb(gpu: Gpu) -> float | None:
    """Return the memory that a GPU can have allocated, in GB of 1e9 bytes; None for a CPU.

    A data sheet's GB are GiB: nvidia-smi shows 81,559 MiB for 80 GB, 143,771 for 141.
    """
    return gpu.memory_gb * GIB_PER_GB if gpu.memory_gb and gpu.compute_capability else None


def utilisation(plan: Plan, step_time_s: float) -> float:
    """Return the share of its GPUs' peak that a step of so many seconds takes, of the fewest FLOPs;
    0 where no peak is known.

    Attention counts as causal.  Where documents are masked from each other less than that is
    computed, and none is counted.
    """
    peak = peak_tflops(plan.gpu, plan.precision)
    if not peak:
        return 0.0
    rate = plan.tokens_per_step / plan.num_gpus / step_time_s
    length = 1 if plan.data.reset_attention_mask else plan.seq_length
    return mfu(rate, plan.model, length, True, peak)


def refuse_other_hardware(folder: Path, plan: Plan, manifest: Mapping[str, Any]) -> None:
    """Raise InputError where the device or the GPUs of a manifest are not the plan's."""
    if wrong := _other_hardware(plan, manifest):
        raise InputError(
            f"{folder / 'manifest.json'}: {wrong}; the file is another run's, or the run is not"
            " what its plan says"
        )


def _other_hardware(plan: Plan, manifest: Mapping[str, Any]) -> str | None:
    """Return which key of a manifest contradicts the plan, and how; None for none."""
    count, device, gpus = (manifest.get(key) for key in ("num_gpus", "device", "gpus"))
    if count is not None and count != plan.num_gpus:
        return f"num_gpus is {count}, and the plan's is {plan.num_gpus}"
    if isinstance(device, str) and not names_device(plan.gpu, device):
        return f"device is {device}, and the plan's is {plan.gpu.name}"
    records = [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    if not records:
        return None
    ranks = [gpu.get("rank") for gpu in records]
    if len(set(map(str, ranks))) < len(ranks) or not set(range(plan.num_gpus)).issuperset(ranks):
        return (
            f"gpus has ranks {', '.join(map(str, ranks))[:80]}, and the plan has {plan.num_gpus}"
            " GPU(s)"
        )
    for gpu in records:
        name = gpu.get("name")
        if isinstance(name, str) and not names_device(plan.gpu, name):
            return f"gpus names rank {gpu['rank']}'s GPU {name}, and the plan's is {plan.gpu.name}"
    named = [gpu["uuid"] for gpu in records if gpu.get("uuid")]
    if len(set(named)) < len(named):
        return "gpus has one UUID for two ranks, and each rank has a GPU of its own"
    return None


def names_device(gpu: Gpu, device: str) -> bool:
    """Return whether a device's own name is that of a plan's GPU: an H200 is no H20.

    Unknown names fit any GPU of their own.
    """
    wanted = gpu.device_name or _device_names().get(gpu.name)
    if gpu.compute_capability is None:
        return not ANY_GPU.search(device) and not any(
            _has_word(device, name) for name in _device_names().values()
        )
    return wanted is None or _has_word(device, wanted)


def _has_word(text: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


@functools.cache
def _device_names() -> dict[str, str]:
    """Return conf/gpu's device names by GPU: plans of earlier versions of this project have none of
    their own.
    """
    found = {
        path.stem: yaml.safe_load(path.read_text()).get("device_name")
        for path in sorted((CONF / "gpu").glob("*.yaml"))
    }
    return {gpu: str(name) for gpu, name in found.items() if name}


@dataclass(frozen=True)
class _Check:
    """A column whose values are possible where `good` holds; `why` says for a row what it
    contradicts.
    """

    key: str
    good: Bad
    why: Callable[[int], str]

    def refuse(self, path: Path, columns: Columns, remedy: str) -> None:
        """Raise InputError for the first value that is impossible."""
        rows = np.flatnonzero(~self.good)
        if rows.size:
            row = int(rows[0])
            more = f" (and {rows.size - 1:,} more steps)" if rows.size > 1 else ""
            value = f"{columns[self.key][row]:.10g}"
            where = f"{path}: step {columns['step'][row]:.0f}: {self.key} is {value}{more}"
            raise InputError(f"{where}: {self.why(row)}; {remedy}")


def refuse_impossible(
    folder: Path, plan: Plan, manifest: Mapping[str, Any], steps: Columns, heldout: Columns
) -> None:
    """Raise InputError for the first thing in a run folder of this project that cannot be true.

    `steps` and `heldout` are the columns of the training lines and of the evaluations, complete and
    in order.
    """
    path, events = folder / "metrics.jsonl", rows_of(folder / "events.jsonl")
    refuse_other_hardware(folder, plan, manifest)
    refuse_other_gemms(folder, plan, steps)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows here is refused below
        checks = [*_training(plan, steps), *_device(steps, manifest), *_peak(steps, events)]
    for check in checks:
        check.refuse(path, steps, CHANGED)
    for check in _evaluations(plan, heldout):
        check.refuse(path, heldout, CHANGED)
    _refuse_wall_clock(folder, steps, events)
    _refuse_other_file(folder, events)


def refuse_other_gemms(folder: Path, plan: Plan, steps: Columns) -> None:
    """Raise InputError where a step ran other FP8 GEMMs than the plan implies: a number in FP8,
    none in BF16.
    """
    gemms = steps.get("fp8_gemms", np.zeros(0))
    for counted in np.unique(gemms):
        if wrong := refusal(plan, float(counted)):
            at = steps["step"][(gemms == counted) | np.isnan(gemms) & np.isnan(counted)]
            where = f"{folder}/metrics.jsonl: {at.size} step(s), first in step {at[0]:.0f}"
            raise InputError(f"{where}: {wrong}; the run is not what its plan says")


def refuse_impossible_import(folder: Path, plan: Plan, steps: Columns, has_rate: bool) -> None:
    """Raise InputError for what cannot be true in a run folder that was made of another tool's log.

    Its schedule, its first step and its evaluations are that tool's, and single steps may be timed
    without waiting for the device.  `has_rate`: whether the plan's batch and GPUs are known to be
    the log's.
    """
    remedy = "the file was changed or the log is another run's; import the log again"
    path, tokens = folder / "metrics.jsonl", steps["tokens"]
    refuse_other_gemms(folder, plan, steps)
    rising = np.diff(tokens, prepend=0.0) > 0
    checks = [
        _Check("tokens", rising, lambda row: "tokens seen so far must rise with each step"),
        *_memory(plan, steps),
        *_signs(steps),
    ]
    for check in checks:
        check.refuse(path, steps, remedy)
    if has_rate and "step_time_s" in steps:
        times = steps["step_time_s"][len(steps["step_time_s"]) // 10 :]
        share = utilisation(plan, float(np.median(times)))
        if share > 1:
            raise InputError(
                f"{path}: step_time_s: the median gives {_above(plan, share)}; {remedy}"
            )


def _training(plan: Plan, steps: Columns) -> Iterator[_Check]:
    step, each = steps["step"], plan.tokens_per_step
    yield _Check(
        "tokens",
        steps["tokens"] == step * each,
        lambda row: f"the plan has {step[row] * each:,.0f} by then, {each:,} per step",
    )
    yield from _signs(steps)
    yield from _times(plan, steps)
    yield from _memory(plan, steps)
    if "lr" in steps:
        wanted = rates(plan.train, step)
        near = np.absolute(steps["lr"] - wanted) <= ROUNDING * plan.train.max_lr
        yield _Check("lr", near, lambda row: f"the plan's schedule gives {wanted[row]:.10g}")
    if "loss" in steps:
        yield _first_loss(plan, steps)
        yield _Check(
            "loss",
            ~_repeated(steps["loss"]),
            lambda row: f"it and the {RUN_OF_LOSSES - 1} after it stand at other steps too",
        )


def _signs(steps: Columns) -> Iterator[_Check]:
    """Yield the checks of columns that may lack a value and cannot be below 0; a time is above
    it.
    """
    for key in ("grad_norm", "optimizer_time_s", "gpu_sm_clock_mhz", "gpu_power_w", "gpu_energy_j"):
        if key in steps:
            below = steps[key] <= 0 if key == "optimizer_time_s" else steps[key] < 0
            yield _Check(
                key, ~below & ~np.isinf(steps[key]), lambda row: "it must be a number above 0"
            )


def _times(plan: Plan, steps: Columns) -> Iterator[_Check]:
    time = steps["step_time_s"]
    shares = utilisation(plan, 1.0) / time
    yield _Check("step_time_s", shares <= 1, lambda row: f"it gives {_above(plan, shares[row])}")
    if "optimizer_time_s" in steps:
        optimizer = steps["optimizer_time_s"]
        within = ~(optimizer > time * (1 + ROUNDING) + CLOCK_S)
        yield _Check(
            "optimizer_time_s",
            within,
            lambda row: f"it is part of the step, which took {time[row]:.6g} s",
        )
    if "tokens_per_s_per_gpu" in steps:
        rate = plan.tokens_per_step / plan.num_gpus / time
        near = np.absolute(steps["tokens_per_s_per_gpu"] / rate - 1) <= ROUNDING
        yield _Check(
            "tokens_per_s_per_gpu",
            near,
            lambda row: f"the step time of {time[row]:.6g} s gives {rate[row]:,.6g}",
        )


def _above(plan: Plan, share: float) -> str:
    return (
        f"an MFU of {share:.0%} of {plan.gpu.name}'s peak of"
        f" {peak_tflops(plan.gpu, plan.precision):g} TFLOP/s, which is impossible"
    )


def _memory(plan: Plan, steps: Columns) -> Iterator[_Check]:
    if "memory_gb" not in steps:
        return
    held, most = steps["memory_gb"], most_memory_gb(plan.gpu) or math.inf
    least = UNEVEN * LEAST_BYTES * parameters(plan.model) / plan.num_gpus / 1e9
    yield _Check(
        "memory_gb",
        (held <= most) & np.isfinite(held),
        lambda row: f"{plan.gpu.name} has {most:.4g} GB at most",
    )
    yield _Check(
        "memory_gb",
        held >= least,
        lambda row: f"weights and gradients alone need {least:.3g} GB per GPU",
    )


def _first_loss(plan: Plan, steps: Columns) -> _Check:
    """Return the check of the loss before any update; tied embeddings may make it large, for each
    token predicts itself.
    """
    uniform, loss = math.log(plan.model.vocab_size), steps["loss"]
    above = (
        math.inf
        if plan.model.tied_embeddings
        else ABOVE_FIRST_LOSS + INIT_VARIANCE * plan.model.hidden_size
    )
    good = (steps["step"] != 1) | (loss >= uniform - BELOW_FIRST_LOSS) & (loss <= uniform + above)
    why = (
        f"weights drawn at random give {uniform - BELOW_FIRST_LOSS:.2f} to {uniform + above:.2f}"
        f" for a vocabulary of {plan.model.vocab_size:,}"
    )
    return _Check("loss", good, lambda row: f"{why}, so the column is another run's")


def _repeated(loss: NDArray[np.float64]) -> Bad:
    """Return where RUN_OF_LOSSES losses begin that stand a second time in the same order, to the
    last bit.

    By chance that is one in 10^3 for 10^6 steps whose losses take no more than 400 values.
    """
    bits, count = np.ascontiguousarray(loss).view(np.uint64), max(loss.size - RUN_OF_LOSSES + 1, 0)
    digest = np.zeros(count, dtype=np.uint64)
    for offset in range(RUN_OF_LOSSES):
        digest = digest * MIXER + bits[offset : offset + count]
    _, which, counts = np.unique(digest, return_inverse=True, return_counts=True)
    return np.concatenate([counts[which] > 1, np.zeros(loss.size - count, dtype=bool)])


def _device(steps: Columns, manifest: Mapping[str, Any]) -> Iterator[_Check]:
    """Yield the checks of what rank 0's GPU wrote: its clock and power beside its limits, its
    energy beside power and time.
    """
    gpus = manifest.get("gpus")
    gpu = gpus[0] if isinstance(gpus, list) and gpus and isinstance(gpus[0], dict) else {}
    for key, limit, over in (
        ("gpu_sm_clock_mhz", "max_sm_clock_mhz", CLOCK_OVER),
        ("gpu_power_w", "power_limit_w", POWER_OVER),
    ):
        most = gpu.get(limit)
        if key in steps and isinstance(most, int | float) and most:
            told = f"manifest.json has {most:g} as its {limit}"
            yield _Check(key, ~(steps[key] > over * most), functools.partial(_constant, told))
    energy, power, time = (steps.get(key) for key in ("gpu_energy_j", "gpu_power_w", "step_time_s"))
    if energy is None or power is None or time is None or np.median(time) < ENERGY_FROM_S:
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = energy / (time * power)
    known = ratio[np.isfinite(ratio)]
    middle = float(np.median(known)) if known.size else 1.0
    good = np.full(time.size, 1 / POWER_RATIO <= middle <= POWER_RATIO)
    yield _Check(
        "gpu_energy_j",
        good,
        lambda row: (
            f"over the step times the power is {middle:.3g} times what was sampled (median)"
        ),
    )


def _peak(steps: Columns, events: Sequence[Mapping[str, Any]]) -> Iterator[_Check]:
    """Yield the check that a peak of memory falls where a process began, and nowhere else; runs
    without events are passed over.
    """
    if "memory_gb" in steps and events:
        begun = [
            row["step"]
            for row in events
            if row.get("event") == "resume" and isinstance(row.get("step"), int)
        ]
        rises = np.diff(steps["memory_gb"], prepend=0.0) >= 0
        again = np.isin(steps["step"] - 1, begun)
        yield _Check(
            "memory_gb",
            rises | again,
            lambda row: "it is the peak since the process began, and none began at this step",
        )


def _evaluations(plan: Plan, heldout: Columns) -> Iterator[_Check]:
    if not heldout:
        return
    step, interval = heldout["step"], plan.train.eval_interval
    due = (step % interval == 0) & (step <= plan.train.max_steps)
    yield _Check(
        "heldout_loss",
        due,
        lambda row: f"the plan evaluates every {interval} steps to step {plan.train.max_steps}",
    )
    if "tokens" in heldout:
        wanted = step * plan.tokens_per_step
        yield _Check(
            "tokens",
            heldout["tokens"] == wanted,
            lambda row: f"the plan has {wanted[row]:,.0f} by then",
        )


def _constant(text: str, row: int) -> str:
    return text


@dataclass(frozen=True)
class _Session:
    """A process from start or resume to end or pause: its first and last step, and the seconds
    between the two events.

    `whole`: whether no later session repeated some of these steps.
    """

    first: int
    last: int
    seconds: float
    whole: bool = True

    def until(self, step: int) -> _Session:
        """Return what is left of it where a later session goes on from `step`."""
        return self if step >= self.last else replace(self, last=step, whole=False)


def _refuse_wall_clock(folder: Path, steps: Columns, events: Sequence[Mapping[str, Any]]) -> None:
    """Compare the steps' time with the time between the events of their session."""
    for session in _sessions(folder / "events.jsonl", events):
        inside = (steps["step"] >= session.first) & (steps["step"] <= session.last)
        total = float(steps["step_time_s"][inside].sum())
        longer = total > session.seconds * (1 + WALL_SLACK) + WALL_SLACK_S
        shorter = session.whole and session.seconds > total * MOST_PAUSED + PAUSES_FROM_S
        if longer or shorter:
            where = f"{folder / 'metrics.jsonl'}: steps {session.first} to {session.last}"
            what = (
                f"step_time_s sums to {total:,.4g} s, and events.jsonl has {session.seconds:,.1f} s"
                " from start to end"
            )
            raise InputError(
                f"{where}: {what}{'' if longer else ', which no pauses explain'}; {CHANGED}"
            )


def _sessions(path: Path, events: Sequence[Mapping[str, Any]]) -> list[_Session]:
    """Return the sessions that the events close; InputError where their times run backwards."""
    found: list[_Session] = []
    begun: tuple[datetime, int] | None = None
    before: datetime | None = None
    for number, row in enumerate(events, 1):
        kind, step, time = row.get("event"), row.get("step"), _time(row.get("time"))
        if time is None:
            continue
        ends = kind in ("end", "pause")
        own = begun[0] if begun and ends else None
        if (own and time < own) or (before and time < before - CLOCKS_APART):
            raise InputError(
                f"{path}: event {number} ({kind}): its time, {row['time']}, lies before the one"
                f" before it; {CHANGED}"
            )
        before = time
        if kind in ("start", "resume"):
            begun = (time, step) if isinstance(step, int) else None
            found = [session.until(begun[1]) for session in found] if begun else found
        elif ends and begun and isinstance(step, int):
            found.append(_Session(begun[1] + 1, step, (time - begun[0]).total_seconds()))
            begun = None
    return found


def _time(text: Any) -> datetime | None:
    """Return the time of an event, with its zone; None for anything else."""
    with suppress(TypeError, ValueError):
        time = datetime.fromisoformat(text)
        return time if time.tzinfo else None
    return None


def _refuse_other_file(folder: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Compare metrics.jsonl with the digest that the run left at its end; runs of earlier versions
    left none.
    """
    ends = [
        row["metrics_sha256"]
        for row in events
        if row.get("event") == "end" and "metrics_sha256" in row
    ]
    path = folder / "metrics.jsonl"
    if ends and sha256(path) != ends[-1]:
        raise InputError(
            f"{path} is not the file that the run ended with (metrics_sha256 in events.jsonl);"
            f" {CHANGED}"
        )
