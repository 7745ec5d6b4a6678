"""The light half with the oldest versions that requirements-light.txt claims, in an environment of
its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parents[1]
REQUIREMENTS = PROJECT / "requirements-light.txt"
RUNS = PROJECT / "analysis/results/demo"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment; where packages cannot be fetched, CI fails and other
    machines skip.
    """
    folder = tmp_path_factory.mktemp("oldest")
    lower = re.findall(r"^([\w.-]+)>=(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)
    (folder / "oldest.txt").write_text("".join(f"{name}=={version}\n" for name, version in lower))
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    interpreter = folder / "venv/bin/python"
    install = [
        str(interpreter),
        "-m",
        "pip",
        "install",
        "-q",
        "--prefer-binary",
        "-r",
        str(folder / "oldest.txt"),
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        reason = f"the oldest versions cannot be installed: {done.stderr.strip()[-300:]}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return interpreter


def run(python: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the project with that environment alone."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    return subprocess.run(
        [str(python), "-m", *command], cwd=PROJECT, env=env, capture_output=True, text=True
    )


def test_every_requirement_states_a_range() -> None:
    lines = [
        line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")
    ]
    assert [line for line in lines if not re.match(r"[\w.-]+>=\d[\w.]*( |$)", line)] == []


def test_plan_preflight_and_run_folder_work_with_the_oldest_versions(
    python: Path, tmp_path: Path
) -> None:
    cell = ["model=llama3_70b", "precision=fp8_current", "gpu=h100", "--json"]
    done = run(python, "launch", *cell)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["plan"]["precision"]["name"] == "fp8_current"
    folder = tmp_path / "runs/one"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text((RUNS / "llama3_tiny.bf16.cpu.seed1/plan.json").read_text())
    done = run(python, "launch.preflight", str(folder))
    assert done.returncode == 2 and "nemo-toolkit is not installed" in done.stderr
    done = run(python, "launch.status", str(folder), "--json")
    assert (
        json.loads(done.stdout)[0]["status"] == "failed"
        and "nemo-toolkit" in json.loads(done.stdout)[0]["why"]
    )


def test_analysis_reads_runs_with_the_oldest_versions(python: Path, tmp_path: Path) -> None:
    base, candidate = (
        str(RUNS / f"llama3_tiny.{name}.cpu.seed1") for name in ("bf16", "fp8_current")
    )
    done = run(python, "analysis.compare", base, candidate)
    assert done.returncode == 0 and "pass" in done.stdout, done.stderr
    assert (
        run(
            python, "analysis.report", base, candidate, "--out", str(tmp_path / "report.html")
        ).returncode
        == 0
    )
    assert (tmp_path / "report.html").stat().st_size > 100_000
