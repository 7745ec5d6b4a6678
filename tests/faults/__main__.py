"""`python -m tests.faults`: inject every fault and write the table of docs/reliability.md.

What was injected into this state of the code before is not injected again, so a run that was cut
goes on.  `--only NAME…` injects some faults, `--small` as often as CI does, `--most N` at most N
times each, but no less than CI; they print their rows.  `--page` writes the page from the results
that there are, with rows of fewer inputs marked.  Exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

from recipes.cli import ArgumentParser, command
from tests.faults import results
from tests.faults.commands import PROJECT
from tests.faults.registry import Fault, Outcome, load
from tests.faults.workers import inject_all

PAGE = PROJECT / "docs" / "reliability.md"
BLOCK = re.compile(r"^<!-- faults -->$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
Row = tuple[Fault, Outcome, int]  # with the count that it was injected with


def table(found: Sequence[Row], absent: Sequence[str] = ()) -> str:
    """Return the outcomes as Markdown: a table for each area, and what was not injected."""
    parts = []
    for area in dict.fromkeys(fault.area for fault, *_ in found):
        mine = [row for row in found if row[0].area == area]
        measured = [f"- {line}" for _, outcome, _ in mine for line in outcome.measured]
        columns = ["| injected | inputs | what came out | lost |", "| --- | ---: | --- | --- |"]
        lines = [f"### {area}", "", *columns, *map(_row, mine)]
        parts.append("\n".join([*lines, *(["", *measured] if measured else [])]))
    inputs, lost = sum(o.inputs for _, o, _ in found), sum(len(o.lost) for _, o, _ in found)
    total = f"In all: {inputs:,} inputs, {lost or 'nothing'} lost."
    return "\n\n".join([*parts, total, *(f"Not injected: {each}." for each in absent)])


def _row(row: Row) -> str:
    fault, outcome, count = row
    fewer = f" (small: {count} for {fault.full:,})" if count < fault.full else ""
    return f"| {fault.what} | {outcome.inputs:,}{fewer} | {_came_out(outcome)} | {_lost(outcome)} |"


def _came_out(outcome: Outcome) -> str:
    several = len(outcome.came_out) > 1
    found = outcome.came_out.most_common()
    return "; ".join(f"{what} ({n:,})" if several else what for what, n in found)


def _lost(outcome: Outcome) -> str:
    return f"**{len(outcome.lost):,}**" if outcome.lost else "nothing"


def write(text_of_table: str) -> None:
    """Put the table between the page's markers."""
    text = PAGE.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == 1, f"{PAGE} has no <!-- faults --> … <!-- end -->"
    block = f"<!-- faults -->\n\n{text_of_table}\n\n<!-- end -->"
    PAGE.write_text(BLOCK.sub(lambda _: block, text), encoding="utf-8")


def arguments(argv: Sequence[str] | None, faults: Sequence[Fault]) -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="python -m tests.faults", description=__doc__, formatter_class=raw)
    names = [fault.name for fault in faults]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="these alone")
    parser.add_argument("--small", action="store_true", help="inject as often as CI does")
    parser.add_argument("--most", type=int, metavar="N", help="at most N times, or as CI")
    parser.add_argument("--page", action="store_true", help="inject nothing, write the page")
    jobs = os.cpu_count()
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N", help="faults at once")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    faults = load()
    args = arguments(argv, faults)
    chosen = [fault for fault in faults if args.only is None or fault.name in args.only]
    absent = dict[str, str]()
    tasks = [] if args.page else _missing([(fault, _count(fault, args)) for fault in chosen])

    def done(fault: Fault, count: int, found: Outcome | str, seconds: float) -> None:
        if isinstance(found, str):
            absent[fault.name] = found
            print(f"{fault.area}: {fault.name}: not injected: {found}", flush=True)
            return
        results.keep(fault, count, found, seconds)
        ended = f"{found.inputs:,} inputs, {_lost(found)} lost, {seconds:.0f} s"
        print(f"{fault.area}: {fault.name}: {ended}", flush=True)
        for line in found.lost[:20]:
            print(f"  lost: {line}", flush=True)

    inject_all(tasks, min(args.jobs, len(tasks)), done)
    rows = [(fault, kept.outcome, kept.count) for fault in chosen if (kept := results.kept(fault))]
    there = {fault.name for fault, *_ in rows}
    left = [fault for fault in chosen if fault.name not in there]
    missing = [f"{fault.what} ({absent.get(fault.name, 'not run yet')})" for fault in left]
    if args.only or args.small or args.most:
        print(f"\n{table(rows, missing)}")
    else:
        write(f"Injected into the code of commit {results.commit()}.\n\n{table(rows, missing)}")
        print(f"written: {PAGE}")
    return 1 if any(outcome.lost for _, outcome, _ in rows) else 0


def _count(fault: Fault, args: argparse.Namespace) -> int:
    """Return how often a fault is to be injected."""
    if args.small:
        return fault.small
    return fault.full if args.most is None else max(fault.small, min(fault.full, args.most))


def _missing(wanted: Sequence[tuple[Fault, int]]) -> list[tuple[Fault, int]]:
    """Return the faults, with their counts, without a result of so many inputs and no loss."""
    return [(fault, count) for fault, count in wanted if count and not _is_there(fault, count)]


def _is_there(fault: Fault, count: int) -> bool:
    kept = results.kept(fault)
    return kept is not None and kept.count >= count and not kept.outcome.lost


if __name__ == "__main__":
    command(main)
