"""`python -m analysis.post fig3 [RUN…]`: the page of a figure of NVIDIA's post: measured,
published, and predictions for the rest.

    python -m analysis.post fig3
        the shipped runs
    python -m analysis.post fig3 runs/fig3
        and yours (run folders, or folders that hold some)
    python -m analysis.post experiment=fig5 precision=mxfp8
        with other axes than the experiment's
    python -m analysis.post fig1 results/gemm
        yours, as python -m recipes.measure.gemm wrote it

DIR/figN.html needs nothing beside itself; DIR/figN.csv holds the values; figures are written as PNG
too.  In seconds, without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.post.make import make
from analysis.post.training import Page
from analysis.render.pages import render
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError, one_line
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.files import write_file


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m analysis.post",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figure", help="fig1 … fig5, or experiment=fig3")
    parser.add_argument(
        "given",
        nargs="*",
        default=[],
        metavar="RUN or KEY=VALUE",
        help="folders of runs beside the shipped ones; overrides of the experiment",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("local/post"),
        metavar="DIR",
        help="where the page is written (default: local/post)",
    )
    args = parser.parse_intermixed_args(argv)
    figure = args.figure.removeprefix("experiment=")
    folders = [Path(word) for word in args.given if "=" not in word or Path(word).exists()]
    overrides = [word for word in args.given if "=" in word and not Path(word).exists()]
    try:
        if args.out.suffix == ".html":
            raise InputError(
                f"{args.out}: --out names a folder, in which the page is written as {figure}.html;"
                f" give one, as in --out {args.out.with_suffix('')}"
            )
        page = make(figure, overrides, folders)
        _write(page, figure, args.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    for table in page.tables[:1]:
        table.print()
    for line in [*page.said, *(f"Left out: {reason}" for reason in page.left_out)]:
        print(one_line(line))
    print(one_line(f"page: {args.out / figure}.html"))
    return 0


def _write(page: Page, figure: str, out: Path) -> None:
    """Write the page, the values of its own table, and its figures as PNG."""
    shown = {
        "title": page.title,
        "said": page.said,
        "tables": page.tables,
        "figures": page.figures,
        "left_out": page.left_out,
    }
    write_file(out / f"{figure}.html", render("post.html.j2", **shown))
    if page.tables:
        write_file(out / f"{figure}.csv", page.tables[0].csv())
    for drawn in page.figures:
        drawn.write_png(out)


if __name__ == "__main__":
    command(main)
