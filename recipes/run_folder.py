"""The run folder: the only thing that passes from training to analysis.

plan.json      the plan, as composed
manifest.json  what ran: code commit, versions seen inside the job, device, data, environment
               without secrets
metrics.jsonl  a line a step, full precision, appended; `fp8_gemms` is the evidence that FP8 was on
fp8.jsonl      what FP8 did to each layer's operands, at intervals: largest |x|, saturation,
               underflow, noise
events.jsonl   start, resume, pause, NaN, skipped updates, a checkpoint passed over, failure, end
               with the digest of metrics.jsonl
status.json    running, paused, done, failed (and why)
lock           held by the process that writes all this, as long as it lives
checkpoints/   NeMo's distributed checkpoints, the newest two, each with the checksums of its files
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.errors import InputError, one_line
from recipes.files import open_file, read_text
from recipes.overlap import overlaps_tp
from recipes.plan import Plan, plan_from_json

SESSION = "--- a run of this folder begins"  # in log.txt: what stands before is of an earlier one
CHECKPOINT = re.compile(
    r"step=(\d+)(-last)?"
)  # steps are counted from zero; -last: a copy, by earlier versions of this project
PORT_TAKEN = (  # a file by which rank 0 asks the job's script for a step with another port
    "port_taken"
)
# NeMo's file beside a checkpoint that is being written or removed (v2.3.2,
# callbacks/model_checkpoint.py)
UNFINISHED = "-unfinished"
BLOCK, LONGEST_LINE = 1 << 16, 1 << 24  # bytes; of a file that is read from its end
FLOCK = "hhqqi"  # struct flock of Linux on 64 bits: type, whence, start, length, pid (fcntl(2))
LAST_WORDS_S = 60  # a job that is queued again may start before the one before it has died


def folder_of(plan: Plan) -> Path:
    """Return the folder that this plan's run is written to and continued in."""
    return Path(plan.runs_dir) / plan.run_name


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append `row` as one JSON line in a single write, after ending a line that an earlier crash
    left open.
    """
    line = json.dumps(row, allow_nan=True) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())


def keep_until(path: Path, step: int) -> None:
    """Drop what a run that goes on from `step` writes again: the lines beyond it, and a line cut by
    a crash.
    """
    rows = [row for row in rows_of(path) if row["step"] <= step]
    if not path.exists():
        return
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)


@contextmanager
def only_writer(folder: Path, patience_s: float = LAST_WORDS_S) -> Iterator[None]:
    """Hold the run folder for this process; InputError where another one, on any node whose file
    system shares locks, goes on writing.

    A POSIX lock: it ends with the process, whatever ends it, and children do not keep it.
    """
    with (folder / "lock").open("w") as file:
        deadline = time.monotonic() + patience_s
        while _lock(file.fileno()) is False:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{folder}: another process trains this run; wait for it, or end it with `touch"
                    f" {folder / 'stop'}`"
                )
            time.sleep(0.5)
        yield


def is_written(folder: Path) -> bool | None:
    """Return whether a process holds the run folder; None where its lock cannot be asked (no right
    to read it, no locks there).

    The lock is asked, not taken, so that a run that is about to start is not refused.  Not to be
    asked by the process that holds it, which would let go.
    """
    try:
        with (folder / "lock").open("rb") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return bool(kind != fcntl.F_UNLCK)


def _lock(file: int) -> bool | None:
    """Take a lock; False where another process has it, None on a file system without locks, which
    is no reason not to train.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; OSError where it cannot be read, ValueError where it holds
    no such thing.
    """
    try:
        value = json.loads(read_text(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` beside `path` and rename, so that a reader sees the old file or the new one."""
    part = path.with_name(
        f"{path.name}.{socket.gethostname()}.{os.getpid()}.part"
    )  # nodes may write at once
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def event(folder: Path, kind: str, **facts: Any) -> None:
    """Append an event with its time (UTC) to events.jsonl."""
    append_line(
        folder / "events.jsonl", {"time": datetime.now(UTC).isoformat(), "event": kind, **facts}
    )


def set_status(folder: Path, status: str, reason: str = "", step: int = 0) -> None:
    """Record whether the run is running, paused, done or failed, why, and at which step."""
    write_json(folder / "status.json", {"status": status, "reason": reason, "step": step})


def status_of(folder: Path) -> str:
    """Return the status of a run folder; "new" where there is none yet; InputError where its file
    was changed or cut.
    """
    path = folder / "status.json"
    try:
        return (
            str(read_json(path)["status"]) if os.path.exists(path) else "new"
        )  # no name is too long to ask
    except (OSError, ValueError, KeyError):
        raise InputError(
            f"{path} cannot be read as a status: it was changed or cut; remove it to continue from"
            " the last checkpoint"
        ) from None


def read_plan(folder: Path) -> Plan:
    """Return the plan of a run folder; InputError where there is none, or none that this version
    reads.
    """
    try:
        return plan_from_json(read_text(folder / "plan.json"))
    except FileNotFoundError:
        raise InputError(f"{folder} is no run folder: it has no plan.json") from None
    except OSError as error:
        raise InputError(
            f"{folder / 'plan.json'} cannot be read ({error.strerror}); is this a run folder, and"
            " may you read it?"
        ) from None
    except ValueError as error:  # no text, no JSON, or no plan
        raise InputError(
            f"{folder / 'plan.json'} is no plan of this version: {one_line(str(error))[:120]}"
        ) from None


def open_folder(plan: Plan) -> Path:
    """Create or reopen the plan's folder; refuse one that holds another plan."""
    folder = check_folder(plan)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "plan.json", plan.model_dump())
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); choose another runs_dir or make room"
        ) from None
    return folder


def check_folder(plan: Plan) -> Path:
    """Return the plan's folder; InputError where it holds another plan."""
    folder = folder_of(plan)
    if os.path.exists(folder / "plan.json"):
        changed = differences(comparable(read_plan(folder)), comparable(plan))
        if changed:
            raise InputError(
                f"{folder} holds a run with another plan ({', '.join(changed)}); choose another"
                " run_name or remove the folder"
            )
    return folder


def comparable(plan: Plan) -> dict[str, Any]:
    """Return what decides a run's numbers: the plan without its place, its executor, when it pauses
    or gives up, and where values are from.
    """
    flat = flatten(plan.model_dump())
    place = ("executor.", "cluster.", "logger.", "runs_dir", "run_name", "data.demo_text")
    pauses = ("train.stop_after", "train.step_timeout_s", "train.log_interval")
    said = (
        "mapping.source",
        "settings.batch",
        "settings.layout",
        "model.convergence",
        "gpu.source",
    )
    for_predictions = ("gpu.hbm_tb_s", "gpu.nvlink_gb_s", "gpu.nic_gbit_s", "gpu.tdp_w")
    abilities = (
        "gpu.device_name",
        "gpu.nvlink_multicast",
        "stack.cuda",
        "stack.fp8.",
        "stack.missing",
        "stack.userbuffers",
        "stack.graphs_",
        "stack.offloads_",
    )
    flat["mapping.tp_overlap"] = overlaps_tp(plan)  # older plans leave it open
    left_out = (*place, *pauses, *said, *for_predictions, *abilities)
    return {k: v for k, v in flat.items() if not k.startswith(left_out)}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the dotted keys whose values differ between two flat dicts, sorted."""
    return sorted(k for k in a.keys() | b.keys() if a.get(k, "-") != b.get(k, "-"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the whole JSON lines of a file; a line cut by a crash is left out."""
    if not path.is_file():
        return []
    with open_file(path) as file:
        return [row for line in file if (row := _row(line)) is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def sha256(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder that were written to their end, newest first."""
    paths = [
        path
        for path in (folder / "checkpoints").glob("step=*")
        if path.is_dir() and not path.with_name(path.name + UNFINISHED).exists()
    ]
    named = [(int(name[1]), path) for path in paths if (name := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(named, reverse=True)]


def last_step(folder: Path) -> dict[str, Any]:
    """Return the newest training step's metrics, or {} before the first."""
    return next((row for row in last_rows(folder / "metrics.jsonl") if "loss" in row), {})


def last_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole JSON lines of a file from its end, which is read in blocks: the newest of a
    million costs one block.

    A line longer than LONGEST_LINE, and what stands before it, is left out.
    """
    if not path.is_file():
        return
    with open_file(path) as file:
        at, rest = file.seek(0, os.SEEK_END), b""
        while at and len(rest) <= LONGEST_LINE:
            size = min(at, BLOCK)
            at -= size
            file.seek(at)
            first, *lines = (file.read(size) + rest).split(b"\n")
            yield from (row for line in reversed(lines) if (row := _row(line)) is not None)
            rest = first
        if not at and (row := _row(rest)) is not None:
            yield row
