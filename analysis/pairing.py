"""What may be compared: two runs that saw the same batches and differ in nothing that changes the loss but precision.

Another layout (number of GPUs, mapping), stack or GPU leaves the loss as it should be, but not the speed.  A pair of one layout is
an iso-mapping one, the others are best-mapping, and say what differs; another stack or GPU is named beside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.runs import Run
from recipes.errors import InputError
from recipes.run_folder import comparable, differences, flatten

PLACES = ("data.root", "bar.")  # where files lie, and what is judged, not what is trained
INTERVALS = ("train.eval_interval", "train.diagnostics_interval", "train.checkpoint_interval")
LAYOUT = ("num_gpus", "mapping.")
PLATFORM = ("stack", "gpu")
ASKED = ("precision.", "seed")
PRINTED = 2e-3  # by how much two printed learning rates may differ for their digits alone (four significant ones, each rounded)


def plan_differences(a: Run, b: Run) -> list[str]:
    """Return the keys in which two plans differ, apart from names, places and intervals."""
    keys = differences(comparable(a.plan), comparable(b.plan))
    return [key for key in keys if not key.startswith((*PLACES, *INTERVALS))]


def layout_label(base: Run, candidate: Run) -> str:
    """Return "iso-mapping", or "best-mapping" with the layout keys that differ."""
    return mapping_label(_with_values(base, candidate, plan_differences(base, candidate)))


def mapping_label(differing: Sequence[str]) -> str:
    """Return the label of a pair whose plans differ in these keys (each with its values): of the layout alone."""
    layout = [each for each in differing if each.startswith(LAYOUT)]
    return f"best-mapping ({', '.join(layout)})" if layout else "iso-mapping"


def platform_differences(base: Run, candidate: Run) -> list[str]:
    """Return whether stack and GPU differ: their names, or the keys with their values where the names are the same."""
    keys, found = plan_differences(base, candidate), list[str]()
    for part in PLATFORM:
        theirs = [key for key in keys if key.startswith(f"{part}.")]
        named = [f"{part}.name"] if f"{part}.name" in theirs else theirs
        found += [text.replace(".name ", " ", 1) for text in _with_values(base, candidate, named)]
    return found


def precision_differences(base: Run, candidate: Run) -> list[str]:
    """Return what was asked to differ, with the candidate's values."""
    keys = [key for key in plan_differences(base, candidate) if key.startswith(ASKED)]
    return _with_values(base, candidate, keys)


def check_pair(base: Run, candidate: Run) -> None:
    """Raise InputError where two runs cannot be compared."""
    allowed = (*ASKED, *LAYOUT, *(f"{part}." for part in PLATFORM))
    refused = [k for k in plan_differences(base, candidate) if not k.startswith(allowed) or k == "mapping.global_batch"]
    if refused:
        what = ", ".join(_with_values(base, candidate, refused))
        raise InputError(
            f"{candidate.folder} and {base.folder} differ in more than precision, layout, stack and GPU: {what}; compare runs of one experiment"
        )
    if base.imported or candidate.imported:
        _check_imported(base, candidate)
    for key, what in (("order_sha256", "the order of the batches"), ("data", "the data")):
        ours, theirs = ((_hashes(run.manifest.get(key)) if key == "data" else run.manifest.get(key)) for run in (base, candidate))
        if ours != theirs:
            raise InputError(f"{candidate.folder} and {base.folder} differ in {what} ({key} in their manifests): their losses are not comparable")


def _check_imported(base: Run, candidate: Run) -> None:
    """An imported log proves neither the batches nor the schedule: the first must be vouched for, the second must not be refuted."""
    for run in (base, candidate):
        if "loss" not in run.steps:
            raise InputError(f"{run.folder}: its log holds no loss, which is what is compared; import one that does")
        if not run.manifest.get("order_sha256"):
            raise InputError(
                f"{run.folder}: nothing in the imported log shows which batches it saw; "
                "if both runs saw the same, import them again with one --same-data NAME"
            )
    if not np.array_equal(base.steps["step"], candidate.steps["step"]):
        raise InputError(
            f"{candidate.folder} and {base.folder} were logged at different steps; their losses are no pairs; import logs of one interval"
        )
    rates = [run.steps.get("lr") for run in (base, candidate)]
    if rates[0] is not None and rates[1] is not None:
        apart = np.flatnonzero(~np.isclose(rates[0], rates[1], rtol=PRINTED, atol=0, equal_nan=True))
        if apart.size:
            step = int(base.steps["step"][apart[0]])
            raise InputError(f"{candidate.folder} and {base.folder} differ in the learning rate from step {step} on: their losses are not comparable")


def asserted(run: Run) -> list[str]:
    """Return what a comparison with this run rests on that is asserted, not proved; [] for a run of this project."""
    return [str(what) for what in run.imported.get("asserted", [])]


def _hashes(data: object) -> object:
    return data.get("sha256") if isinstance(data, dict) else data


def _with_values(base: Run, candidate: Run, keys: Sequence[str]) -> list[str]:
    a, b = (flatten(run.plan.model_dump()) for run in (base, candidate))
    return [f"{key} {a.get(key, '-')} → {b.get(key, '-')}" for key in keys]


def split_runs(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return the BF16 runs and the candidates; InputError where either is missing."""
    bases, candidates = [r for r in runs if r.is_base], [r for r in runs if not r.is_base]
    if not bases:
        raise InputError("none of the runs is BF16: nothing to compare with; name one")
    if not candidates:
        raise InputError("all runs are BF16: no candidate to judge; name an FP8 run")
    return bases, candidates


def base_of(candidate: Run, bases: Sequence[Run]) -> Run:
    """Return the BF16 run with the candidate's seed, and so its initial weights, or else the first."""
    return next((base for base in bases if base.plan.seed == candidate.plan.seed), bases[0])
