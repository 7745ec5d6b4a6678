"""Checkpoints that a run can rely on: the newest two are kept, each with a record of its files, and
a broken one is passed over.

NeMo's own callback (v2.3.2, lightning/pytorch/callbacks/model_checkpoint.py and
lightning/resume.py) loses runs in four places: it resumes from a copy named `-last` alone, and
refuses to go on where the first of these was being written when the job died; it keeps one step,
twice, so that there is none to fall back to; it writes no last checkpoint where the last step is a
multiple of val_check_interval; and it looks for a checkpoint's step in its whole path, which may
have "step" in it elsewhere.  A file that was cut or changed after it was written is either an error
deep in PyTorch or, where only values changed, other weights.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from nemo.lightning import AutoResume, MegatronStrategy
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed import ReduceOp

from recipes.errors import InputError
from recipes.run_folder import CHECKPOINT, event, finished_checkpoints

T = TypeVar("T")
RECORD = (  # of a checkpoint's files: size in bytes and CRC-32, written by the rank that wrote them
    "files.rank{rank}of{world}.json"
)
SHARD = re.compile(r"__(\d+)_\d+\.distcp")
PASSED_OVER = "-passed-over"
CHUNK_BYTES = 16 << 20


class Resume(AutoResume):
    """NeMo's AutoResume, from the newest checkpoint that was finished."""

    def _find_trainer_ckpt_path(self) -> Path | None:
        return next(iter(finished_checkpoints(Path(self.resume_from_directory).parent)), None)


class Strategy(MegatronStrategy):
    """NeMo's strategy; training loads the newest checkpoint that is as it was written."""

    def load_checkpoint(
        self, checkpoint_path: str | Path, selective_restore: bool = False
    ) -> dict[str, Any]:
        """Load it; InputError where none is whole, for to begin anew is not for a program to
        decide.
        """
        if self.trainer.state.fn != "fit":
            return super().load_checkpoint(checkpoint_path, selective_restore)
        given = Path(checkpoint_path)
        folder = (given.parent if given.name == "weights" else given).parent.parent
        broken: dict[Path, str] = {}
        for path in said_by(0, finished_checkpoints(folder)):
            wrong = first_word(difference(path))
            if wrong is None:
                if self.is_global_zero:
                    _pass_over(broken)
                dist.barrier()
                return super().load_checkpoint(
                    ckpt_to_weights_subdir(path, is_saving=False), selective_restore
                )
            broken[path] = wrong
        why = "; ".join(f"{path.name}: {wrong}" for path, wrong in broken.items())
        raise InputError(
            f"{folder / 'checkpoints'} has no whole checkpoint any more ({why}); remove {folder} to"
            " train from the first step again"
        )


def _pass_over(broken: dict[Path, str]) -> None:
    """Say that checkpoints cannot be used, and move them out of the way of those that will be
    written in their place.
    """
    for path, why in broken.items():
        event(path.parent.parent, "checkpoint_passed_over", checkpoint=path.name, why=why)
        print(f"warning: {path}: {why}; the checkpoint before it is used", file=sys.stderr)
        aside = path.with_name(path.name + PASSED_OVER)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def difference(checkpoint: Path) -> str | None:
    """Return where a checkpoint differs from what was written, None if nowhere; each rank looks at
    its share of the files.
    """
    records = sorted(checkpoint.glob(RECORD.format(rank="*", world="*")))
    if not (checkpoint / "weights" / ".metadata").exists():
        return "weights/.metadata is missing"
    if not records:
        return None  # written before there was a record
    try:
        known = {
            name: (int(size), int(crc))
            for record in records
            for name, (size, crc) in json.loads(record.read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return "the record of its files cannot be read"
    world = int(records[0].stem.rpartition("of")[2])
    if len(records) != world:
        return f"the record of {world - len(records)} rank(s) is missing"
    for name in sorted(known)[dist.get_rank() :: dist.get_world_size()]:
        if wrong := _file_difference(checkpoint / name, *known[name]):
            return f"{name} {wrong}"
    return None


def _file_difference(path: Path, size: int, checksum: int) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found} bytes, {size} were written"
        return None if _checksum(path) == checksum else "has other bytes than were written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _checksum(path: Path, sync: bool = False) -> int:
    value = 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def first_word(word: str | None) -> str | None:
    """Return what the first rank that has something to say says, on every rank."""
    speaks = torch.tensor(
        [dist.get_world_size() if word is None else dist.get_rank()],
        device=torch.cuda.current_device(),
    )
    dist.all_reduce(speaks, ReduceOp.MIN)
    if int(speaks) == dist.get_world_size():
        return None
    return said_by(int(speaks), word)


def said_by(rank: int, word: T) -> T:
    """Return what a rank says, on every rank: nodes may see a shared file system at different
    moments.
    """
    said = [word]
    dist.broadcast_object_list(said, rank, device=torch.device(torch.cuda.current_device()))
    return said[0]


class Checkpoints(ModelCheckpoint):
    """NeMo's checkpoint callback; keeps the newest two, records their files, and always saves at
    the end.
    """

    def nemo_topk_check_previous_run(self) -> None:
        """Take up what the folder holds, and remove what a job that died left behind beyond
        that.
        """
        found = said_by(0, [str(path) for path in finished_checkpoints(Path(self.dirpath).parent)])
        for path in found[self.save_top_k :]:
            self._del_model_without_trainer(path)
        steps = {
            path + self.FILE_EXTENSION: torch.tensor(_step(path))
            for path in found[: self.save_top_k]
        }
        self.best_k_models = steps
        if steps:
            self.best_model_path, self.kth_best_model_path = (
                max(steps, key=steps.get),
                min(steps, key=steps.get),
            )
            self.best_model_score, self.kth_value = (
                steps[self.best_model_path],
                steps[self.kth_best_model_path],
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Save where it is time to; after the last step once its evaluation is written
        (on_train_end).
        """
        if trainer.global_step < trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, *args)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the state at the end, or at a pause, where that was not done at the step itself."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _get_finalize_save_checkpoint_callback(
        self, trainer: Any, filepath: str, global_step: int
    ) -> Callable[[], None]:
        finalize = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)

        def record_and_finalize() -> None:
            _record(Path(ckpt_to_dir(filepath)))
            finalize()

        return record_and_finalize


def _step(path: str) -> int:
    name = CHECKPOINT.fullmatch(Path(path).name)
    assert name, path
    return int(name[1])


def _record(checkpoint: Path) -> None:
    """Bring this rank's files to the disk, and the run's lines up to here with them; write down
    their sizes and checksums.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    files = {
        str(path.relative_to(checkpoint)): (path.stat().st_size, _checksum(path, sync=True))
        for path in _files_of(rank, checkpoint)
    }
    if rank == 0:
        for lines in checkpoint.parent.parent.glob("*.jsonl"):
            _checksum(lines, sync=True)
    with (checkpoint / RECORD.format(rank=rank, world=world)).open("w") as file:
        json.dump(files, file)
        file.flush()
        os.fsync(file.fileno())


def _files_of(rank: int, checkpoint: Path) -> Iterator[Path]:
    """Yield the shards that a rank wrote; to the first rank belongs what is no shard."""
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        shard, record = SHARD.fullmatch(path.name), path.name.startswith("files.rank")
        if not record and (int(shard[1]) if shard else 0) == rank:
            yield path
