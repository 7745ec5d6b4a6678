"""Stand-ins for Slurm's commands, as shell scripts on PATH: a queue of files that a test can
change, and commands that can fail.

A job is a file `JOBS/<id>` with one line `STATE<tab>user<tab>cluster<tab>script`.  The variable
SBATCH or SQUEUE names a way to fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.slurm import user

SBATCH = """#!/bin/sh
[ "$1" = --version ] && { echo "slurm 24.05.1"; exit 0; }
echo "sbatch $*" >> "$JOBS.calls"
for script; do :; done
accept() {
  n=1001; while [ -e "$JOBS/$n" ]; do n=$((n + 1)); done
  printf 'RUNNING\\t%s\\t%s\\t%s\\n' "$STANDIN_USER" "$1" "$script" > "$JOBS/$n"
}
lost() { echo "sbatch: error: Batch job submission failed: $1" >&2; exit 1; }
case "$SBATCH" in
  taken) accept tests; lost "Socket timed out on send/recv operation" ;;
  not-taken) lost "Unable to contact slurm controller (connect failure)" ;;
  silent) accept tests ;;
  killed) accept tests; kill -9 $$ ;;
  interconnect) lost "invalid partition specified: interconnect" ;;
  refused) lost "Invalid account or account/partition combination specified" ;;
  cluster) accept east; echo "$n;east" ;;
  wrapped) accept tests; echo "Welcome to this site"; echo "$n" ;;
  second-lost) [ "$(ls "$JOBS" | wc -l)" = 0 ] || lost "Zero Bytes were transmitted or received"; accept tests; echo "$n" ;;
  *) accept tests; echo "$n" ;;
esac
"""  # noqa: E501
SQUEUE = """#!/bin/sh
echo "squeue $*" >> "$JOBS.calls"
clusters=tests
for argument; do
  case "$argument" in
    --jobs=*) ids=$(echo "${argument#--jobs=}" | tr , ' ') ;;
    --clusters=*) clusters=$(echo "${argument#--clusters=}" | tr , ' ') ;;
  esac
done
fail() { echo "$1" >&2; exit "${2-1}"; }
case "$SQUEUE" in
  timeout) fail "slurm_load_jobs error: Socket timed out on send/recv operation" ;;
  controller) fail "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" ;;
  quiet) exit 1 ;;
  garbage) echo "<html>503 Service Unavailable</html>"; exit 0 ;;
  half) printf '100'; exit 0 ;;
  error-and-0) fail "squeue: error: slurm_receive_msg: Zero Bytes were transmitted or received" 0 ;;
esac
found=""
for job in ${ids-$(ls "$JOBS")}; do
  [ -e "$JOBS/$job" ] || continue
  IFS='\t' read -r state who cluster script < "$JOBS/$job"
  for one in $clusters; do
    [ "$one" = "$cluster" ] || continue
    found=yes
    printf '%s|%s|%s|%s|%s\\t%s\\t%s\\n' "$job" "$state" "${REASON-None}" 2 "$who" "$cluster" "$script"
  done
done
[ -n "$ids" ] && [ -z "$found" ] && [ "$ids" = "${ids% *}" ] && fail "slurm_load_jobs error: Invalid job id specified"
exit 0
"""  # noqa: E501
SACCT = """#!/bin/sh
[ -e "$JOBS.accounts" ] || { echo "sacct: error: Slurm accounting storage is disabled" >&2; exit 1; }
cat "$JOBS.accounts"
"""  # noqa: E501
SCANCEL = """#!/bin/sh
echo "scancel $*" >> "$JOBS.calls"
[ "$SCANCEL" = timeout ] && { echo "scancel: error: Kill job error on job id 1001: Socket timed out" >&2; exit 1; }
[ "$SCANCEL" = mixed ] && {
  echo "scancel: error: Kill job error on job id 1001: Invalid job id specified" >&2
  echo "scancel: error: Kill job error on job id 1002: Socket timed out" >&2
  exit 1
}
for job; do
  [ -e "$JOBS/$job" ] && sed -i 's/^[A-Z_]*/CANCELLED/' "$JOBS/$job"
done
exit 0
"""  # noqa: E501


class Standins:
    """The queue of the stand-ins."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.jobs, self.patch = root / "jobs", patch
        tools = root / "tools"
        for folder in (self.jobs, tools):
            folder.mkdir(parents=True)
        for name, text in (
            ("sbatch", SBATCH),
            ("squeue", SQUEUE),
            ("sacct", SACCT),
            ("scancel", SCANCEL),
        ):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        patch.setenv("PATH", str(tools), prepend=":")
        patch.setenv("JOBS", str(self.jobs))
        patch.setenv("STANDIN_USER", user())

    def put(
        self, job_id: int, state: str, script: str, who: str = "", cluster: str = "tests"
    ) -> None:
        """Have a job in the queue."""
        (self.jobs / str(job_id)).write_text(f"{state}\t{who or user()}\t{cluster}\t{script}\n")

    def state(self, job_id: int) -> str:
        """Return the state of a job."""
        return (self.jobs / str(job_id)).read_text().partition("\t")[0]

    def set(self, job_id: int, state: str) -> None:
        """Change the state of a job."""
        path = self.jobs / str(job_id)
        path.write_text(f"{state}\t{path.read_text().partition(chr(9))[2]}")

    def account(self, *lines: str) -> None:
        """Have accounting, with these lines of sacct (JobIDRaw, State, Reason, User, Cluster,
        SubmitLine).
        """
        self.jobs.with_name("jobs.accounts").write_text("".join(f"{line}\n" for line in lines))

    @property
    def ids(self) -> list[int]:
        """The jobs that Slurm took."""
        return sorted(int(path.name) for path in self.jobs.iterdir())

    @property
    def calls(self) -> list[str]:
        """The commands that were run, sbatch, squeue and scancel."""
        path = self.jobs.with_name("jobs.calls")
        return path.read_text().splitlines() if path.exists() else []
