"""Run folders as arrays, and what makes one unusable.

A comparison is worth what its runs are worth, so a run is refused here, with one line that says
why, before any number is taken from it: one that has not ended, lost its end, skipped or repeated a
step, met NaN or infinity, cannot be read, or did not run in each step the FP8 GEMMs that its plan
implies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from analysis.runs.metrics import Array as Array
from analysis.runs.metrics import read_metrics
from recipes.errors import InputError, one_line
from recipes.estimate.fp8_gemms import fp8_gemms
from recipes.estimate.possible import refuse_impossible, refuse_impossible_import
from recipes.manifest_record import Manifest
from recipes.plan import Plan
from recipes.run_folder import read_json, read_plan, status_of

REQUIRED = ("step", "loss", "tokens", "step_time_s")
FEW = 2  # values of a column that may agree by chance


@dataclass(frozen=True)
class Run:
    """A sound run.

    `steps` holds a column of n values for each key of the training lines of metrics.jsonl, `step`
    included, in order; `heldout` the same for the evaluations.
    """

    folder: Path
    plan: Plan
    manifest: dict[str, Any]
    steps: dict[str, Array]
    heldout: dict[str, Array]

    @property
    def name(self) -> str:
        """The run's name, unique among the runs of a sweep."""
        return self.plan.run_name

    @property
    def imported(self) -> dict[str, Any]:
        """What analysis.import_logs recorded of a run that another tool wrote; {} for a run of this
        project.
        """
        return imported(self.manifest)

    def rounding(self) -> Array:
        """Return by how much a loss in nats may be off for the digits it was printed with, a value
        a line; 0 where it was stored whole.
        """
        loss, digits = self.steps["loss"], self.imported.get("loss_digits")
        if not digits:
            return np.zeros(loss.size)
        return np.asarray(
            0.5 * 10.0 ** (np.floor(np.log10(np.maximum(np.abs(loss), 1e-9))) + 1 - digits)
        )

    @property
    def has_rate(self) -> bool:
        """Whether tokens/s/GPU follow from the step time: not where an import had to assume what
        they depend on.
        """
        return not {"num_gpus", "mapping.global_batch"}.intersection(
            self.imported.get("assumed", [])
        )

    @property
    def is_base(self) -> bool:
        """Whether this is a BF16 run, which the others are compared with."""
        return self.plan.precision.fp8 is None

    @property
    def emulated(self) -> bool:
        """Whether its numerics were emulated, on a CPU or a GPU: its losses mean something, its
        step times nothing about FP8 in hardware.
        """
        return self.plan.emulated or "emulated" in (self.label("loss"), self.label("step_time"))

    def label(self, what: str) -> str:
        """Return where a number of this run comes from: "measured" or "emulated"; `what` is loss or
        step_time.
        """
        return str(self.manifest.get("labels", {}).get(what, "unlabelled"))


def folders_of(results: Sequence[Path]) -> list[Path]:
    """Return the run folders below folders of results."""
    return sorted(path.parent for folder in results for path in folder.rglob("plan.json"))


def once(folders: Sequence[Path]) -> list[Path]:
    """Return folders without those that are named a second time, in whatever way."""
    found: dict[Path, Path] = {}
    for folder in folders:
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def load_run(folder: Path) -> Run:
    """Return the run in `folder`; InputError with the reason where it is not sound."""
    plan = read_plan(folder)
    status = status_of(folder)
    if status != "done":
        raise InputError(f"{folder}: the run is {status}, not done; {_remedy(folder)}")
    steps, heldout = read_metrics(folder)
    run = Run(folder, plan, _manifest(folder), steps, heldout)
    for check in (_is_complete, _is_finite, _is_what_it_says):
        check(run)
    return run


def load_all(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the sound runs, each folder once, and for each of the others one line that says why it
    is left out.
    """
    runs, left_out = [], []
    for folder in once(folders):
        try:
            runs.append(load_run(folder))
        except InputError as error:
            left_out.append(str(error))
    doubtful = twins(runs)
    return [run for run in runs if run.folder not in doubtful], [*left_out, *doubtful.values()]


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in `folders`, each once; InputError where one is not sound, or two cannot
    both be.
    """
    runs = [load_run(folder) for folder in once(folders)]
    for reason in twins(runs).values():
        raise InputError(reason)
    return runs


def twins(runs: Sequence[Run]) -> dict[Path, str]:
    """Return, by folder, why a run cannot be used beside another one: they have one loss and are
    not one experiment.
    """
    found: dict[Path, str] = {}
    for key in ("loss", "heldout_loss", "grad_norm"):
        first: dict[bytes, Run] = {}
        for run in runs:
            column = (run.heldout if key == "heldout_loss" else run.steps).get(key, np.zeros(0))
            if (
                run.imported or np.unique(column).size < FEW
            ):  # a log prints few digits, and may be imported twice
                continue
            other = first.setdefault(column.tobytes(), run)
            if _decides_loss(other.plan) == _decides_loss(run.plan):
                continue
            for one, two in ((other, run), (run, other)):
                what = (
                    f"the {column.size} values of {key} are those of {two.folder}, to the last bit"
                )
                found.setdefault(
                    one.folder,
                    f"{one.folder}/metrics.jsonl: {what}, whose plan trains otherwise; one is the"
                    " other's file",
                )
    return found


def _decides_loss(plan: Plan) -> tuple[object, ...]:
    """Return what no two runs can differ in and have one loss; layouts and kernels may add up
    alike.
    """
    fp8, train = plan.precision.fp8 if fp8_gemms(plan) else None, plan.train
    recipe = (fp8.scaling, fp8.format, fp8.first_layers_bf16, fp8.last_layers_bf16) if fp8 else None
    model = plan.model.model_copy(update={"convergence": None})
    return (model, recipe, plan.seed, plan.seq_length, plan.mapping.global_batch, train.max_lr)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        return Manifest.model_validate(read_json(path)).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise InputError(
            f"{path}: {first_problem(error)}; the file was changed, what ran cannot be traced; run"
            " it again"
        ) from None
    except (OSError, ValueError):
        raise InputError(
            f"{path} is missing or no JSON object: what ran cannot be traced; run it again"
        ) from None


def first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with a file's values: where, and what."""
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"[:200]


def imported(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest says of an import, with the types that it must have; {} where it says
    nothing.
    """
    said = manifest.get("imported")
    if not isinstance(said, dict):
        return {}
    digits, interval, stretches = (
        said.get("loss_digits"),
        said.get("log_interval"),
        said.get("stretches"),
    )
    asserted, assumed, stated, memory = (
        said.get(key) for key in ("asserted", "assumed", "stated", "memory_gb")
    )
    return {
        "format": one_line(str(said.get("format", "log"))),
        "loss_digits": digits if isinstance(digits, int) and 0 < digits < 20 else None,
        "averaged": averaged if isinstance(averaged := said.get("averaged"), bool) else None,
        "log_interval": interval if isinstance(interval, int) and interval > 0 else 1,
        "stretches": stretches if _are_stretches(stretches) else None,
        "asserted": (
            [one_line(str(what)) for what in asserted] if isinstance(asserted, list) else []
        ),
        "assumed": [one_line(str(what)) for what in assumed] if isinstance(assumed, list) else [],
        "stated": sorted(map(str, stated)) if isinstance(stated, dict) else [],
        "memory_gb": memory if isinstance(memory, int | float) and memory > 0 else None,
    }


def _are_stretches(found: Any) -> bool:
    """Whether a manifest's stretches are triples of whole numbers above 0: first and last step, and
    interval.
    """
    return (
        isinstance(found, list)
        and bool(found)
        and all(
            isinstance(s, list)
            and len(s) == 3
            and all(isinstance(n, int) and 0 < n < 2**53 for n in s)
            for s in found
        )
    )


def _remedy(folder: Path) -> str:
    try:
        foreign = imported(_manifest(folder))
    except InputError:
        foreign = {}  # a run that ended before it wrote one
    if not foreign:
        return "run the same launch command again to continue it"
    return (
        f"{read_json(folder / 'status.json').get('reason') or 'its log says no more'}; import the"
        " log of a run that ended well"
    )


def _is_complete(run: Run) -> None:
    missing = [
        key for key in (("step", "tokens") if run.imported else REQUIRED) if key not in run.steps
    ]
    if missing:
        raise InputError(
            f"{run.folder}: metrics.jsonl has no {missing[0]}; the run wrote no training step"
        )
    steps, planned = run.steps["step"], run.plan.train.max_steps
    every = run.imported.get("log_interval", 1)
    stretches = run.imported.get("stretches") or [[every, planned - planned % every, every]]
    if sum((last - first) // each + 1 for first, last, each in stretches) > len(steps) + planned:
        raise InputError(
            f"{run.folder}: manifest.json has stretches of more steps than were planned; import the"
            " log again"
        )
    wanted = np.concatenate([np.arange(first, last + 1, each) for first, last, each in stretches])
    same = min(len(wanted), len(steps))
    wrong = np.flatnonzero(steps[:same] != wanted[:same])
    if wrong.size:
        raise InputError(
            f"{run.folder}: step {wanted[wrong[0]]} is missing, repeated or out of order in"
            " metrics.jsonl; run it again"
        )
    if run.heldout and "step" not in run.heldout:
        raise InputError(
            f"{run.folder}: held-out losses in metrics.jsonl have no step; the file was changed,"
            " run it again"
        )
    evaluated = run.heldout.get("step", np.zeros(0))
    if (np.diff(evaluated) <= 0).any():
        raise InputError(
            f"{run.folder}: held-out losses are repeated or out of order in metrics.jsonl; run it"
            " again"
        )
    if len(steps) != len(wanted) or steps[-1] + stretches[-1][2] <= planned:
        last = int(steps[-1]) if len(steps) else 0
        raise InputError(
            f"{run.folder}: metrics.jsonl ends at step {last} of {planned}; the run lost its end,"
            " run it again"
        )


def _is_finite(run: Run) -> None:
    for where, columns in (("", run.steps), ("held-out ", run.heldout)):
        for key in ("loss", "heldout_loss", "grad_norm", "step_time_s", "tokens"):
            bad = np.flatnonzero(~np.isfinite(columns.get(key, np.zeros(0))))
            if bad.size:
                step = int(columns["step"][bad[0]])
                raise InputError(
                    f"{run.folder}: {where}{key} is no finite number in {bad.size} step(s), first"
                    f" at step {step}; the run diverged"
                )
        for key in ("loss", "heldout_loss", "step_time_s", "tokens"):
            bad = np.flatnonzero(columns.get(key, np.ones(0)) <= 0)
            if bad.size:
                step = int(columns["step"][bad[0]])
                raise InputError(
                    f"{run.folder}: {where}{key} is not above 0 at step {step}; the file was"
                    " changed, run it again"
                )
    idle = np.flatnonzero(run.steps.get("grad_norm", np.ones(0)) == 0)
    if idle.size and not run.imported:  # a harness that does not clip prints 0
        step = int(run.steps["step"][idle[0]])
        raise InputError(
            f"{run.folder}: the gradient norm is 0 at step {step}: no gradient reached the"
            " optimizer, and nothing was trained"
        )


def _is_what_it_says(run: Run) -> None:
    """Raise InputError where nothing shows in which precision it ran, or a number in it cannot be
    true.
    """
    if not run.plan.data_parallel:
        m, gpus = run.plan.mapping, run.plan.num_gpus
        why = f"tp {m.tp} x pp {m.pp} x cp {m.cp} are more than num_gpus={gpus}"
        raise InputError(f"{run.folder / 'plan.json'}: {why}; the file was changed, run it again")
    if run.imported:
        _is_shown(run)
        refuse_impossible_import(run.folder, run.plan, run.steps, run.has_rate)
        return
    if "fp8_gemms" not in run.steps:
        raise InputError(
            f"{run.folder}: no fp8_gemms in metrics.jsonl: nothing shows in which precision it ran"
        )
    refuse_impossible(run.folder, run.plan, run.manifest, run.steps, run.heldout)


def _is_shown(run: Run) -> None:
    """Raise InputError where neither an imported log nor its user says that FP8 ran; what is said
    of a comparison tells which.
    """
    if "fp8_gemms" not in run.steps and not run.is_base and "fp8" not in run.imported["asserted"]:
        raise InputError(
            f"{run.folder}: nothing in the imported log shows that FP8 ran; import it again with"
            " --assert-fp8 if you know that it did"
        )
