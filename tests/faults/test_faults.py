"""Every fault of the table, as often as CI has time for: nothing may be lost; and that a loss would
be seen.
"""

import ast
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import status
from tests.faults import results
from tests.faults.__main__ import BLOCK, PAGE, table
from tests.faults.commands import PROJECT, call, unlike_a_process
from tests.faults.mutations import HOSTILE, broken, fresh
from tests.faults.registry import Fault, Outcome, Unavailable, load
from tests.faults.run_folders import DEMO

FAULTS = load()


def marks(fault: Fault) -> list[pytest.MarkDecorator]:
    """Those that train share processes that have imported NeMo, and runs that nothing interrupted;
    the rest share nothing.
    """
    if fault.slurm:
        return [pytest.mark.slurm, *([pytest.mark.nemo] if fault.nemo else [])]
    if fault.nemo:
        return [pytest.mark.nemo, pytest.mark.xdist_group("training faults")]
    prepares_data = fault.inject.__module__.endswith(".data_files")  # with Megatron-Core
    return [pytest.mark.xdist_group(fault.name), *([pytest.mark.nemo] if prepares_data else [])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [pytest.param(f, id=f.name, marks=marks(f)) for f in FAULTS if f.small]
)
def test_nothing_is_lost(fault: Fault, tmp_path: Path) -> None:
    try:
        outcome = fault.inject(fault.small, tmp_path)
    except Unavailable as reason:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(reason))
    print(f"{fault.what}: {outcome.inputs} inputs: {dict(outcome.came_out)}")
    assert outcome.inputs and not outcome.lost, "\n".join(outcome.lost[:20])


def test_the_page_names_every_fault() -> None:
    (block,) = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    named = [f for f in FAULTS if f"| {f.what} |" in block or f"Not injected: {f.what} (" in block]
    assert named == FAULTS


# What a fault may take from the product beside the `main` of a command: nothing that it injects
# through.
NEEDED = {
    "commands.py": {"recipes.cli.command", "recipes.exit_codes.EXIT_WRONG_INPUT"},  # runs a command
    "__main__.py": {"recipes.cli.ArgumentParser", "recipes.cli.command"},  # is a command itself
    "hostile.py": {"recipes.plan.Plan"},  # knows which fields of a plan take a text
    "training/numerics.py": {"recipes.exit_codes.EXIT_WRONG_INPUT"},
}
INSIDE = (
    "training/_stack.py",
    "training/process.py",
    "training/sabotage.py",
)  # what a real run does to itself


def test_every_fault_goes_through_a_command_or_a_real_run() -> None:
    here = Path(__file__).parent
    modules = {str(path.relative_to(here)): path for path in here.rglob("*.py")}
    others = {
        name: sorted(set(_inner(path)) - NEEDED.get(name, set())) for name, path in modules.items()
    }
    assert {name: used for name, used in others.items() if used and name not in INSIDE} == {}


def _inner(path: Path) -> Iterator[str]:
    """Yield the names of the product that a module takes and that are no command, or no `main` of
    one.
    """
    tree = ast.parse(path.read_text())
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = {a.asname or a.name: f"{node.module}.{a.name}" for node in taken for a in node.names}
    for name, full in names.items():
        if not full.startswith(("recipes.", "launch.", "analysis.")):
            continue
        uses = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and ast.unparse(n.value) == name
        ]
        is_main = full.endswith(".main") and not uses
        if not is_main and not (uses and {use.attr for use in uses} == {"main"}):
            yield full


def test_what_is_kept_holds_for_the_same_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "KEPT", tmp_path)
    fault, outcome = FAULTS[0], Outcome(Counter({"refused": 3}), [], ["1 s"])
    results.keep(fault, 3, outcome, 1.0)
    results.keep(fault, 2, Outcome(), 1.0)
    assert (kept := results.kept(fault)) and kept.count == 3 and kept.outcome == outcome
    assert f"| 3 (small: 3 for {fault.full:,}) | refused |" in table([(fault, outcome, 3)])
    monkeypatch.setattr(results, "product", lambda: "of another commit")
    assert results.kept(fault) is None


def test_a_loss_is_counted_and_shown() -> None:
    outcome = Outcome()
    outcome.add("refused")
    outcome.add("refused", lost="input 2: taken for whole")
    assert outcome.inputs == 2 and "| refused | **1** |" in table(
        [(FAULTS[0], outcome, FAULTS[0].full)]
    )


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
def test_a_command_that_ends_otherwise_than_it_should_is_wrong(
    main: object, wrong: str | None
) -> None:
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


def test_a_command_ends_in_this_process_as_in_its_own() -> None:
    for runs in ([DEMO[0]], [DEMO[0], DEMO[0] / "nothing"]):
        assert unlike_a_process(status.main, runs, ended := call(status.main, runs)) is None
    assert unlike_a_process(status.main, [DEMO[1]], ended)


READERS_THAT_RUN_CODE = {
    *(
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
        "torch",
        "code",
        "codeop",
    ),
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "read_pickle",
        "to_pickle",
        "unsafe_load",
        "full_load",
    ),
    *("system", "popen", "yaml.load", "np.load", "allow_pickle"),
}


def _readers(source: str) -> set[str]:
    """Return the readers that run code among what a module imports and calls."""
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            short = name.rpartition(".")[2]
            found |= {name, *(str(keyword.arg) for keyword in node.keywords)}
            found |= {short} if name != "re.compile" else set()
    return found & READERS_THAT_RUN_CODE


def test_analysis_reads_data_alone() -> None:
    assert _readers("import pickle\nnp.load(x, allow_pickle=True)\nre.compile(y)") == {
        "pickle",
        "np.load",
        "allow_pickle",
    }
    modules = (PROJECT / "analysis").rglob("*.py")
    assert {path.name: found for path in modules if (found := _readers(path.read_text()))} == {}


def test_a_page_that_takes_text_for_markup_is_seen() -> None:
    from tests.faults.hostile import Page

    clean = Page("<p class=a>text</p><a href='#here'>x</a>")
    seen = [Page(f"<p class=a>{text}</p>").unlike(clean) for text in HOSTILE[:3]]
    assert all(seen) and Page("<p class=a>&lt;script&gt;</p>").unlike(clean) is None
    assert Page("<a href='javascript:alert(1)'>x</a>").unlike(clean)
