"""`python -m tests.faults`: inject every fault as often as it says and write the table of docs/reliability.md; 1 if anything was lost.

`--only NAME…` injects some of them and prints their rows; `--small` injects as often as CI does.  Neither writes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recipes.cli import ArgumentParser
from tests.faults.registry import Fault, Outcome, Unavailable, load

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BLOCK = re.compile(r"^<!-- faults -->$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
Found = list[tuple[Fault, Outcome]]


def inject(fault: Fault, count: int) -> Outcome:
    """Inject a fault in a folder of its own; what libraries print meanwhile is dropped."""
    with tempfile.TemporaryDirectory(prefix="faults") as folder, _quiet():
        return fault.inject(count, Path(folder))


@contextmanager
def _quiet() -> Iterator[None]:
    sys.stdout.flush()
    kept, nothing = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nothing, number)
        yield
    finally:
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)


def table(found: Found, absent: Sequence[str] = ()) -> str:
    """Return the outcomes as Markdown, a table an area, with what was measured below it, and at the end which faults this machine could not have."""
    parts = []
    for area in dict.fromkeys(fault.area for fault, _ in found):
        mine = [(fault, outcome) for fault, outcome in found if fault.area == area]
        rows = [f"| {fault.what} | {outcome.inputs:,} | {_came_out(outcome)} | {_lost(outcome)} |" for fault, outcome in mine]
        measured = [f"- {line}" for _, outcome in mine for line in outcome.measured]
        head = [f"### {area}", "", "| injected | inputs | what came out | lost |", "| --- | ---: | --- | --- |"]
        parts.append("\n".join([*head, *rows, *(["", *measured] if measured else [])]))
    inputs, lost = sum(outcome.inputs for _, outcome in found), sum(len(outcome.lost) for _, outcome in found)
    return "\n\n".join([*parts, f"In all: {inputs:,} inputs, {lost or 'nothing'} lost.", *(f"Not injected: {each}." for each in absent)])


def _came_out(outcome: Outcome) -> str:
    return "; ".join(f"{what} ({n:,})" if len(outcome.came_out) > 1 else what for what, n in outcome.came_out.most_common())


def _lost(outcome: Outcome) -> str:
    return f"**{len(outcome.lost):,}**" if outcome.lost else "nothing"


def write(text_of_table: str) -> None:
    """Put the table between the page's markers."""
    text = PAGE.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == 1, f"{PAGE} has no <!-- faults --> … <!-- end -->"
    block = f"<!-- faults -->\n\n{text_of_table}\n\n<!-- end -->"
    PAGE.write_text(BLOCK.sub(lambda _: block, text), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 if anything was lost."""
    faults = load()
    parser = ArgumentParser(prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in faults], help="inject these alone")
    parser.add_argument("--small", action="store_true", help="inject as often as CI does")
    args = parser.parse_args(argv)
    found: Found = []
    absent = list[str]()
    for fault in [fault for fault in faults if args.only is None or fault.name in args.only]:
        start = time.monotonic()
        try:
            outcome = inject(fault, fault.small if args.small else fault.full)
        except Unavailable as reason:
            print(f"{fault.area}: {fault.name}: not injected: {reason}", flush=True)
            absent.append(f"{fault.what} ({reason})")
            continue
        found.append((fault, outcome))
        print(f"{fault.area}: {fault.name}: {outcome.inputs:,} inputs, {_lost(outcome)} lost, {time.monotonic() - start:.0f} s", flush=True)
        for line in outcome.lost[:20]:
            print(f"  lost: {line}", flush=True)
    if args.only or args.small:
        print(f"\n{table(found, absent)}")
    else:
        write(table(found, absent))
        print(f"written: {PAGE}")
    return 1 if any(outcome.lost for _, outcome in found) else 0


if __name__ == "__main__":
    sys.exit(main())
