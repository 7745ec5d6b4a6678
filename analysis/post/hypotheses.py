"""Figure 4 asks for more than numbers: the post's bars dip from Llama 3 8B to 70B and are highest
at Nemotron-4 340B.

The predictor shows what its values are made of, and what they would be if one of its assumptions
were otherwise: a term hidden, a constant moved, another micro-batch, layers in BF16.  Each line is
computed, not argued, and held to the published steps of B200s; where a plan cannot run its cell is
a dash.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from analysis.predictor.calibration.fit import counted
from analysis.predictor.calibration.published_steps import rows
from analysis.predictor.constants import constants, speedup_interval
from analysis.predictor.forecast import bf16_twin, compose
from analysis.predictor.model.cost import Constants
from analysis.predictor.model.step import TERMS, predict, price
from analysis.render.table import Table
from recipes.errors import InputError
from recipes.plan import Plan

GPU = "b200"
CELL = ("precision=mxfp8", f"gpu={GPU}", "experiment=throughput")
FIRST, SECOND, HIGHEST = "llama3_8b", "llama3_70b", "nemotron4_340b"
MODELS = (FIRST, SECOND, "llama31_405b", "nemotron4_15b", HIGHEST)
TEXT = frozenset(["term", "assumption", "highest"])


@dataclass(frozen=True)
class Assumption:
    """What is taken otherwise: terms that cost nothing, factors on constants, constants set,
    overrides of the plan.
    """

    name: str
    hidden: tuple[str, ...] = ()
    factors: tuple[tuple[str, float], ...] = ()
    set_to: tuple[tuple[str, float], ...] = ()
    overrides: tuple[str, ...] = ()


ASSUMPTIONS = (
    Assumption("as predicted"),
    Assumption("data-parallel communication wholly hidden", hidden=("dp_comm",)),
    Assumption("no gaps between kernels", hidden=("launch",)),
    Assumption("gaps between kernels twice as long", factors=(("gap", 2.0),)),
    Assumption(
        "gaps twice as long, data-parallel communication hidden",
        hidden=("dp_comm",),
        factors=(("gap", 2.0),),
    ),
    Assumption("tensor-parallel communication twice as exposed", factors=(("tp_exposed", 2.0),)),
    Assumption("MXFP8 GEMMs as fast as per-tensor ones", set_to=(("mxfp8", 1.0),)),
    Assumption("no CUDA graphs", overrides=("mapping.cuda_graphs=false",)),
    Assumption("micro-batch 1", overrides=("mapping.micro_batch=1",)),
    Assumption("micro-batch 4", overrides=("mapping.micro_batch=4",)),
    Assumption(
        "first and last layer in BF16",
        overrides=(
            "settings.bf16_layers=true",
            "precision.fp8.first_layers_bf16=1",
            "precision.fp8.last_layers_bf16=1",
        ),
    ),
    Assumption(
        "FSDP alone",
        overrides=(
            "mapping.fsdp=true",
            "mapping.cuda_graphs=false",
            *(f"mapping.{size}=1" for size in ("tp", "pp", "cp", "vp", "micro_batch")),
        ),
    ),
)


def terms(model: str, assumption: Assumption) -> tuple[dict[str, float], dict[str, float]]:
    """Return seconds by term of BF16 and of MXFP8 in the same layout; InputError where the plan
    cannot run.
    """
    plan, priced = _plan(model, assumption.overrides), _moved(constants(), assumption)
    base = bf16_twin(plan)
    assert base
    bf16, fp8 = (_shown_terms(predict(each, priced).terms, assumption) for each in (base, plan))
    return bf16, fp8


def _shown_terms(found: dict[str, float], assumption: Assumption) -> dict[str, float]:
    return {name: 0.0 if name in assumption.hidden else value for name, value in found.items()}


def step_time_error(assumption: Assumption) -> float | None:
    """Return the mean relative error of the published step times of B200s under an assumption; None
    where it changes the plans.
    """
    if assumption.overrides:
        return None
    found = [row for row in rows() if row.gpu == GPU]
    priced = _moved(constants(), assumption)
    return sum(
        sum(_shown_terms(price(counted(row), priced), assumption).values()) / row.step_time_s - 1
        for row in found
    ) / len(found)


@functools.cache
def _plan(model: str, overrides: tuple[str, ...]) -> Plan:
    return compose([f"model={model}", *CELL, *overrides])


def _moved(found: Constants, assumption: Assumption) -> Constants:
    return replace(
        found,
        **{name: getattr(found, name) * factor for name, factor in assumption.factors},
        **dict(assumption.set_to),
    )


def speedup(model: str, assumption: Assumption) -> float | None:
    """Return the speedup under an assumption; None where the plan cannot run."""
    try:
        bf16, fp8 = terms(model, assumption)
    except InputError:
        return None
    return sum(bf16.values()) / sum(fp8.values())


def tables() -> list[Table]:
    """Return what the predicted values are made of, and what other assumptions would make of
    them.
    """
    return [_shares(), _assumptions()]


def _shares() -> Table:
    """Return each term's share of the BF16 step, in BF16 and in MXFP8, by model."""
    found = {model: terms(model, ASSUMPTIONS[0]) for model in MODELS}
    values, shown = [], []
    for term, what in TERMS.items():
        shares = {
            model: [part[term] / sum(bf16.values()) for part in (bf16, fp8)]
            for model, (bf16, fp8) in found.items()
        }
        if max(map(max, shares.values())) > 0.01:
            values.append(
                {
                    "term": what,
                    **{
                        f"{model}_{name}": s[i]
                        for model, s in shares.items()
                        for i, name in enumerate(("bf16", "mxfp8"))
                    },
                }
            )
            shown.append(
                {
                    "term": what,
                    **{
                        model: f"{before:.1%} → {after:.1%}"
                        for model, (before, after) in shares.items()
                    },
                }
            )
    note = (
        "Predicted: share of the BF16 step that a term takes in BF16 → in MXFP8, in the B200's"
        " layouts. What does not shrink holds the speedup down."
    )
    return Table("What the predicted speedups of figure 4 are made of", shown, values, [note], TEXT)


def _assumptions() -> Table:
    found = [_row(assumption) for assumption in ASSUMPTIONS]
    shown = [
        {
            "assumption": str(row["assumption"]),
            **{model: _shown(row[model]) for model in MODELS},
            "70B − 8B": "–" if row["dip"] is None else f"{row['dip']:+.3f}",
            "highest": str(row["highest"]),
            "published steps": (
                "–" if row["step_time_error"] is None else f"{row['step_time_error']:+.1%}"
            ),
        }
        for row in found
    ]
    return Table("What would move them", shown, found, _verdict(found), TEXT)


def _shown(value: float | str | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "–"


def _row(assumption: Assumption) -> dict[str, float | str | None]:
    found = {model: speedup(model, assumption) for model in MODELS}
    first, second = found[FIRST], found[SECOND]
    known = {model: value for model, value in found.items() if value is not None}
    dip = second - first if first is not None and second is not None else None
    highest = max(known, key=known.__getitem__) if len(known) == len(MODELS) else "–"
    return {
        "assumption": assumption.name,
        **found,
        "dip": dip,
        "highest": highest,
        "step_time_error": step_time_error(assumption),
    }


def _verdict(found: Sequence[dict[str, float | str | None]]) -> list[str]:
    """Say whether the dip and the place of the highest bar are met, and by which assumptions they
    would be.
    """
    first, second = found[0][FIRST], found[0][SECOND]
    assert isinstance(first, float) and isinstance(second, float)
    spread = speedup_interval(second)
    dips = [
        str(row["assumption"]) for row in found if isinstance(row["dip"], float) and row["dip"] < 0
    ]
    tops = [str(row["assumption"]) for row in found if row["highest"] == HIGHEST]
    met = "met" if second < first else "missed"
    return [
        (
            f"Predicted, one assumption changed at a time. The post's dip from 8B to 70B is {met}:"
            f" {first:.3f} to {second:.3f}, less than the interval of either ({spread.low:.2f} to"
            f" {spread.high:.2f} for 70B), which leaves its sign open."
            if spread.low < first < spread.high
            else (
                "Predicted, one assumption changed at a time. The post's dip from 8B to 70B is"
                f" {met}: {first:.3f} to {second:.3f}."
            )
        ),
        f"A dip appears with: {'; '.join(dips) or 'none of these'}.",
        (
            "published steps: the mean error of the published step times of B200s under the"
            " assumption; one that makes it larger is no good explanation."
        ),
        (
            f"{HIGHEST} is the highest bar, as in the post, with:"
            f" {'; '.join(tops) or 'none of these'}."
        ),
    ]
