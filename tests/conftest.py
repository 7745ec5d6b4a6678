"""How the tests are run: in parallel, without leftovers, and without NeMo where the marks say so.

`pytest -n 2 --dist loadgroup` gives each worker whole files, for their tests share runs, and whole
groups: those that share a Slurm or NeMo's processes.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# As many threads as there are cores for a worker, set before anything imports NumPy or PyTorch.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", str(cores))

from tests import leftovers, warm

HEAVY = {"nemo", "megatron", "lightning", "transformer_engine"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden files anew instead of comparing with them",
    )


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """The path of a Python that has imported NeMo already (tests/warm.py)."""
    with warm.interpreter() as path:
        yield path


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(leftovers)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make each file a group of its own where it names none, and start with the groups that take
    longest.
    """
    groups = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        mark = item.get_closest_marker("xdist_group")
        own = "slurm" if item.get_closest_marker("slurm") else item.nodeid.partition("::")[0]
        if mark is None:
            item.add_marker(pytest.mark.xdist_group(own))
        groups[mark.args[0] if mark else own].append(item)
    items[:] = [item for group in sorted(groups.values(), key=_weight) for item in group]


def _weight(group: list[pytest.Item]) -> int:
    """Sort a Slurm, which mostly waits, before what trains, and that before the rest."""
    marks = {mark.name for item in group for mark in item.iter_markers()}
    names = {mark.args[0] for item in group for mark in item.iter_markers("xdist_group")}
    return 0 if "slurm" in names else 1 if "nemo" in marks else 2 if "slow" in marks else 3


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a module alone that is marked as a whole with what `-m` excludes: importing it imports
    NeMo, or PyTorch.
    """
    if collection_path.suffix != ".py" or not (excluded := _excluded(config)):
        return None
    marks = re.search(
        r"^pytestmark = .*$", collection_path.read_text(encoding="utf-8"), re.MULTILINE
    )
    found = set(re.findall(r"pytest\.mark\.(\w+)", marks[0])) if marks else set[str]()
    return True if found & excluded else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Where tests that import NeMo are excluded, none may import it; a test's stand-in has no file.

    tests/test_marks.py looks at what collecting imports.
    """
    before = _heavy()
    result = yield
    if "nemo" in _excluded(item.config) and (imported := _heavy() - before):
        pytest.fail(
            f"{', '.join(sorted(imported))} is imported; mark the test, or its module, as nemo"
        )
    return result


def _heavy() -> set[str]:
    return {name for name in HEAVY if getattr(sys.modules.get(name), "__file__", None)}


def _excluded(config: pytest.Config) -> set[str]:
    """Return the marks that an expression like `-m "not nemo and not slow"` excludes."""
    parts = str(config.option.markexpr).split(" and ")
    return {
        part.strip().removeprefix("not ").strip()
        for part in parts
        if re.fullmatch(r"\s*not \w+\s*", part)
    }
