"""Slurm is asked, and its answer is believed only where it is one: through the commands, with
stand-ins for Slurm's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cancel, resume, status
from launch.__main__ import main
from launch.slurm import user
from recipes.code import PROJECT
from recipes.run_folder import append_line, set_status
from tests.faults.mutations import fresh
from tests.faults.run_folders import DEMO
from tests.launch.standins import Standins

PLAN = [
    "executor=slurm",
    "cluster.account=a",
    "cluster.mpi=null",
    "cluster.container_runtime=none",
    "gpu=cpu",
    "run_name=one",
]
LOST = {
    "timeout": "Socket timed out",
    "controller": "Unable to contact slurm controller",
    "quiet": "code 1",
    "garbage": "503",
    "half": "100",
    "error-and-0": "Zero Bytes",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Standins:
    monkeypatch.setattr("launch.submit.LOOKS_S", (0,))  # a real Slurm is looked at for longer
    return Standins(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def launch(run: Path, *more: str) -> int:
    return main([*PLAN, f"runs_dir={run.parent}", *more])


def row(run: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what `launch.status` tells of the run."""
    capsys.readouterr()
    code = status.main([str(run), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert (code == 2) == (found["status"] == "unknown")
    return dict(found)


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of a refusal."""
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_a_running_job_is_not_submitted_again(slurm: Standins, run: Path) -> None:
    assert launch(run) == launch(run) == 0
    assert slurm.ids == [1001]


@pytest.mark.parametrize("failure", LOST)
def test_no_answer_is_never_taken_for_no_job(
    failure: str, slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(run) == 0
    script, code = run / "job/job.sbatch", run / "job/code"
    before = (script.stat().st_ino, code.stat().st_ino)
    slurm.patch.setenv("SQUEUE", failure)
    for command in (
        lambda: launch(run),
        lambda: cancel.main([str(run)]),
        lambda: resume.main([str(run)]),
    ):
        capsys.readouterr()
        assert command() == 2
        assert LOST[failure] in refused(capsys)
    assert (
        (script.stat().st_ino, code.stat().st_ino) == before
        and slurm.ids == [1001]
        and slurm.state(1001) == "RUNNING"
    )
    assert not [call for call in slurm.calls if call.startswith("scancel")]
    found = row(run, capsys)
    assert found["status"] == "unknown" and LOST[failure] in found["why"]
    slurm.patch.delenv("SQUEUE")
    assert (
        row(run, capsys)["status"] == "starting"
        and cancel.main([str(run)]) == 0
        and slurm.state(1001) == "CANCELLED"
    )


def test_a_job_that_squeue_does_not_know_is_gone(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(run) == 0
    (slurm.jobs / "1001").unlink()
    slurm.put(1001 + 1, "RUNNING", "/elsewhere/job.sbatch")
    found = row(run, capsys)
    assert found["status"] == "failed" and "1001 is no longer known to Slurm" in found["why"]
    slurm.account(f"1001|TIMEOUT|None|{user()}|tests|sbatch --parsable {run}/job/job.sbatch")
    assert "time limit" in row(run, capsys)["why"]
    assert launch(run) == 0 and slurm.ids == [1001, 1002]


@pytest.mark.parametrize("how", ["taken", "silent", "killed"])
def test_a_job_whose_number_was_lost_is_found(
    how: str, slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.put(7, "RUNNING", "/elsewhere/one/job/job.sbatch")
    slurm.patch.setenv("SBATCH", how)
    assert launch(run) == 0 and launch(run) == 0
    assert slurm.ids == [7, 1001] and row(run, capsys)["job_id"] == 1001


@pytest.mark.parametrize("how", ["taken", "silent"])
def test_a_lost_number_is_looked_for_before_the_next_submission(
    how: str, slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.patch.setenv("SBATCH", how)
    slurm.patch.setenv("SQUEUE", "timeout")
    for _ in range(2):
        assert launch(run) == 2 and "not known" in refused(capsys)
    assert slurm.ids == [1001] and row(run, capsys)["status"] == "unknown"
    assert cancel.main([str(run)]) == 2
    slurm.patch.delenv("SQUEUE")
    assert row(run, capsys)["job_id"] == 1001
    assert launch(run) == 0 and slurm.ids == [1001]
    assert cancel.main([str(run)]) == 0 and slurm.state(1001) == "CANCELLED"


def test_a_job_that_slurm_never_took_is_submitted_by_the_next_launch(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.patch.setenv("SBATCH", "not-taken")
    assert launch(run) == 2 and "Unable to contact" in refused(capsys)
    slurm.patch.delenv("SBATCH")
    assert launch(run) == 0 and slurm.ids == [1001]


def test_a_lost_job_that_has_ended_is_found_in_the_accounts(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.patch.setenv("SBATCH", "not-taken")
    assert launch(run) == 2
    slurm.patch.delenv("SBATCH")
    slurm.account(f"900|FAILED|None|{user()}|tests|sbatch --parsable {run}/job/job.sbatch")
    assert row(run, capsys)["job_id"] == 900
    assert launch(run) == 0 and slurm.ids == [1001]


def test_a_queue_that_does_not_tell_scripts_leaves_a_lost_job_unknown(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.patch.setenv("SBATCH", "not-taken")
    assert launch(run) == 2
    slurm.put(1001, "RUNNING", "")
    capsys.readouterr()
    assert launch(run) == 2 and "of which script job 1001 is" in refused(capsys)


def test_a_refusal_is_no_lost_answer(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.patch.setenv("SBATCH", "refused")
    assert launch(run) == 2 and "cluster.account" in refused(capsys)
    assert not (run / "job/submitting").exists()


@pytest.mark.parametrize("how", ["cluster", "wrapped"])
def test_an_answer_with_a_clusters_name_or_beside_other_lines(
    how: str, slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.patch.setenv("SBATCH", how)
    assert launch(run) == 0 and launch(run) == 0 and slurm.ids == [1001]
    assert row(run, capsys)["status"] == "starting"
    assert cancel.main([str(run)]) == 0
    (order,) = [call for call in slurm.calls if call.startswith("scancel")]
    assert order == ("scancel --clusters=east 1001" if how == "cluster" else "scancel 1001")


def test_a_chain_whose_second_link_is_lost_keeps_the_first(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.patch.setenv("SBATCH", "second-lost")
    assert launch(run, "executor.chain=3") == 2
    assert "job 1001 is submitted and stays" in refused(capsys)
    assert launch(run, "executor.chain=3") == 0 and slurm.ids == [1001]


STATES = {
    "PENDING": "queued",
    "CONFIGURING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued",
    "SPECIAL_EXIT": "queued",
    "RESV_DEL_HOLD": "queued",
    "SUSPENDED": "queued",
    "RUNNING": "running",
    "COMPLETING": "running",
    "STAGE_OUT": "running",
    "SIGNALING": "running",
    "RESIZING": "running",
    "STOPPED": "running",
    "REVOKED": "unknown",
    "LAUNCH_FAILED": "unknown",
    "OF_A_LATER_SLURM": "unknown",
    "CANCELLED": "cancelled",
    "TIMEOUT": "failed",
    "BOOT_FAIL": "failed",
    "DEADLINE": "failed",
    "PREEMPTED": "failed",
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_job(
    state: str, slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that has not certainly ended is not submitted again; a state that the code does not
    know is named.
    """
    assert launch(run) == 0
    set_status(run, "running")
    slurm.set(1001, state)
    found = row(run, capsys)
    assert found["status"] == STATES[state] and (
        STATES[state] != "unknown" or state in found["why"]
    )
    code, submits = launch(run), STATES[state] in ("failed", "cancelled")
    assert code == (2 if STATES[state] == "unknown" else 0)
    assert slurm.ids == ([1001, 1002] if submits else [1001])


@pytest.mark.parametrize(
    "other", [{"who": "mallory"}, {"script": "/home/other/runs/two/job/job.sbatch"}]
)
@pytest.mark.parametrize("recorded", ["by this version", "by an older one"])
def test_a_number_that_is_another_jobs_now(
    recorded: str,
    other: dict[str, str],
    slurm: Standins,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch(run) == 0
    if recorded == "by an older one" and "script" in other:
        (run / "job/submitted.jsonl").unlink()
        append_line(run / "job/submitted.jsonl", {"job_id": 1001})
    slurm.put(1001, "RUNNING", **{"script": f"{run}/job/job.sbatch", **other})
    assert row(run, capsys)["status"] == "failed"
    assert cancel.main([str(run)]) == 0 and slurm.state(1001) == "RUNNING"
    assert launch(run) == 0 and slurm.ids == [1001, 1002]


@pytest.mark.parametrize("other", [{"who": "nobody"}, {"who": "1000"}, {"script": "(null)"}])
def test_what_slurm_cannot_name_is_no_other_job(
    other: dict[str, str], slurm: Standins, run: Path
) -> None:
    assert launch(run) == 0
    slurm.put(1001, "RUNNING", **{"script": f"{run}/job/job.sbatch", **other})
    assert launch(run) == 0 and slurm.ids == [1001]


def test_a_job_with_a_sites_copy_of_the_script_is_not_known(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(run) == 0
    slurm.put(1001, "RUNNING", "/var/spool/site/copy.1")
    capsys.readouterr()
    assert launch(run) == 2 and "/var/spool/site/copy.1" in refused(capsys) and slurm.ids == [1001]
    assert cancel.main([str(run)]) == 2 and slurm.state(1001) == "RUNNING"


def test_a_linked_run_folder_has_its_jobs(slurm: Standins, run: Path, tmp_path: Path) -> None:
    assert launch(run) == 0
    (run / "job/submitted.jsonl").unlink()
    append_line(run / "job/submitted.jsonl", {"job_id": 1001})
    (tmp_path / "alias").symlink_to(run)
    assert cancel.main([str(tmp_path / "alias")]) == 0 and slurm.state(1001) == "CANCELLED"


def test_a_partition_named_like_a_failure_is_refused_with_its_remedy(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.patch.setenv("SBATCH", "interconnect")
    assert launch(run) == 2
    assert (
        "set cluster.partition" in refused(capsys)
        and "refused" in (run / "events.jsonl").read_text()
    )


def test_a_lost_answer_is_no_refusal_and_the_job_found_later_an_event(
    slurm: Standins, run: Path
) -> None:
    slurm.patch.setenv("SBATCH", "not-taken")
    assert launch(run) == 2
    assert not (run / "events.jsonl").exists()
    slurm.put(1001, "RUNNING", f"{run}/job/job.sbatch")
    slurm.patch.delenv("SBATCH")
    assert launch(run) == 0 and slurm.ids == [1001]
    assert '"submitted"' in (run / "events.jsonl").read_text()


def test_cancel_believes_no_line_about_another_job(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(run, "executor.chain=2") == 0
    slurm.patch.setenv("SCANCEL", "mixed")
    capsys.readouterr()
    assert cancel.main([str(run)]) == 2 and "may still wait or run" in refused(capsys)


def test_filters_of_the_users_shell_hide_no_job(slurm: Standins, run: Path) -> None:
    """squeue takes options from SQUEUE_PARTITION and others, which would hide the job."""
    assert launch(run) == 0
    wrapper = slurm.jobs.with_name("tools") / "squeue"
    text = wrapper.read_text().replace(
        "#!/bin/sh", '#!/bin/sh\n[ -n "$SQUEUE_PARTITION$SLURM_CLUSTERS" ] && exit 0'
    )
    wrapper.write_text(text)
    slurm.patch.setenv("SQUEUE_PARTITION", "debug")
    slurm.patch.setenv("SLURM_CLUSTERS", "west")
    assert launch(run) == 0 and slurm.ids == [1001]


def test_cancel_tries_every_run_and_exits_with_2_where_slurm_did_not_take_the_order(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(run) == 0
    slurm.patch.setenv("SCANCEL", "timeout")
    capsys.readouterr()
    assert cancel.main([str(run.parent / "none"), str(run)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2 and "Socket timed out" in lines[1] and "may still wait or run" in lines[1]
    )


def test_a_run_here_is_not_started_beside_its_job(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(run) == 0
    script = (run / "job/job.sbatch").read_text()
    capsys.readouterr()
    assert launch(run, "executor=local") == 2 and "job 1001 is queued or running" in refused(capsys)
    assert (run / "job/job.sbatch").read_text() == script and not (run / "job/local.sh").exists()


def test_a_run_that_its_user_stopped_stays_stopped(
    slurm: Standins, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The links of its chain are left alone until a launch is asked for again, which removes the
    request when none is active.
    """
    assert launch(run, "executor.chain=2") == 0
    (run / "stop").touch()
    capsys.readouterr()
    assert (
        launch(run, "executor.chain=2") == 0
        and "was asked to stop" in capsys.readouterr().out
        and (run / "stop").exists()
    )
    for job in (1001, 1002):
        slurm.set(job, "COMPLETED")
    assert launch(run) == 0 and slurm.ids == [1001, 1002, 1003] and not (run / "stop").exists()


# Status over many runs, broken ones among them


def demo(folder: Path) -> Path:
    return fresh(DEMO[0], folder)


def test_one_run_that_cannot_be_read_hides_no_other_and_links_are_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (
        demo(tmp_path / "runs/whole"),
        demo(tmp_path / "disk/linked"),
        demo(tmp_path / "runs/cut"),
        demo(tmp_path / "runs/odd"),
    )
    (tmp_path / "runs/linked").symlink_to(tmp_path / "disk/linked")
    (tmp_path / "runs/loop").symlink_to(tmp_path / "runs")
    (tmp_path / "runs/cut/plan.json").write_text("{")
    (tmp_path / "runs/odd/status.json").write_text("[]")
    assert status.main([str(tmp_path / "runs"), "--json"]) == 2
    told = capsys.readouterr()
    found = {Path(row["run"]).name: row["status"] for row in json.loads(told.out)}
    assert found == {"whole": "done", "linked": "done", "cut": "unreadable", "odd": "unreadable"}
    assert (
        told.err.startswith("error: ") and told.err.count("\n") == 1 and "and of 1 more" in told.err
    )


def test_no_control_code_of_a_run_reaches_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = demo(tmp_path / "a\x1b[2J")
    (run / "events.jsonl").unlink()
    (run / "status.json").write_text(json.dumps({"status": "failed", "reason": "x", "step": 3}))
    (run / "log.txt").write_bytes(b"error: \x1b]0;TITLE\x07\x1b[2J\x9b1m\xe2\x80\xae done\r\n")
    assert status.main([str(run)]) == 0
    (run / "status.json").write_text(json.dumps({"status": "\x1b[31mdone", "step": 3}))
    assert status.main([str(run)]) == 0
    told = capsys.readouterr()
    assert not [c for c in told.out + told.err if not c.isprintable() and c != "\n"]


def test_status_reads_the_ends_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted in bytes, not in seconds: a busy machine changes neither."""
    run = demo(tmp_path / "runs/long")
    line = json.loads((run / "metrics.jsonl").read_text().partition("\n")[0])
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({**line, "step": step}) + "\n" for step in range(1, 20_001))
    before = _read_bytes()
    assert status.main([str(tmp_path / "runs"), "--json"]) == 0
    read = _read_bytes() - before
    (row,) = json.loads(capsys.readouterr().out)
    assert row["step"] == 20_000 and read < 1_000_000 < (run / "metrics.jsonl").stat().st_size


COUNT = """
import sys
from launch import status
seen, counted = [], ("open", "os.listdir", "os.scandir")
sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event in counted else None)
for folder in sys.argv[1:]:
    seen.clear()
    code = status.main([folder, "--json"])
    print(code, sum(path.startswith(folder + "/") for path in seen), file=sys.stderr)
"""


def test_status_of_twice_the_runs_opens_twice_the_files_and_asks_slurm_as_often(
    slurm: Standins, tmp_path: Path
) -> None:
    text = (demo(tmp_path / "one") / "plan.json").read_text()
    for n in range(90):
        run = tmp_path / ("some" if n < 30 else "twice") / str(n)
        (run / "job").mkdir(parents=True)
        (run / "plan.json").write_text(text)
        append_line(run / "job/submitted.jsonl", {"job_id": 1001 + n})
        slurm.put(1001 + n, "RUNNING", f"{run}/job/job.sbatch")
    folders = [str(tmp_path / "some"), str(tmp_path / "twice")]
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *folders], capture_output=True, text=True, cwd=PROJECT
    )
    (some, files), (twice, more_files) = (
        map(int, line.split()) for line in done.stderr.splitlines()
    )
    assert (some, twice) == (0, 0) and more_files == 2 * files > 60
    assert done.stdout.count('"job_id": 10') == 90
    assert len(slurm.calls) == 2  # of every command: once for each status


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])
