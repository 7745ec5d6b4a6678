"""A session whose tests leave a process or a thread behind ends, fails, and names the test."""

import os
import subprocess
import sys
from pathlib import Path

LEAVES = """
import subprocess, sys, threading, time

def test_leaves_a_process_of_a_process():
    subprocess.run([sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '3600'], start_new_session=True)"])

def test_leaves_a_thread():
    threading.Thread(target=time.sleep, args=(3600,), name="reader").start()

def test_leaves_nothing():
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
"""  # noqa: E501


def test_what_a_test_leaves_behind_fails_the_session_which_ends(tmp_path: Path) -> None:
    (tmp_path / "test_leaves.py").write_text(LEAVES)
    command = [
        sys.executable,
        "-c",
        (
            "import tests.leftovers as l, pytest, sys; l.PATIENCE_S = 1;"
            " sys.exit(pytest.main(sys.argv[1:]))"
        ),
    ]
    options = [
        "-p",
        "tests.leftovers",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, *options, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "3 passed" in done.stdout, done.stdout + done.stderr
    found = [
        line for line in done.stdout.splitlines() if line.startswith(("process ", "a thread, "))
    ]
    assert len(found) == 2 and "reader" in found[0] and found[0].endswith("::test_leaves_a_thread")
    assert "sleep 3600" in found[1] and "::test_leaves_a_process_of_a_process" in found[1]
