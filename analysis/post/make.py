"""A figure's page from its name: shipped results, which may not be there yet, and the folders that
a user adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.post import single, training
from analysis.post.training import Page
from analysis.runs.load import folders_of, once
from analysis.runs.soundness import sound
from recipes.errors import InputError

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHIPPED = {
    1: ["gemm_h200"],
    2: ["fig2_h200"],
    3: ["fig3_h200", "llama3_8b_h200"],
    4: ["fig4_b200"],
    5: ["fig5_gb200"],
}
STAND_IN = "demo"


def make(
    figure: str, overrides: Sequence[str] = (), given: Sequence[Path] = (), results: Path = RESULTS
) -> Page:
    """Return the page of "fig1" to "fig5" from the shipped results and the folders given;
    InputError for what cannot be used.
    """
    if figure not in {f"fig{number}" for number in SHIPPED}:
        raise InputError(f"{figure}: no figure of the post; give fig1, fig2, fig3, fig4 or fig5")
    number = int(figure.removeprefix("fig"))
    if number <= 2 and overrides:
        raise InputError(
            f"{overrides[0]}: {figure} is made of what was measured and takes no overrides; leave"
            " it out"
        )
    shipped = [results / name for name in SHIPPED[number] if (results / name).is_dir()]
    if number == 1:
        return single.gemms(once([*shipped, *given]))
    folders = [run for folder in (*shipped, *given) for run in _runs_below(folder)]
    if number == 2:
        return single.losses(folders, folders_of([results / STAND_IN]))
    runs, left_out = sound(folders)
    page = training.page(number, overrides, runs)
    page.left_out += left_out
    return page


def _runs_below(folder: Path) -> list[Path]:
    found = folders_of([folder])
    if not found:
        raise InputError(
            f"{folder} holds no run folder (plan.json); name folders that python -m launch or"
            " analysis.import_logs wrote"
        )
    return found
