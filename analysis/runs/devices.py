"""Which GPUs runs were measured on, whether a pair shares them, and what clocks, power and energy
they recorded.

Two GPUs of one kind differ, so a speedup from two of them holds that difference too.  Where a
manifest does not show that both runs were on the same GPUs, alone, intervals are wider by what GPUs
were seen to differ by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from analysis.runs.load import Run
from analysis.runs.timing import timed
from recipes.gpu_record import UNKNOWN, GpuRecord, Others

# Measured 2026-11-29: Llama 3 8B in fp8_current took 4.298 s a step on one H200 and 4.327 s on
# another, the same code and settings.
BETWEEN_GPUS = 0.007
SAME, OTHER, SHARED, NOT_RECORDED = "same GPU", "other GPU", "shared GPU", "GPU not recorded"
REASONS = {
    OTHER: "Measured on another GPU than the base",
    SHARED: "Another process computed on the GPU of this run or its base",
    NOT_RECORDED: (
        "The manifest of this run or its base does not show which GPU it was on, or what else ran"
        " there"
    ),
}


def records(run: Run) -> list[GpuRecord]:
    """Return the GPUs of a run's last session, one a rank; [] where none was recorded."""
    return [GpuRecord.model_validate(gpu) for gpu in run.manifest.get("gpus") or []]


def uuids(run: Run) -> frozenset[str]:
    """Return the GPUs that a run was on, earlier sessions included; UNKNOWN stands for one that is
    not named.
    """
    named = {gpu.uuid or UNKNOWN for gpu in records(run)} | set(
        run.manifest.get("gpus_before") or ()
    )
    return frozenset(named or {UNKNOWN})


def together(*runs: Run) -> str:
    """Return SAME where all runs were on the same GPUs, alone; SHARED, OTHER or NOT_RECORDED where
    they were not, or nothing shows it.
    """
    shared = [gpu.shared for run in runs for gpu in records(run)]
    named = {uuids(run) for run in runs}
    if True in shared:
        return SHARED
    if None in shared or any(UNKNOWN in gpus for gpus in named):
        return NOT_RECORDED
    return SAME if len(named) == 1 else OTHER


def apart(*runs: Run) -> float:
    """Return by which share step times of these runs may differ for their GPUs alone; 0 where they
    were on the same ones.
    """
    return 0.0 if together(*runs) == SAME else BETWEEN_GPUS


def notes(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return a sentence for each way in which pairs (name of the run, result of `together`) are not
    of the same GPU.
    """
    named = defaultdict[str, list[str]](list)
    for name, pair in pairs:
        named[pair].append(name)
    wider = f"intervals are wider by {BETWEEN_GPUS:.1%}, by which two H200s differed (measured)"
    return [
        f"{reason}; {wider}: {', '.join(named[pair])}."
        for pair, reason in REASONS.items()
        if pair in named
    ]


def shared_notes(runs: Iterable[Run]) -> list[str]:
    """Return a sentence on the runs on whose GPUs other processes were seen; [] where there are
    none.
    """
    named = [
        f"{run.name} ({_most(others)})"
        for run in runs
        if (others := [each for gpu in records(run) for each in gpu.seen if each.processes])
    ]
    return (
        [
            "Other processes were on the GPU while it was measured, and its step time may be"
            f" theirs too: {', '.join(named)}."
        ]
        if named
        else []
    )


def _most(others: Sequence[Others]) -> str:
    most = max(others, key=lambda each: (each.processes, each.memory_gb or 0))
    held = "" if most.memory_gb is None else f", {most.memory_gb:.1f} GB"
    return f"at most {most.processes} on a GPU{held}"


def mark(values: dict[str, Any]) -> str:
    """Return what follows a step time that was measured while other processes were on the GPU."""
    return " (shared GPU)" if values["gpu_shared"] else ""


def mean(run: Run, column: str) -> float | None:
    """Return the mean over the timed steps of a column that rank 0's GPU wrote; None where it was
    not recorded.
    """
    values = timed(run, column) if column in run.steps else np.array([np.nan])
    return None if np.isnan(values).all() else float(np.nanmean(values))


def energy_per_step_j(run: Run) -> float | None:
    """Return the joules of a step of all GPUs, that of rank 0's GPU standing for each."""
    energy = mean(run, "gpu_energy_j")
    return None if energy is None else energy * run.plan.num_gpus


def facts(run: Run) -> dict[str, Any]:
    """Return what was recorded of a run's GPUs, as plain values; None for what was not."""
    gpus, energy = records(run), energy_per_step_j(run)
    first, cudnn = gpus[0] if gpus else None, run.manifest.get("cudnn") or {}
    return {
        "gpu_uuids": sorted(uuids(run)),
        "gpu_shared": (
            True
            if True in (known := [gpu.shared for gpu in gpus])
            else None
            if None in known or not known
            else False
        ),
        "driver": first and first.driver,
        "cudnn": cudnn,
        "power_limit_w": first and first.power_limit_w,
        "power_w": mean(run, "gpu_power_w"),
        "sm_clock_mhz": mean(run, "gpu_sm_clock_mhz"),
        "max_sm_clock_mhz": first and first.max_sm_clock_mhz,
        "energy_per_step_j": energy,
        "energy_per_token_j": None if energy is None else energy / run.plan.tokens_per_step,
    }


def described(run: Run) -> dict[str, str]:
    """Return the same as a reader wants it."""
    found = facts(run)
    named = ", ".join(found["gpu_uuids"][:8]) + (
        f" and {len(found['gpu_uuids']) - 8} more" if len(found["gpu_uuids"]) > 8 else ""
    )
    others = {None: "not recorded", True: "yes", False: "none seen"}[found["gpu_shared"]]
    loaded = ", ".join(f"{name} {version}" for name, version in found["cudnn"].items())
    return {
        "GPU": named,
        "other processes on it": others,
        "driver": found["driver"] or UNKNOWN,
        "cuDNN": loaded or UNKNOWN,
        "clock, power": clocks(found),
        "energy": (
            UNKNOWN
            if found["energy_per_step_j"] is None
            else f"{found['energy_per_step_j']:,.0f} J a step, {per_token(found)} J a token"
        ),
    }


def clocks(found: dict[str, Any]) -> str:
    """Return the mean SM clock and power while training, beside their limits."""
    clock, power, cap, most = (
        found[key] for key in ("sm_clock_mhz", "power_w", "power_limit_w", "max_sm_clock_mhz")
    )
    parts = [f"{clock:,.0f} of {most:,.0f} MHz" if most else f"{clock:,.0f} MHz"] if clock else []
    parts += [f"{power:.0f} of {cap:.0f} W" if cap else f"{power:.0f} W"] if power else []
    return ", ".join(parts) or UNKNOWN


def per_token(found: dict[str, Any]) -> str:
    """Return joules a token with three significant digits."""
    energy = found["energy_per_token_j"]
    return "–" if energy is None else f"{energy:.3g}"


def energy_notes(runs: Sequence[Run]) -> list[str]:
    """Return what the columns of clock, power and energy rest on; [] where no run has any."""
    if not any(facts(run)["sm_clock_mhz"] or facts(run)["energy_per_step_j"] for run in runs):
        return []
    several = any(run.plan.num_gpus > 1 for run in runs)
    return [
        "Clock and power: mean over the timed steps, sampled by NVML five times a second; energy:"
        " NVML's counter of the board between steps."
        + (" Measured on rank 0's GPU, which stands for each." if several else "")
    ]
