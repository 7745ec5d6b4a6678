"""The console command, the package that brings it, and the commands that texts name."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.code import PROJECT
from recipes.console import COMMANDS, main, usage
from recipes.exit_codes import EXIT_WRONG_INPUT

TOPS = ("analysis", "launch", "recipes")
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
RESULTS = PROJECT / "analysis" / "results"
NAMED = re.compile(r"python3? -m (launch\b[\w.]*|(?:analysis|recipes|docs|tests)\.\w[\w.]*)")


def shipped(pattern: str) -> Iterator[Path]:
    """Yield files below the packages, but no results, which are not installed."""
    for top in TOPS:
        for path in sorted((PROJECT / top).rglob(pattern)):
            if path.is_file() and RESULTS not in path.parents and "__pycache__" not in path.parts:
                yield path


def source_of(module: str) -> Path:
    path = PROJECT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_the_main_of_its_module(name: str) -> None:
    """Read, not imported: some need torch.  A main takes the arguments that follow the name."""
    tree = ast.parse(source_of(COMMANDS[name].module).read_text())
    mains = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    assert [argument.arg for one in mains for argument in one.args.args] == ["argv"]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["-h"], ["--help"]):
        assert main(words) == 0
        assert capsys.readouterr().out.rstrip("\n") == usage()
    assert re.findall(r"^  (\S+)", usage(), re.MULTILINE) == list(COMMANDS)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compares", "x"]) == EXIT_WRONG_INPUT
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and len(err.splitlines()) == 1
    assert all(name in err for name in COMMANDS)


def test_plan_shows_and_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "experiment=demo", f"runs_dir={tmp_path}/runs"]) == 0
    assert "llama3" in capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_the_package_has_every_folder_with_code_and_every_file() -> None:
    folders = {path.parent.relative_to(PROJECT) for path in shipped("*.py")}
    packages = {str(folder).replace("/", ".") for folder in folders}
    assert sorted(SETTINGS["packages"]) == sorted([*packages, "recipes.conf"])
    assert all((PROJECT / folder / "__init__.py").exists() for folder in folders)
    data = {
        path
        for package, patterns in SETTINGS["package-data"].items()
        for pattern in patterns
        for path in (PROJECT / package.removeprefix("recipes.")).glob(pattern)
    }
    kinds = (".json", ".csv", ".yaml", ".j2")
    assert {path for path in shipped("*") if path.suffix in kinds} <= data
    assert {path for path in (PROJECT / "conf").rglob("*.yaml")} <= data


def test_every_module_that_a_text_names_is_there() -> None:
    """`python -m MODULE` in documents, messages, docstrings, configuration and scripts."""
    listed = subprocess.run(
        ["git", "-C", str(PROJECT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kinds = {".py", ".md", ".yaml", ".j2", ".ipynb", ".toml", ""}
    files = [name for name in listed if Path(name).suffix in kinds]
    missing = {
        (name, module)
        for name in files
        if not name.startswith("analysis/results/") and (PROJECT / name).is_file()
        for module in NAMED.findall((PROJECT / name).read_text(errors="replace"))
        if not source_of(module.rstrip(".")).is_file()
    }
    assert len(files) > 100 and not missing


def test_examples_of_a_docstring_stand_a_line_each() -> None:
    """A formatter that folds paragraphs would run one example into the next."""
    folded = [
        f"{path.relative_to(PROJECT)}: {line.strip()}"
        for path in shipped("*.py")
        for line in (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        if re.match(r" {4}\S.* python -m ", line)
    ]
    assert not folded
