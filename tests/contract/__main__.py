"""`python -m tests.contract`: check, per stack, what recipes/ uses of upstream packages.

    python -m tests.contract                     check by the committed index
    python -m tests.contract --fetch SOURCES     download the stacks' sources (about 600 MB)
    python -m tests.contract --update SOURCES    make index and docs/contract.md anew, then check

Exit code 1 where a use fails, with file and line of ours and of upstream.

The sources are read, never imported or installed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from recipes.cli import ArgumentParser
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from tests.contract import index, page
from tests.contract.fetch import fetch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 where every use holds, 1 where one fails, 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m tests.contract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--fetch",
        type=Path,
        metavar="SOURCES",
        help="download the sources that are missing in this folder",
    )
    parser.add_argument(
        "--update",
        type=Path,
        metavar="SOURCES",
        help="make the index and docs/contract.md from this folder",
    )
    args = parser.parse_args(argv)
    try:
        if args.fetch:
            fetch(args.fetch)
        if args.update:
            _update(args.update)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    found = index.results(index.our_uses(), index.load())
    if args.update:
        index.ROOT.joinpath(page.PAGE).write_text(page.text(found), encoding="utf-8")
    return _report(found)


def _update(folder: Path) -> None:
    sources = index.read("stacks.yaml")["sources"]
    missing = [name for name in sources if not (folder / name).is_dir()]
    if missing:
        remedy = f"run python -m tests.contract --fetch {folder}"
        raise InputError(f"{folder} lacks {', '.join(missing)}; {remedy}")
    index.write(index.make(index.our_uses(), folder))


def _report(found: Sequence[index.Result]) -> int:
    for environment in dict.fromkeys(result.environment for result in found):
        counts = Counter(r.verdict.outcome for r in found if r.environment == environment)
        print(f"{environment}: {', '.join(f'{counts[o]} {o}' for o in page.OUTCOMES)}")
    failures: dict[str, list[str]] = {}
    for result in found:
        if result.verdict.outcome == "fails":
            failures.setdefault(result.verdict.why, []).append(result.environment)
    for why, where in failures.items():
        print(f"{why} [{', '.join(dict.fromkeys(where))}]", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
