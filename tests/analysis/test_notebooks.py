"""Every notebook runs top to bottom on the run folders that the repository ships, and holds neither
outputs nor logic.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ANALYSIS = Path(__file__).parents[2] / "analysis"
NOTEBOOKS = sorted(ANALYSIS.glob("*.ipynb"))
LOGIC = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Try, ast.With, ast.Lambda)


def test_the_notebooks_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {
        "loss_convergence",
        "step_time",
        "gemm_granularity",
        "recipe_numerics",
        "throughput_tables",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_figures_with_captions(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ANALYSIS.parent))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ANALYSIS)}}).execute()
    html = "".join(
        o.data.get("text/html", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for o in cell.outputs
        if "data" in o
    )
    figures = re.findall(r"<figcaption><b>.+?</b> .{40,}?</figcaption>", html)
    assert figures and html.count("<svg") == len(figures)
    errors = [
        o
        for cell in notebook.cells
        if cell.cell_type == "code"
        for o in cell.outputs
        if o.output_type == "error"
    ]
    assert not errors


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_logic_and_no_output(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    assert not [type(node).__name__ for node in nodes if isinstance(node, LOGIC)]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
