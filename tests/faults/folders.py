"""What a run folder holds, as another program reads it: JSON, without the project's readers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.__main__ import main as launch
from tests.faults.commands import call


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines, without a line that is cut; [] for no file."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [row for line in lines if isinstance(row := _parsed(line), dict)]


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def append(path: Path, row: object) -> None:
    """Append a line of JSON."""
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.write(json.dumps(row) + "\n")


def recorded(run: Path) -> str:
    """Return the status that the run itself has written; "new" before it has."""
    path = run / "status.json"
    return str(json.loads(path.read_text())["status"]) if path.exists() else "new"


def jobs(run: Path) -> list[int]:
    """Return the jobs of a run whose number its launches have kept."""
    return [int(row["job_id"]) for row in rows_in(run / "job" / "submitted.jsonl")]


def planned(overrides: Sequence[object]) -> dict[str, Any]:
    """Return the plan of a command line, as `python -m launch … --json` prints it."""
    ended = call(launch, [*overrides, "--json"])
    assert ended.code == 0, ended
    (job,) = json.loads(ended.out)
    return dict(job["plan"])


def opened(overrides: Sequence[object]) -> Path:
    """Return a run folder that waits to be trained: the plan of `overrides` and nothing else."""
    plan = planned(overrides)
    run = Path(plan["runs_dir"]) / plan["run_name"]
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(plan))
    return run


def replan(run: Path, **changed: Any) -> None:
    """Change values of a run's plan, by group."""
    plan = json.loads((run / "plan.json").read_text())
    for group, values in changed.items():
        plan[group] = {**plan[group], **values} if isinstance(values, dict) else values
    (run / "plan.json").write_text(json.dumps(plan))
