"""Slurm that does not answer, devices that are taken, paths that are no files: through the commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from analysis import throughput
from launch import cancel, status
from launch.__main__ import main
from tests.faults.commands import REFUSED, call
from tests.faults.load import SLURM
from tests.faults.mutations import fresh
from tests.faults.registry import Outcome, fault
from tests.faults.run_folders import DEMO, H100
from tests.launch.standins import Standins

AREA = "Launch, status and files"
NO_ANSWERS = ("timeout", "controller", "quiet", "garbage", "half", "error-and-0")
LOST = ("taken", "silent", "killed")


@fault(AREA, "squeue that fails, prints something else or stops midway, in launch, cancel and status of a run that has a job", small=2, full=6)
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
            wrong = first.wrong((0,)) or next((end.wrong(()) for end in ends if end.wrong(())), None) or shown.wrong(())
            if queue.ids != [1001] or queue.state(1001) != "RUNNING" or "unknown" not in shown.out:
                wrong = wrong or f"jobs {queue.ids}; status: {shown.out[-200:]}"
        outcome.add(f"{REFUSED}, the state named unknown", lost=wrong and f"{failure}: {wrong}")
    return outcome


@fault(AREA, "sbatch whose answer is lost after it took the job, and the same launch again", small=1, full=3)
def lost_submissions(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    for how in LOST[:count]:
        with pytest.MonkeyPatch.context() as patch:
            queue = Standins(folder / how, patch)
            patch.setenv("SBATCH", how)
            ends = [call(main, [*SLURM, f"runs_dir={folder}/runs-{how}", "run_name=one"]) for _ in range(2)]
            wrong = next((end.wrong((0,)) for end in ends if end.wrong((0,))), None)
            wrong = wrong or (None if queue.ids == [1001] else f"jobs {queue.ids}")
        outcome.add("found by its script, one job", lost=wrong and f"{how}: {wrong}")
    return outcome


@fault(AREA, "`--out` onto a pipe without a reader, a link, a link to nothing, a folder, below a file", small=5, full=5)
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
        wrong = ended.wrong((0,) if name in ("link.md", "dangling.md") else ()) or ("replaced" if replaced else None)
        outcome.add("written through or refused with one line", lost=wrong and f"{name}: {wrong}")
    return outcome


@fault(AREA, "a run whose plan, status, metrics, events or log is a pipe or /dev/zero, among others: `launch.status`", small=10, full=10)
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
        missing = [run.name for run in (whole, broken) if str(run) not in ended.out.replace("\n", "") and run.name not in ended.out]
        wrong = ended.wrong((0,)) or (f"{missing} not named" if missing else None)
        outcome.add("all runs named", lost=wrong and f"{name} is {kind}: {wrong}")
    return outcome
