"""Results of injected faults, kept as one file each under .faults/, which git ignores.

A result holds for the product's files and the fault's own source that it was made with.  So
`make faults` goes on where it was cut, and injects again what a change may have touched.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.commands import PROJECT
from tests.faults.registry import Fault, Outcome, load

KEPT = PROJECT / ".faults"
PRODUCT = ("recipes", "launch", "analysis", "conf")
SITE = "conf/local/"


@dataclass(frozen=True)
class Result:
    """What came of a fault that was injected `count` times; `seconds` is the time it took."""

    key: str
    count: int
    outcome: Outcome
    seconds: float


def kept(fault: Fault) -> Result | None:
    """Return the result of the code as it is now; None where there is none."""
    path = KEPT / f"{fault.name}.json"
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    if row["key"] != key(fault):
        return None
    found = row["outcome"]
    outcome = Outcome(Counter(found["came_out"]), found["lost"], found["measured"])
    return Result(row["key"], row["count"], outcome, row["seconds"])


def keep(fault: Fault, count: int, outcome: Outcome, seconds: float) -> Result:
    """Write a result, unless one of more inputs is there."""
    result, before = Result(key(fault), count, outcome, seconds), kept(fault)
    if before is None or before.count <= count:
        KEPT.mkdir(exist_ok=True)
        part = KEPT / f"{fault.name}.part"
        part.write_text(json.dumps({**vars(result), "outcome": vars(outcome)}, indent=1))
        part.replace(KEPT / f"{fault.name}.json")
    return result


def key(fault: Fault) -> str:
    """Return a hash of the product, of the fault's module, and of the modules that all share."""
    module = Path(inspect.getfile(fault.inject))
    sources = [path.read_text() for path in (module, *_shared(module.parent))]
    return hashlib.sha256("".join([product(), *sources]).encode()).hexdigest()


@functools.cache
def product() -> str:
    """Return a hash of the files of the product."""
    found = hashlib.sha256()
    for name in _files(PRODUCT):
        found.update(f"{name}\0".encode() + (PROJECT / name).read_bytes())
    return found.hexdigest()


@functools.cache
def _shared(package: Path) -> tuple[Path, ...]:
    """Return the modules of this package, and of one inside it, that register no fault."""
    theirs = {Path(inspect.getfile(fault.inject)) for fault in load()} | {Path(__file__)}
    modules = {*Path(__file__).parent.glob("*.py"), *package.glob("*.py")}
    return tuple(sorted(p for p in modules - theirs if not p.name.startswith(("test_", "__"))))


def _files(parts: Iterable[str]) -> list[str]:
    every = ("--cached", "--others", "--exclude-standard")
    listed = _git("ls-files", "-z", *every, "--", *parts).split("\0")
    ours = {name for name in listed if name and not name.startswith(SITE)}
    return sorted(name for name in ours if (PROJECT / name).is_file())


def commit() -> str:
    """Return the last commit that changed the product, and whether its files differ from it."""
    changed = _git("status", "--porcelain", "--", *PRODUCT).strip()
    last = _git("log", "-1", "--format=%h", "--", *PRODUCT).strip()
    return f"{last} with changes" if changed else last


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout
