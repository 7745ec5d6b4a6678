"""The marks are honest: what `-m "not nemo"` leaves is collected without NeMo, and a test that
imports it all the same fails.
"""

import subprocess
import sys
from pathlib import Path

import pytest

COLLECTS = """
import sys, pytest
code = pytest.main([*sys.argv[1:], "-q", "-m", "not nemo", "-p", "no:cacheprovider"])
print("imported:", *sorted({"nemo", "megatron", "lightning", "transformer_engine"} & sys.modules.keys()))
sys.exit(code)
"""  # noqa: E501
IMPORTS = "def test_it():\n    import lightning\n"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COLLECTS, *map(str, arguments)]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)


@pytest.mark.slow
def test_what_is_not_marked_is_collected_without_nemo() -> None:
    done = run("--collect-only", "tests/recipes", "tests/gpu")
    assert done.returncode == 0 and "test_fp8_numerics" in done.stdout, (
        done.stdout[-2000:] + done.stderr[-2000:]
    )
    assert done.stdout.splitlines()[-1] == "imported:" and "test_recipe_golden" not in done.stdout


@pytest.mark.slow
def test_a_test_that_imports_nemo_without_the_mark_fails(tmp_path: Path) -> None:
    (tmp_path / "test_imports.py").write_text(IMPORTS)
    done = run(tmp_path, "-p", "tests.conftest")
    assert done.returncode == 1 and "lightning is imported; mark the test" in done.stdout, (
        done.stdout[-2000:] + done.stderr[-2000:]
    )
