"""From a log to a run folder: the plan that the user states, the numbers that the log holds, and
what neither says.

What a foreign log cannot tell is never filled in: the manifest lists it as missing, or as asserted
where the user vouches for it.  The folder is written beside its place and renamed, so that there is
a whole one or none.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from analysis.importers.log import MOST_STEPS, Log, why_unsound
from analysis.importers.planning import SCALE, Planned
from analysis.runs.metrics import Array
from recipes.errors import InputError
from recipes.plan import Plan
from recipes.run_folder import event, set_status, write_json

ROWS = 1 << 14  # written at a time
WHOLE = ("step", "tokens", "fp8_gemms")  # columns of whole numbers
# Columns that are read, and no metrics of a run folder.
UNWRITTEN = ("samples", "global_batch", "seq_length", "skipped", "nan", "tokens_per_s", "tflops")
MOST_EVENTS = 1000


@dataclass(frozen=True)
class Vouched:
    """What the user asserts: the name of the batches, that FP8 ran, and where the loss comes
    from.
    """

    same_data: str | None = None
    fp8: bool = False
    label: str | None = None


def metrics_of(log: Log, plan: Plan) -> dict[str, Array]:
    """Return the training columns of metrics.jsonl; tokens are those of the samples where the log
    counts them.
    """
    steps = log.steps
    tokens = steps["step"] * plan.tokens_per_step
    if (samples := steps.get("samples")) is not None:
        np.copyto(tokens, samples * plan.seq_length, where=~np.isnan(samples))
    return {
        "step": steps["step"],
        "tokens": tokens,
        **{k: v for k, v in steps.items() if k not in UNWRITTEN},
    }


def add_step_times(log: Log, planned: Planned) -> None:
    """Where a log prints tokens/s per GPU and no step time (torchtitan), that follows from the
    plan's tokens and GPUs.
    """
    rate, assumed = (
        log.steps.get("tokens_per_s"),
        {*SCALE, "seq_length"}.intersection(planned.assumed),
    )
    if "step_time_s" in log.steps or rate is None or not (rate > 0).all():
        return
    if assumed:
        ask = " ".join(f"{key}=…" for key in sorted(assumed))
        log.said.append(
            "the log prints tokens/s per GPU and no step time, which follows from it with --set"
            f" {ask}"
        )
        return
    log.steps["step_time_s"] = planned.plan.tokens_per_step / planned.plan.num_gpus / rate
    log.said.append("step times follow from the tokens/s per GPU that the log prints")


def write(out: Path, log: Log, planned: Planned, files: Sequence[Path], vouched: Vouched) -> str:
    """Write the run folder `out`; return why it is no sound run, or ""."""
    plan = planned.plan
    metrics = metrics_of(log, plan)
    reason = why_unsound(log, plan.train.max_steps)
    part = out.with_name(out.name + ".part")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise InputError(
            f"{part} exists: another import is under way, or was cut; remove it if none is"
        ) from None
    except OSError as error:
        raise InputError(
            f"{part} cannot be written ({error.strerror}); choose another --out or make room"
        ) from None
    try:
        _fill(part, log, plan, metrics, manifest_of(log, planned, metrics, files, vouched), reason)
        part.rename(out)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}); choose another --out or make room"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return reason


def _fill(
    part: Path,
    log: Log,
    plan: Plan,
    metrics: dict[str, Array],
    manifest: dict[str, Any],
    reason: str,
) -> None:
    write_json(part / "plan.json", plan.model_dump())
    write_json(part / "manifest.json", manifest)
    with (part / "metrics.jsonl").open("wb") as file:
        file.writelines(_lines(metrics))
        if log.heldout:
            beyond = np.maximum(log.heldout["step"] - metrics["step"][-1], 0)
            tokens = np.interp(log.heldout["step"], metrics["step"], metrics["tokens"])
            tokens += beyond * plan.tokens_per_step
            file.writelines(
                _lines(
                    {
                        "step": log.heldout["step"],
                        "tokens": tokens,
                        "heldout_loss": log.heldout["heldout_loss"],
                    }
                )
            )
    event(part, "import", format=log.format, said=log.said)
    lost = (
        ~np.isfinite(log.steps["loss"])
        if "loss" in log.steps
        else np.zeros(len(metrics["step"]), dtype=bool)
    )
    for step in metrics["step"][lost][:MOST_EVENTS]:
        event(part, "non_finite_loss", step=int(step))
    set_status(part, "failed" if reason else "done", reason, int(metrics["step"][-1]))


def _lines(columns: dict[str, Array]) -> Iterator[bytes]:
    """Yield rows as JSON lines, column by column, for a million rows; a value that is no finite
    number becomes null.
    """
    keys = [f'{"," if i else "{"}"{name}":'.encode() for i, name in enumerate(columns)]
    for start in range(0, len(columns["step"]), ROWS):
        values = (_printed(name, column[start : start + ROWS]) for name, column in columns.items())
        cells = itertools.chain.from_iterable(zip(map(itertools.repeat, keys), values, strict=True))
        yield b"".join(itertools.chain.from_iterable(zip(*cells, itertools.repeat(b"}\n"))))


def _printed(name: str, values: Array) -> list[bytes]:
    whole = (
        name in WHOLE
        and bool(np.isfinite(values).all())
        and bool((np.abs(values) < MOST_STEPS).all())
    )
    exact = np.rint(values).astype(np.int64) if whole else np.ascontiguousarray(values)
    return orjson.dumps(exact, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")


def manifest_of(
    log: Log, planned: Planned, metrics: dict[str, Array], files: Sequence[Path], vouched: Vouched
) -> dict[str, Any]:
    """Return what is known of an imported run, what is missing and what the user vouches for."""
    plan = planned.plan
    loss = vouched.label or ("emulated" if plan.emulated and plan.precision.fp8 else "measured")
    facts: dict[str, Any] = {
        "code": None,
        "versions": None,
        "device": None,
        "data": None,
        "order_sha256": vouched.same_data,
        "planned steps": log.total,
    }
    facts |= {
        key: key in metrics or None
        for key in ("loss", "step_time_s", "fp8_gemms", "grad_norm", "lr")
    } | {"held-out losses": log.heldout or None}
    return {
        "order_sha256": vouched.same_data and f"asserted:{vouched.same_data}",
        "labels": {"loss": loss, "step_time": "measured"},
        "imported": {
            "format": log.format,
            "sources": [{"name": file.name, "sha256": _sha256(file)} for file in files],
            "missing": [name for name, known in facts.items() if known is None],
            "asserted": [
                f"plan ({plan.precision.name})",
                *(["same data"] if vouched.same_data else []),
                *(["fp8"] if vouched.fp8 else []),
            ],
            "stated": planned.stated,
            "assumed": planned.assumed,
            "memory_gb": log.memory_gb,
            "reserved_gb": log.reserved_gb,
            "loss_digits": log.loss_digits,
            "averaged": log.averaged,
            "stretches": [[s.first, s.last, s.every] for s in log.stretches],
            "test_loss": [
                list(pair)
                for pair in zip(*(log.test[key].tolist() for key in log.test), strict=True)
            ],
            "planned_steps": log.total,
            "said": log.said,
        },
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
