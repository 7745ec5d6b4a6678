"""Every fault of the table, as often as CI has time for: nothing may be lost; and that a loss would be seen."""

import os
import random
from pathlib import Path

import pytest

from tests.faults.__main__ import BLOCK, PAGE, table
from tests.faults.commands import call
from tests.faults.mutations import HOSTILE, broken, fresh
from tests.faults.registry import Fault, Outcome, Unavailable, load
from tests.faults.run_folders import DEMO

FAULTS = load()


def marks(fault: Fault) -> list[pytest.MarkDecorator]:
    """Those that train share processes that have imported NeMo, and runs that nothing interrupted; the rest share nothing."""
    if fault.slurm:
        return [pytest.mark.slurm, *([pytest.mark.nemo] if fault.nemo else [])]
    if fault.nemo:
        return [pytest.mark.nemo, pytest.mark.xdist_group("training faults")]
    prepares_data = fault.inject.__module__.endswith(".data_files")  # with Megatron-Core
    return [pytest.mark.xdist_group(fault.name), *([pytest.mark.nemo] if prepares_data else [])]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [pytest.param(f, id=f.name, marks=marks(f)) for f in FAULTS])
def test_nothing_is_lost(fault: Fault, tmp_path: Path) -> None:
    try:
        outcome = fault.inject(fault.small, tmp_path)
    except Unavailable as reason:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(reason))
    print(f"{fault.what}: {outcome.inputs} inputs: {dict(outcome.came_out)}")
    assert outcome.inputs and not outcome.lost, "\n".join(outcome.lost[:20])


def test_the_page_names_every_fault() -> None:
    (block,) = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert [fault.name for fault in FAULTS if f"| {fault.what} |" not in block] == []


def test_a_loss_is_counted_and_shown() -> None:
    outcome = Outcome()
    outcome.add("refused")
    outcome.add("refused", lost="input 2: taken for whole")
    assert outcome.inputs == 2 and "| refused | **1** |" in table([(FAULTS[0], outcome)])


def _leaves(code: int, said: str = "") -> object:
    def main(_: object) -> int:
        import sys

        print(said, file=sys.stderr, end="")
        return code

    return main


def _raises(_: object) -> int:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("main", "wrong"),
    [
        (_leaves(0), None),
        (_leaves(2, "error: what, why, what instead\n"), None),
        (_leaves(2), "0 lines"),
        (_leaves(2, "error: one\ntwo\n"), "2 lines"),
        (_leaves(2, "Warning: x\n"), "1 lines"),
        (_leaves(7), "exit code 7"),
        (_raises, "KeyError"),
    ],
)
def test_a_command_that_ends_otherwise_than_it_should_is_wrong(main: object, wrong: str | None) -> None:
    found = call(main, []).wrong()  # type: ignore[arg-type]
    assert found is None if wrong is None else wrong in (found or "")


def test_a_broken_folder_is_broken(tmp_path: Path) -> None:
    changed = 0
    for seed in range(50):
        run = fresh(DEMO[0], tmp_path / "run")
        before = {p.name: p.read_bytes() for p in run.iterdir()}
        broken(run, random.Random(seed))
        after = {p.name: p.read_bytes() if p.is_file() else None for p in run.iterdir()}
        changed += after != before
    assert changed >= 45  # a value may be replaced by itself


def test_a_page_that_takes_text_for_markup_is_seen() -> None:
    from tests.faults.hostile import Page

    clean = Page("<p class=a>text</p><a href='#here'>x</a>")
    seen = [Page(f"<p class=a>{text}</p>").unlike(clean) for text in HOSTILE[:3]]
    assert all(seen) and Page("<p class=a>&lt;script&gt;</p>").unlike(clean) is None
    assert Page("<a href='javascript:alert(1)'>x</a>").unlike(clean)
