"""Recommended layouts: every cell fits with a margin under the default settings, and says what
changed.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from launch.matrix import matrix
from launch.summary import summary, table
from recipes.compose.defaults import fill, recommended
from recipes.compose.fit import margin, state
from recipes.compose.layout_rules import excluded
from recipes.compose.nearest import RESOLVED, differing
from recipes.compose.tree import compose_plan, compose_tree
from recipes.data.files import check_data
from recipes.errors import InputError
from recipes.estimate.memory import estimate, usable_gb

Rows = list[dict[str, Any]]
STACKS = ("nemo_25_04", "nemo_25_07")


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Return all cells of NVIDIA's post with the default settings."""
    return list(matrix(STACKS))


@pytest.mark.slow
def test_no_recommended_cell_is_refused_for_memory_or_tight(rows: Rows) -> None:
    refused = [row["why"] for row in rows if not row["runs"]]
    assert refused and not [why for why in refused if "GB" in why]
    assert {row["memory"] for row in rows if row["runs"]} == {"fits"}


@pytest.mark.slow
def test_a_cell_that_gives_up_its_layout_says_what_changed_and_why(rows: Rows) -> None:
    found = {
        (row["model"], row["precision"], row["gpu"]): row["changed"]
        for row in rows
        if row["stack"] == STACKS[0]
    }
    for_memory = {
        key: notes
        for key, notes in found.items()
        if any(note.startswith("for memory") for note in notes)
    }
    assert len(for_memory) >= 10
    assert all(" GB" in notes[-1] and "→" in notes[-1] for notes in for_memory.values())
    assert ("llama3_70b", "bf16", "h100") not in for_memory  # leaves a margin as it is


@pytest.mark.parametrize("precision", ["bf16", "fp8_current"])
def test_the_summary_shows_the_change(precision: str) -> None:
    asked = ["model=llama3_8b", "gpu=h100", f"precision={precision}"]
    plan, nvidias = compose_plan(asked), compose_plan([*asked, "settings.layout=recommended"])
    assert state(plan) == "fits" and state(nvidias) == "tight"
    (key, (old, new)), *_ = differing(nvidias, plan).items()
    note = f"{key} {old} → {new}"
    facts = summary(plan, check_data(plan))
    assert (
        any(note in each for each in facts["layout"]["changed"])
        and facts["memory_gb_per_gpu"]["state"] == "fits"
    )
    assert note in " ".join(table(plan, check_data(plan)).split())
    assert estimate(plan).total_gb * (1 + margin(plan)) <= (usable_gb(plan) or 0)


def test_throughput_keeps_nvidias_layouts() -> None:
    for row in matrix(
        STACKS[:1],
        ["experiment=throughput"],
        {
            "model": ["llama3_8b", "llama31_405b"],
            "precision": ["bf16", "mxfp8"],
            "gpu": ["h100", "gb200"],
        },
    ):
        assert row["changed"] == [] and row["memory"] != "refused"


@pytest.mark.parametrize(
    ("model", "gpu"),
    [
        ("llama3_8b", "h100"),
        ("llama3_70b", "gb200"),
        ("llama31_405b", "b200"),
        ("nemotron4_15b", "b200"),
    ],
)
def test_iso_gives_all_precisions_one_layout_that_fits_each(model: str, gpu: str) -> None:
    plans = []
    for precision in ("bf16", "fp8_delayed", "fp8_current", "mxfp8"):
        try:
            plans.append(
                compose_plan(
                    [f"model={model}", f"gpu={gpu}", f"precision={precision}", "mapping=iso"]
                )
            )
        except InputError as error:
            assert "compute capability" in str(error)
    assert len(plans) >= 3 and all(state(plan) == "fits" for plan in plans)
    for one, other in itertools.pairwise(plans):
        assert one.mapping.model_dump(exclude=RESOLVED) == other.mapping.model_dump(
            exclude=RESOLVED
        )
        assert one.num_gpus == other.num_gpus


def test_an_override_of_one_precision_leaves_the_shared_layout_alone() -> None:
    asked = ["model=llama3_8b", "gpu=h100", "mapping=iso"]
    bf16 = compose_plan([*asked, "precision=bf16"])
    own = compose_plan([*asked, "precision=fp8_current", "precision.fp8.first_layers_bf16=4"])
    assert own.mapping.model_dump(exclude=RESOLVED) == bf16.mapping.model_dump(exclude=RESOLVED)


def test_a_layout_that_is_asked_for_is_not_changed() -> None:
    asked = ["model=llama3_8b", "gpu=h100", "mapping.recompute_layers=1"]
    plan = compose_plan(asked)
    assert plan.mapping.recompute_layers == 1 and state(plan) == "tight"
    remedy = (
        summary(plan, check_data(plan))["memory_gb_per_gpu"]["remedy"]
        .removeprefix("use ")
        .split(" (about")[0]
        .split()
    )
    assert " ".join(remedy) in " ".join(table(plan, check_data(plan)).split())
    assert state(compose_plan([*asked, *remedy])) == "fits"


def test_a_field_given_as_the_row_has_it_stays_and_the_others_still_fit() -> None:
    """Under the default settings the row of this cell leaves no margin, and recomputation gives it
    one.
    """
    cell = ["model=llama3_8b", "gpu=h100", "precision=fp8_current"]
    usual, row = compose_plan(cell), compose_plan([*cell, "settings.layout=recommended"]).mapping
    assert state(usual) == "fits" and usual.mapping.recompute_layers > row.recompute_layers == 0
    for key in ("tp", "cp", "micro_batch"):
        assert compose_plan([*cell, f"mapping.{key}={getattr(row, key)}"]) == usual
    kept = compose_plan([*cell, "mapping.recompute_layers=0"])
    assert state(kept) == "fits" and kept.mapping.recompute_layers == 0
    assert (
        state(compose_plan([*cell, "mapping.recompute_layers=0", "settings.layout=recommended"]))
        == "tight"
    )


@pytest.mark.parametrize(
    "asked",
    [
        ["model=llama3_70b", "gpu=h100", "mapping.pp=3"],
        ["model=llama3_8b", "gpu=h100", "num_gpus=20"],
    ],
    ids=str,
)
def test_a_remedy_names_no_batch_that_nobody_named(asked: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        compose_plan(asked)
    remedy = re.findall(r"[a-z_.]+=[\w.]+", str(caught.value).rpartition("; ")[2])
    assert remedy and "global_batch" not in " ".join(remedy)
    assert compose_plan([*asked, *remedy])
    with pytest.raises(InputError, match=r"; use .*mapping\.global_batch="):
        compose_plan([*asked, "settings.batch=layout", "mapping.global_batch=7"])


@pytest.mark.parametrize(
    ("asked", "dropped", "kept"),
    [
        (
            ["model=nemotron4_340b", "gpu=gb200", "mapping.tp=8", "mapping.pp=4"],
            "fsdp=true (pp=4)",
            {"fsdp": False},
        ),
        (
            ["model=llama3_70b", "gpu=h100", "mapping.pp=1", "mapping.tp=8"],
            "vp=5 (pp=1)",
            {"vp": 1},
        ),
        (
            ["model=llama3_8b", "gpu=b200", "mapping.recompute_layers=4"],
            "cuda_graphs=true (recompute_layers=4)",
            {"cuda_graphs": False},
        ),
        (
            [
                "model=llama31_405b",
                "gpu=gb200",
                "stack=nemo_25_07",
                "precision=fp8_delayed",
                "mapping.recompute_layers=126",
            ],
            "offload_layers=95",
            {"offload_layers": 0},
        ),
    ],
)
def test_a_recommended_field_that_another_excludes_is_dropped_and_named(
    asked: list[str], dropped: str, kept: dict[str, object]
) -> None:
    plan = compose_plan(asked)
    assert any(dropped in note for note in summary(plan, check_data(plan))["layout"]["changed"])
    assert {key: getattr(plan.mapping, key) for key in kept} == kept


def test_whichever_of_two_exclusive_fields_is_asked_for_the_row_gives_up_the_other() -> None:
    """For every recommended row: each field that it leaves off is turned on, and each that is on is
    asked for.
    """
    stacks = {"v2.3.0": "nemo_25_04", "v2.4.0": "nemo_25_07"}
    precisions = {"bf16": "bf16", "fp8": "fp8_delayed"}
    rows = [row for row in recommended() if row["model"] != "*"]
    names = {
        "model": {row["model"] for row in rows},
        "gpu": {row["gpu"] for row in rows},
        "stack": set(stacks.values()),
        "precision": {precisions.get(row["dtype"], row["dtype"]) for row in rows},
    }
    part = {
        (group, name): compose_tree([f"{group}={name}"])[group]
        for group, all_names in names.items()
        for name in all_names
    }
    base, gave_up = compose_tree([]), set[tuple[str, str]]()
    for row in rows:
        cell = {
            "model": row["model"],
            "gpu": row["gpu"],
            "stack": stacks[row["nemo_ref"]],
            "precision": precisions.get(row["dtype"], row["dtype"]),
        }
        tree = base | {group: part[group, name] for group, name in cell.items()}
        own = fill(tree)["mapping"]
        for key, on in (
            ("pp", 2),
            ("fsdp", True),
            ("recompute_layers", 1),
            ("offload_layers", 1),
            ("cuda_graphs", True),
        ):
            filled = fill(tree | {"mapping": tree["mapping"] | {key: on}})["mapping"]
            assert filled[key] == on and not list(excluded(filled, key)), (cell, key)
            for other in excluded(own | {key: on}, key):
                assert (
                    f"{other}={str(own[other]).lower()} ({key}={str(on).lower()})"
                    in filled["source"]
                )
                gave_up.add((key, other))
    shipped = {
        ("fsdp", "pp"),
        ("pp", "fsdp"),
        ("cuda_graphs", "fsdp"),
        ("recompute_layers", "cuda_graphs"),
        ("offload_layers", "pp"),
    }
    assert shipped <= gave_up


def test_what_a_layout_gave_up_stands_in_the_refusal_that_follows() -> None:
    with pytest.raises(
        InputError, match=r"GB \(dropped: pp=8 \(offload_layers=1\), vp=\d+ \(pp=1\)\)"
    ):
        compose_plan(["model=nemotron4_340b", "gpu=h100", "mapping.offload_layers=1"])


def test_what_was_asked_for_is_never_dropped() -> None:
    plan = compose_plan(
        ["model=nemotron4_340b", "gpu=gb200", "mapping.tp=8", "mapping.pp=4", "mapping.fsdp=true"]
    )
    assert plan.mapping.fsdp and not any(
        "dropped" in note for note in summary(plan, check_data(plan))["layout"]["changed"]
    )
