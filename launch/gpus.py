"""Which GPUs of this machine may a run have?  Each is locked while a run of any launch on this
machine has it.

Two runs on one GPU slow each other evenly, so that their step times look sound.  The lock is a file
for each GPU, named by its UUID, in a folder that all users of the machine share.  It is held by the
run itself, and ends with it.  Processes that this project did not start hold no lock: a GPU without
any is taken first, and a run that gets one with others is told so.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.job import NO_LOCKS
from recipes.errors import InputError, one_line

LOCKS = Path("/tmp")
LISTED = re.compile(r"^GPU (\d+): .*\(UUID: (GPU-[\w-]+)\)", re.MULTILINE)
COMPUTES = re.compile(r"^(GPU-[\w-]+), *(\d+), *(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Gpu:
    """A GPU as CUDA_VISIBLE_DEVICES names it, its UUID (or that name, where nothing tells), and who
    computes on it.
    """

    name: str
    uuid: str
    others: str = ""


@dataclass(frozen=True)
class HeldGpu:
    """A GPU with the file descriptor of its lock, which the run's process holds too."""

    gpu: Gpu
    lock: int


def visible() -> list[Gpu] | None:
    """Return the GPUs that runs may have, those without processes first; None where nothing
    tells.
    """
    listed = LISTED.findall(_nvidia_smi("-L"))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None and not listed:
        return None
    names = (
        [index for index, _ in listed]
        if named is None
        else [name.strip() for name in named.split(",") if name.strip()]
    )
    busy: dict[str, str] = {}
    for uuid, pid, process in COMPUTES.findall(
        _nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader")
    ):
        busy.setdefault(uuid, one_line(f"process {pid} ({process})"))
    found = [Gpu(name, uuid := _uuid(name, listed), busy.get(uuid, "")) for name in names]
    return sorted(found, key=lambda gpu: bool(gpu.others))


def _uuid(name: str, listed: Sequence[tuple[str, str]]) -> str:
    return next(
        (
            uuid
            for index, uuid in listed
            if name == index or (name.startswith("GPU-") and uuid.startswith(name))
        ),
        name,
    )


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def take(gpus: Sequence[Gpu], count: int, folder: Path) -> list[HeldGpu] | None:
    """Lock so many of the GPUs for the run in `folder`; None, with none locked, where so many are
    not free.
    """
    held: list[HeldGpu] = []
    try:
        for gpu in gpus:
            if len(held) < count and (lock := _locked(gpu)) is not None:
                held.append(HeldGpu(gpu, lock))
    except InputError:
        give_back(held)
        raise
    if len(held) < count:
        give_back(held)
        return None
    for one in held:
        _sign(one.lock, folder)
    return held


def give_back(held: Sequence[HeldGpu]) -> None:
    """Let go of GPUs; one whose run still lives stays locked by the run."""
    for one in held:
        os.close(one.lock)


def holders(gpus: Sequence[Gpu]) -> str:
    """Return who holds those of the GPUs that are held, in words."""
    return "; ".join(f"GPU {gpu.name} is held by {_holder(gpu)}" for gpu in gpus if _is_held(gpu))


def _is_held(gpu: Gpu) -> bool:
    lock = _locked(gpu)
    if lock is not None:
        os.close(lock)
    return lock is None


def _holder(gpu: Gpu) -> str:
    try:
        facts = json.loads(_path(gpu).read_bytes()[:4096])
        return one_line(f"{facts['run']} (user {facts['user']}, process {facts['pid']})")
    except (OSError, ValueError, KeyError, TypeError):
        return "another launch"


def _path(gpu: Gpu) -> Path:
    return LOCKS / f"nemo-gpu-{re.sub(r'[^A-Za-z0-9-]', '_', gpu.uuid)}.lock"


def _locked(gpu: Gpu) -> int | None:
    """Return the descriptor of a GPU's lock, taken; None where another run has it."""
    file = _open(_path(gpu))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return file


def _sign(file: int, folder: Path) -> None:
    """Write into a lock's file who holds it."""
    facts = {
        "run": str(folder.absolute()),
        "user": os.environ.get("USER") or os.geteuid(),
        "pid": os.getpid(),
    }
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(facts).encode(), 0)
    except OSError:
        pass  # another user's file: the lock holds, only its holder is not named


def _open(path: Path) -> int:
    """Open a lock's file, which another user may have made; never through a link."""
    try:
        return _created(path)
    except OSError as error:
        why = f"{path} cannot be opened ({error.strerror})"
        raise InputError(
            f"{why}, which locks a GPU for one run; remove it, or make {LOCKS} writable"
        ) from None


def _created(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        file = os.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.fchmod(file, 0o666)  # whatever the umask: the next user writes who holds it
    except FileExistsError:
        try:
            file = os.open(path, flags | os.O_RDWR)
        except PermissionError:
            file = os.open(path, flags | os.O_RDONLY)
    return file
