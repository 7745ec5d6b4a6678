"""What every figure shares: a drawing with its title and caption, axes, and a colour for each
precision.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.  A precision keeps
its colour in every figure.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from recipes.files import write_file

COLOURS = {
    "bf16": "#222222",
    "fp8_delayed": "#E69F00",
    "fp8_current": "#0072B2",
    "fp8_subchannel": "#009E73",
    "mxfp8": "#D55E00",
}
SIZE = (8.0, 4.2)  # inches
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "figures",
    "font.size": 10,
}


@dataclass(frozen=True)
class Figure:
    """A drawing with what a reader needs beside it."""

    name: str
    title: str
    caption: str
    drawing: Drawing

    def svg(self) -> str:
        """Return the drawing as an SVG element, text kept as paths so that it looks the same
        everywhere.
        """
        with mpl.rc_context(STYLE):
            file = io.StringIO()
            self.drawing.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
        text = file.getvalue()
        return text[text.index("<svg") :]

    def _repr_html_(self) -> str:
        """Show the drawing with its title and caption in a notebook."""
        return (
            f"<figure>{self.svg()}<figcaption><b>{escape(self.title)}.</b>"
            f" {escape(self.caption)}</figcaption></figure>"
        )

    def png(self) -> bytes:
        """Return the drawing as a PNG image, the same bytes each time."""
        file = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.drawing.savefig(
                file,
                format="png",
                dpi=110,
                bbox_inches="tight",
                facecolor="white",
                metadata={"Software": None},
            )
        return file.getvalue()

    def write_png(self, folder: Path) -> Path:
        """Write the drawing as NAME.png in `folder`, made if need be, and return its path."""
        return write_file(folder / f"{self.name}.png", self.png())


def axes(title: str, x: str, y: str, panels: int = 1) -> tuple[Drawing, list[Axes]]:
    """Return a drawing with `panels` axes side by side, named."""
    with mpl.rc_context(STYLE):
        drawing = Drawing(figsize=SIZE, layout="constrained")
        found = list(np.atleast_1d(drawing.subplots(1, panels)))
    drawing.suptitle(title, fontsize=11, parse_math=False)  # a device may be called anything
    for axis in found:
        axis.set_xlabel(x)
        axis.set_ylabel(y)
    return drawing, found
