"""The axes of an experiment: taken from its file, replaced by the command line, and every figure's
cells compose.
"""

import pytest

from recipes.compose.axes import with_axes
from recipes.compose.tree import compose_plan, sweep
from recipes.errors import InputError

FIVE = "model=llama3_8b,llama3_70b,llama31_405b,nemotron4_15b,nemotron4_340b"


def test_axes_come_from_the_experiment_and_yield_to_the_command_line() -> None:
    assert with_axes(["experiment=fig3"]) == [FIVE, "precision=bf16,fp8_current", "experiment=fig3"]
    assert with_axes(["experiment=fig3", "model=llama3_8b"]) == [
        "precision=bf16,fp8_current",
        "experiment=fig3",
        "model=llama3_8b",
    ]
    assert with_axes(["experiment=throughput", "seed=1,2"]) == ["experiment=throughput", "seed=1,2"]
    assert with_axes(["model=llama3_8b,llama3_70b"]) == ["model=llama3_8b,llama3_70b"]


@pytest.mark.parametrize(("figure", "cells"), [("fig3", 10), ("fig4", 10), ("fig5", 40)])
def test_every_cell_of_a_figure_can_be_launched(figure: str, cells: int) -> None:
    plans = [compose_plan(choice) for choice in sweep(with_axes([f"experiment={figure}"]))]
    assert len(plans) == cells == len({(plan.runs_dir, plan.run_name) for plan in plans})
    assert {plan.settings.name for plan in plans} == {"throughput"} and {
        plan.data.kind for plan in plans
    } == {"mock"}
    assert {plan.runs_dir for plan in plans} == {f"runs/{figure}"} and {
        plan.executor.kind for plan in plans
    } == {"slurm"}


def test_figure_1_trains_nothing_and_says_what_to_do() -> None:
    with pytest.raises(
        InputError,
        match=(
            r"^this experiment trains nothing; make its figure with"
            r" python -m recipes\.measure\.gemm --models all --out DIR$"
        ),
    ):
        compose_plan(["experiment=fig1", "model=llama3_8b"])


@pytest.mark.parametrize("experiment", ["fig9", "fig3,fig4"])
def test_what_is_no_experiment_is_one_line(experiment: str) -> None:
    with pytest.raises(InputError, match=f"experiment={experiment}") as error:
        with_axes([f"experiment={experiment}"])
    assert "\n" not in str(error.value)
