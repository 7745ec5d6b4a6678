"""`python -m docs.build.render`: every table and figure of README.md and docs/ made again from the
runs that the repository ships.

A number in the documentation is worth what can be made again.  So no table there is typed: between

    <!-- table: NAME FOLDER… -->        and        <!-- end -->

stands what this command writes, from folders of `analysis/results` (or from reference data, where
no folder is named), and between `<!-- figure: NAME FOLDER -->` and `<!-- end -->` an image that it
draws into docs/images.  What stands around them is prose and is left alone.  Run twice, it changes
nothing; `--check` writes nothing and fails where documents and results disagree.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from analysis.render.figure import Figure
from docs.build.tables import PARTS, Maker
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.files import write_file

ROOT = Path(__file__).resolve().parents[2]
EXIT_DIFFERS = 1
# A pixel differs by more than so much; so large a share may differ in two drawings of one result
LEVELS, PIXELS = 8 / 255, 0.001
OPEN = re.compile(r"^<!-- (table|figure): *(.*?) *-->$", re.MULTILINE)
BLOCK = re.compile(
    r"^<!-- (table|figure): *(?P<words>.*?) *-->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Made:
    """The documents and images as they should be, by path."""

    documents: dict[Path, str]
    images: dict[Path, bytes]

    def differing(self) -> list[Path]:
        """Return the files that are not as they should be."""
        texts = [
            path
            for path, text in self.documents.items()
            if path.read_text(encoding="utf-8") != text
        ]
        return [
            *texts,
            *(
                path
                for path, image in self.images.items()
                if not path.exists() or not same_picture(path.read_bytes(), image)
            ),
        ]

    def write(self) -> None:
        """Write the files that differ."""
        for path in self.differing():
            write_file(path, self.documents[path] if path in self.documents else self.images[path])


def same_picture(a: bytes, b: bytes) -> bool:
    """Whether two PNG images show the same: another processor's last bits move the edge of a line
    here and there, results move lines.
    """
    if a == b:
        return True
    try:
        ours, theirs = (
            np.asarray(imread(io.BytesIO(image), format="png"), float) for image in (a, b)
        )
    except (OSError, SyntaxError, ValueError):
        return False
    return (
        ours.shape == theirs.shape
        and float((np.abs(ours - theirs).max(axis=-1) > LEVELS).mean()) <= PIXELS
    )


def make(root: Path = ROOT) -> Made:
    """Return README.md, docs/*.md and their images, made from `root`/analysis/results; InputError
    where a marker cannot be served.
    """
    made = Made({}, {})
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        made.documents[path] = _document(path, root, made.images)
    return made


def _document(path: Path, root: Path, images: dict[Path, bytes]) -> str:
    text = path.read_text(encoding="utf-8")
    if len(OPEN.findall(text)) != len(BLOCK.findall(text)):
        raise InputError(
            f"{path.relative_to(root)}: a marker is not closed; end each block with <!-- end --> on"
            " a line of its own"
        )

    def block(match: re.Match[str]) -> str:
        name, *folders = match.group("words").split() or [""]
        try:
            made = _part(match.group(1), name)([_folder(root, folder) for folder in folders])
        except InputError as error:
            raise InputError(
                f"{path.relative_to(root)}, {match.group(1)} {name}: {error}"
            ) from None
        body = (
            _image(made, path, root, images)
            if isinstance(made, Figure)
            else made.replace(f"{root}{os.sep}", "").strip()
        )
        return f"{match.group(0).splitlines()[0]}\n\n{body}\n\n<!-- end -->"

    return BLOCK.sub(block, text)


def _part(kind: str, name: str) -> Maker:
    if name not in PARTS[kind]:
        raise InputError(f"there is no {kind} of this name; choose one of {', '.join(PARTS[kind])}")
    return PARTS[kind][name]


def _folder(root: Path, name: str) -> Path:
    folder = root / "analysis" / "results" / name
    if not folder.is_dir():
        raise InputError(
            f"{folder.relative_to(root)} is not there; name a folder of analysis/results"
        )
    return folder


def _image(figure: Figure, document: Path, root: Path, images: dict[Path, bytes]) -> str:
    """Keep a figure's image under its name and return the line that shows it."""
    path, image = root / "docs" / "images" / f"{figure.name}.png", figure.png()
    if images.setdefault(path, image) != image:
        raise InputError(
            f"two different images would be written to {path.relative_to(root)}; show one of them"
        )
    return f"![{figure.title}]({os.path.relpath(path, document.parent)})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where --check finds a difference, 2 with one line for what the user can
    mend.
    """
    parser = ArgumentParser(
        prog="python -m docs.build.render",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 and name the files that would change",
    )
    check = parser.parse_args(argv).check
    try:
        made = make()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    differing = made.differing()
    for path in differing:
        print(f"{'differs from the results' if check else 'written'}: {path.relative_to(ROOT)}")
    if not check:
        made.write()
    return EXIT_DIFFERS if check and differing else 0


if __name__ == "__main__":
    command(main)
