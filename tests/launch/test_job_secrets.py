"""What is copied into a job folder is looked through, and files that hold secrets by their name are
never copied.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.code import PROJECT
from recipes.compose.secrets import is_secret_file

PASSWORD = secrets.token_hex(9)  # of no known form


@pytest.fixture(params=["in a checkout", "without git"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the project's light half, of its own."""
    root = tmp_path / "project"
    for part in ("recipes", "launch", "conf"):
        shutil.copytree(
            PROJECT / part,
            root / part,
            ignore=shutil.ignore_patterns("__pycache__", "site.yaml", "training"),
        )
    if request.param == "in a checkout":
        who = ["-c", "user.name=me", "-c", "user.email=me@here"]
        for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
            subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def snapshot(project: Path, **environment: str) -> tuple[int, str, Path]:
    """Write a job's copy of the code; return the exit code, what was printed, and the copy."""
    code = (
        "import sys; from pathlib import Path; from launch.job import snapshot; from recipes.errors"
        " import InputError\n"
    )
    code += (
        "try: snapshot(Path(sys.argv[1]))\nexcept InputError as error: sys.exit(f'error: {error}')"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    paths = {
        "PYTHONPATH": str(project),
        "PYTHONSAFEPATH": "1",
        "GIT_CEILING_DIRECTORIES": str(project.parent),
    }
    target = project.parent / "copy" / "code"
    target.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code, str(target)]
    done = subprocess.run(
        command, env={**kept, **paths, **environment}, cwd=project, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr, target.parent


def found(folder: Path, text: str) -> list[str]:
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and text.encode() in path.read_bytes()
    ]


def test_files_of_secrets_links_out_and_other_files_are_not_copied(project: Path) -> None:
    (project.parent / "outside.yaml").write_text(PASSWORD)
    for place in ("recipes", "conf/model", "launch"):
        for name in (
            ".env",
            ".env.local",
            "my.pem",
            "id_ed25519",
            "id_rsa.yaml",
            "server.key",
            ".netrc",
            "credentials.yaml",
            "notes.txt",
        ):
            (project / place / name).write_text(PASSWORD)
        (project / place / "linked.yaml").symlink_to(project.parent / "outside.yaml")
    if (project / ".git").exists():
        subprocess.run(
            ["git", "-C", str(project), "add", "-f", "recipes/.env", "launch/my.pem"], check=True
        )
    code, text, copy = snapshot(project)
    assert code == 0, text
    assert (
        (copy / "code" / "recipes" / "plan.py").exists()
        and found(copy, PASSWORD) == []
        and PASSWORD not in text
    )


@pytest.mark.parametrize(
    "place", ["recipes/mine.py", "launch/new.csv", "conf/model/mine.yaml", "recipes/plan.py"]
)
def test_a_secret_in_any_file_that_is_copied_is_refused(place: str, project: Path) -> None:
    """By its form, and by being the value of a secret variable of the launch."""
    before = (project / place).read_text() if (project / place).exists() else ""
    for secret, environment in (
        (f"hf_{secrets.token_hex(17)}", {}),
        (PASSWORD, {"SITE_PASSWORD": PASSWORD}),
    ):
        (project / place).write_text(f"{before}\n# {secret}\n")
        code, text, copy = snapshot(project, **environment)
        assert (
            code == 1
            and text.startswith(f"error: {place} has what looks like a secret")
            and secret not in text
        )
        assert found(copy / "code", secret) == []


def test_modules_are_no_files_of_secrets() -> None:
    assert (
        not is_secret_file("id_map.py")
        and not is_secret_file("llama3_8b.yaml")
        and is_secret_file("ID_RSA")
    )
