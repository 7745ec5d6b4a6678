"""Slurm that does not answer, devices that are taken, paths that are no files: through the
commands.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from analysis import throughput
from launch import cancel, status
from launch.__main__ import main
from tests.faults.commands import REFUSED, call
from tests.faults.load import SLURM, WITH_PYTHON, stub_python, together
from tests.faults.mutations import fresh
from tests.faults.registry import Outcome, fault
from tests.faults.run_folders import DEMO, H100
from tests.launch.standins import Standins
from tests.launch.test_slurm_answers import STATES

AREA = "Launch, status and files"
NO_ANSWERS = ("timeout", "controller", "quiet", "garbage", "half", "error-and-0")
LOST = ("taken", "silent", "killed")


@fault(
    AREA,
    "squeue that fails, prints something else or stops midway, in launch, cancel and status of a"
    " run that has a job",
    small=2,
    full=6,
)
def slurm_without_an_answer(count: int, folder: Path) -> Outcome:
    """Nothing is submitted or cancelled, and status calls the state unknown."""
    outcome = Outcome()
    for failure in NO_ANSWERS[:count]:
        with pytest.MonkeyPatch.context() as patch:
            queue, run = Standins(folder / failure, patch), folder / f"runs-{failure}" / "one"
            launched = [*SLURM, f"runs_dir={run.parent}", "run_name=one"]
            first = call(main, launched)
            patch.setenv("SQUEUE", failure)
            ends = [call(main, launched), call(cancel.main, [run])]
            shown = call(status.main, [run])
            wrong = (
                first.wrong((0,))
                or next((end.wrong(()) for end in ends if end.wrong(())), None)
                or shown.wrong(())
            )
            if queue.ids != [1001] or queue.state(1001) != "RUNNING" or "unknown" not in shown.out:
                wrong = wrong or f"jobs {queue.ids}; status: {shown.out[-200:]}"
        outcome.add(f"{REFUSED}, the state named unknown", lost=wrong and f"{failure}: {wrong}")
    return outcome


@fault(
    AREA,
    "sbatch whose answer is lost after it took the job, and the same launch again",
    small=1,
    full=3,
)
def lost_submissions(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    for how in LOST[:count]:
        with pytest.MonkeyPatch.context() as patch:
            queue = Standins(folder / how, patch)
            patch.setenv("SBATCH", how)
            ends = [
                call(main, [*SLURM, f"runs_dir={folder}/runs-{how}", "run_name=one"])
                for _ in range(2)
            ]
            wrong = next((end.wrong((0,)) for end in ends if end.wrong((0,))), None)
            wrong = wrong or (None if queue.ids == [1001] else f"jobs {queue.ids}")
        outcome.add("found by its script, one job", lost=wrong and f"{how}: {wrong}")
    return outcome


@fault(
    AREA,
    "every state of a job that Slurm can name, and one that it cannot: `launch`, `launch.status`",
    small=3,
    full=22,
)
def states_of_a_job(count: int, folder: Path) -> Outcome:
    """A job that has not certainly ended is not submitted again."""
    outcome = Outcome()
    for state, expected in list(STATES.items())[:count]:
        with _launched(folder / state) as (queue, run):
            (run / "status.json").write_text('{"status": "running", "reason": "", "step": 1}')
            queue.set(1001, state)
            shown, again = call(status.main, [run, "--json"]), call(main, _asked(run))
            found = json.loads(shown.out)[0]["status"]
            ids = [1001, 1002] if expected in ("failed", "cancelled") else [1001]
            code = 2 if expected == "unknown" else 0
        wrong = shown.wrong((0,)) or again.wrong((0,))
        if (found, queue.ids, again.code) != (expected, ids, code):
            wrong = wrong or f"{found}, jobs {queue.ids}, code {again.code}"
        came = "submitted once more" if len(ids) == 2 else "not submitted again"
        outcome.add(came, lost=wrong and f"{state}: {wrong}")
    return outcome


ANOTHERS = ({"who": "mallory"}, {"script": "/home/other/runs/two/job/job.sbatch"})


@fault(
    AREA,
    "a job number that another user's or another run's job has by now: `launch.cancel`,"
    " `launch.status`, `launch`",
    small=1,
    full=2,
)
def numbers_of_other_jobs(count: int, folder: Path) -> Outcome:
    """The other job is left alone, and the run is submitted."""
    outcome = Outcome()
    for n, other in enumerate(ANOTHERS[:count]):
        with _launched(folder / str(n)) as (queue, run):
            queue.put(1001, "RUNNING", **{"script": f"{run}/job/job.sbatch", **other})
            ends = [call(status.main, [run]), call(cancel.main, [run]), call(main, _asked(run))]
        wrong = next((end.wrong((0,)) for end in ends if end.wrong((0,))), None)
        if queue.state(1001) != "RUNNING" or queue.ids != [1001, 1002]:
            wrong = wrong or f"jobs {queue.ids}, the other is {queue.state(1001)}"
        outcome.add("left alone, the run submitted", lost=wrong and f"{other}: {wrong}")
    return outcome


@fault(AREA, "an scancel that fails, or answers for another job: `launch.cancel`", small=1, full=2)
def cancellations_that_fail(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    for how in ("timeout", "mixed")[:count]:
        with _launched(folder / how) as (queue, run):
            queue.patch.setenv("SCANCEL", how)
            ended = call(cancel.main, [run])
        wrong = ended.wrong(()) or (None if "may still wait or run" in ended.err else ended.err)
        outcome.add(REFUSED, lost=wrong and f"{how}: {wrong}")
    return outcome


def _asked(run: Path) -> list[str]:
    return [*SLURM, f"runs_dir={run.parent}", "run_name=one"]


@contextmanager
def _launched(folder: Path) -> Iterator[tuple[Standins, Path]]:
    """Yield a queue of the stand-ins for Slurm and a run that has a job in it."""
    with pytest.MonkeyPatch.context() as patch:
        queue, run = Standins(folder, patch), folder / "runs" / "one"
        ended = call(main, _asked(run))
        assert ended.code == 0 and queue.ids == [1001], ended
        yield queue, run


FOUR_GPUS = """#!/bin/sh
[ "$1" = -L ] && for i in 0 1 2 3; do echo "GPU $i: NVIDIA H200 (UUID: GPU-$TOKEN-$i)"; done
exit 0
"""
TRAINS = """[ "$2" = launch.preflight ] && exit 0
for gpu in $(echo "$CUDA_VISIBLE_DEVICES" | tr , ' '); do
  mkdir "$USED/$gpu" || echo "GPU $gpu" >> "$USED.twice"
done
echo "${@: -1}" >> "$USED.ran"; sleep 0.3
for gpu in $(echo "$CUDA_VISIBLE_DEVICES" | tr , ' '); do rmdir "$USED/$gpu"; done
"""
ON_GPUS = ["gpu=h100", "executor=local", "mapping=single", "data=mock", "mapping.global_batch=8"]


@fault(
    AREA,
    "three launches at the same moment, of two GPUs each, on a machine of four (a stand-in for"
    " nvidia-smi)",
    small=1,
    full=8,
)
def launches_for_the_same_gpus(count: int, folder: Path) -> Outcome:
    """No GPU has two runs at once, and every run comes to train.

    A run is a stand-in that takes its GPUs for a moment.
    """
    outcome = Outcome()
    for n in range(count):
        place, token = folder / str(n), uuid4().hex
        stub, tool = stub_python(place, TRAINS)["STUB"], place / "nvidia-smi"
        tool.write_text(FOUR_GPUS)
        tool.chmod(0o755)
        (place / "used").mkdir()
        env = {
            **os.environ,
            "PATH": f"{place}:{os.environ['PATH']}",
            "TOKEN": token,
            "USED": str(place / "used"),
        }
        env.pop("CUDA_VISIBLE_DEVICES", None)
        asked = [
            [*ON_GPUS, "num_gpus=2", f"runs_dir={place}/runs", f"run_name=run{k}"] for k in range(3)
        ]
        try:
            together([[sys.executable, "-c", WITH_PYTHON, stub, *one] for one in asked], env)
        finally:
            for lock in Path("/tmp").glob(f"nemo-gpu-GPU-{token}*"):
                lock.unlink()
        ran = (place / "used.ran").read_text().split()
        right = len(set(ran)) == len(ran) == 3 and not (place / "used.twice").exists()
        outcome.add(
            "all ran, no GPU shared",
            lost=None if right else f"{len(ran)} ran, shared: {(place / 'used.twice').exists()}",
        )
    return outcome


@fault(
    AREA,
    "`--out` onto a pipe without a reader, a link, a link to nothing, a folder, below a file",
    small=5,
    full=5,
)
def strange_outputs(count: int, folder: Path) -> Outcome:
    """None is replaced and none is waited for."""
    outcome = Outcome()
    os.mkfifo(folder / "pipe.md")
    (folder / "file.md").write_text("")
    (folder / "link.md").symlink_to("file.md")
    (folder / "dangling.md").symlink_to("made.md")
    (folder / "folder.md").mkdir()
    for name in ("pipe.md", "link.md", "dangling.md", "folder.md", "file.md/below.md")[:count]:
        before = os.path.lexists(folder / name) and (folder / name).lstat().st_ino
        ended = call(throughput.main, [*H100, "--out", folder / name])
        replaced = before and (folder / name).lstat().st_ino != before
        wrong = ended.wrong((0,) if name in ("link.md", "dangling.md") else ()) or (
            "replaced" if replaced else None
        )
        outcome.add("written through or refused with one line", lost=wrong and f"{name}: {wrong}")
    return outcome


@fault(
    AREA,
    "a run whose plan, status, metrics, events or log is a pipe or /dev/zero, among others:"
    " `launch.status`",
    small=10,
    full=10,
)
def no_files_in_a_run_folder(count: int, folder: Path) -> Outcome:
    """Every run is named, the broken one as well."""
    outcome = Outcome()
    names = ("plan.json", "status.json", "metrics.jsonl", "events.jsonl", "log.txt")
    for name, kind in [(name, kind) for name in names for kind in ("pipe", "zeros")][:count]:
        runs = folder / f"{name}-{kind}"
        whole, broken = fresh(DEMO[0], runs / "whole"), fresh(DEMO[2], runs / "broken")
        (broken / name).unlink(missing_ok=True)
        os.mkfifo(broken / name) if kind == "pipe" else (broken / name).symlink_to("/dev/zero")
        ended = call(status.main, [runs])
        missing = [
            run.name
            for run in (whole, broken)
            if str(run) not in ended.out.replace("\n", "") and run.name not in ended.out
        ]
        wrong = ended.wrong((0,)) or (f"{missing} not named" if missing else None)
        outcome.add("all runs named", lost=wrong and f"{name} is {kind}: {wrong}")
    return outcome
