"""What may be compared, and what does a pair of runs differ in beside precision?

Two runs are compared that saw the same batches and were planned to train alike but for precision.
Another layout (number of GPUs, mapping), stack or GPU leaves the loss as it should be, but not the
speed.  A pair of one layout is an iso-mapping one, the others are best-mapping, and say what
differs. Whatever else differs in what the runs computed with is refused or named by its consequence
(analysis/runs/effects.py).  What a manifest does not record is not proved to be the same: without
the hashes of the batches nothing is compared, and everything else that it lacks is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.runs.effects import MANIFEST_FIELDS, Effect, entry_effect, plan_effect
from analysis.runs.load import Run
from recipes.data.files import SPLITS, blend
from recipes.errors import InputError
from recipes.gpu_record import UNKNOWN
from recipes.manifest_record import ENVIRONMENT, ENVIRONMENT_BEFORE, is_looked_at
from recipes.overlap import overlaps_tp
from recipes.plan import Plan
from recipes.run_folder import differences, flatten

LAYOUT = ("num_gpus", "mapping.")
PLATFORM = ("stack", "gpu")
UNSET = "unset"
TRAIN, HELDOUT = SPLITS
# By how much two printed learning rates may differ for their digits alone (four significant ones,
# each rounded).
PRINTED = 2e-3
# What a manifest should record of a run, by where it matters: everywhere, on a GPU, on several,
# with tokens that are not hashed whole.
EVERYWHERE = (
    "code",
    "device",
    "environment",
    "versions.nemo-toolkit",
    "versions.megatron-core",
    "versions.torch",
    "versions.numpy",
)
ON_A_GPU = (
    *("attention", "cudnn.torch", "cudnn.transformer_engine"),
    *(
        f"versions.{name}"
        for name in ("transformer-engine", "cuda", "cublaslt", "flash-attn", "triton")
    ),
)
ON_SEVERAL = ("versions.nccl",)
OF_INDEXED = ("data.sampled_sha256", "data.tokenizer_sha256")


@dataclass(frozen=True)
class Differences:
    """What two runs computed with otherwise, beside precision, layout, stack and GPU: "key base's →
    candidate's".

    `named`: the loss may move for it.  `speed`: step time alone.
    """

    named: tuple[str, ...] = ()
    speed: tuple[str, ...] = ()


def flat(plan: Plan) -> dict[str, Any]:
    """Return a plan's fields by dotted key; what older plans leave open stands as it was run."""
    return {**flatten(plan.model_dump()), "mapping.tp_overlap": overlaps_tp(plan)}


def plan_differences(a: Run, b: Run) -> list[str]:
    """Return the keys in which two plans differ and for which a number may move.

    The tolerance moves none.
    """
    return [
        key
        for key in differences(flat(a.plan), flat(b.plan))
        if plan_effect(key) not in (Effect.NONE, Effect.TOLERANCE)
    ]


def _plan_keys(a: Run, b: Run, *effects: Effect) -> list[str]:
    return [key for key in differences(flat(a.plan), flat(b.plan)) if plan_effect(key) in effects]


def layout_label(base: Run, candidate: Run) -> str:
    """Return "iso-mapping", or "best-mapping" with the layout keys that differ."""
    return mapping_label(_with_values(base, candidate, plan_differences(base, candidate)))


def mapping_label(differing: Sequence[str]) -> str:
    """Return the label of a pair whose plans differ in these keys, each with its values."""
    layout = [each for each in differing if each.startswith(LAYOUT)]
    return f"best-mapping ({', '.join(layout)})" if layout else "iso-mapping"


def platform_differences(base: Run, candidate: Run) -> list[str]:
    """Return whether stack and GPU differ.

    Their names, or the keys with their values where the names are the same.
    """
    keys, found = _plan_keys(base, candidate, Effect.PLATFORM), list[str]()
    for part in PLATFORM:
        theirs = [key for key in keys if key.startswith(f"{part}.")]
        named = [f"{part}.name"] if f"{part}.name" in theirs else theirs
        found += [text.replace(".name ", " ", 1) for text in _with_values(base, candidate, named)]
    return found


def precision_differences(base: Run, candidate: Run) -> list[str]:
    """Return what was asked to differ, with the candidate's values."""
    return _with_values(base, candidate, _plan_keys(base, candidate, Effect.ASKED))


def run_differences(base: Run, candidate: Run) -> Differences:
    """Return what else the runs computed with otherwise, as plans and manifests show it."""
    found: dict[Effect, list[str]] = {
        effect: _with_values(base, candidate, _plan_keys(base, candidate, effect))
        for effect in (Effect.NAMED, Effect.SPEED)
    }
    recorded = recorded_differences(base, candidate)
    return Differences(
        (*found[Effect.NAMED], *recorded.named), (*found[Effect.SPEED], *recorded.speed)
    )


def recorded_differences(base: Run, candidate: Run) -> Differences:
    """Return the same of what manifests record alone, and of the variables that plans set."""
    found: dict[Effect, list[str]] = {Effect.NAMED: [], Effect.SPEED: []}
    variables = {*base.plan.cluster.environment, *candidate.plan.cluster.environment}
    for effect, text in _session_differences(
        *(_facts(run, run.manifest, variables) for run in (base, candidate))
    ):
        found[effect].append(text)
    return Differences(
        tuple(found[Effect.NAMED]), (*found[Effect.SPEED], *_gpu_differences(base, candidate))
    )


def continued_otherwise(run: Run) -> list[str]:
    """Return what an earlier session of a run computed with otherwise than the last, and what is
    not recorded of one.
    """
    found = list[str]()
    for session in run.manifest.get("before") or []:
        if not session:
            found.append("a session of which nothing is recorded")
        found += [
            text
            for effect, text in _session_differences(
                _facts(run, session), _facts(run, run.manifest)
            )
            if effect is Effect.NAMED
        ]
    return list(dict.fromkeys(found))


def recorded(runs: Iterable[Run]) -> list[str]:
    """Return what the manifest of one of the runs at least records."""
    return list(dict.fromkeys(key for run in runs for key in _facts(run, run.manifest)))


def not_recorded(run: Run, beside: Iterable[str] = ()) -> list[str]:
    """Return what a run's manifest does not record though a number may move for it.

    `beside`: what those of runs beside it record (`recorded`).
    """
    own = _facts(run, run.manifest)
    wanted = [*EVERYWHERE, *_wanted_here(run), *filter(_is_compared, beside)]
    lacking = [key for key in dict.fromkeys(wanted) if key not in own]
    lacking += [f"data.sha256 of {name}" for name in _unhashed_files(run, HELDOUT)]
    if "environment" in own and not {*ENVIRONMENT} <= {*(seen := _patterns(run.manifest))}:
        lacking.append(
            "environment beyond"
            f" {', '.join(each for each in seen if not each.startswith('SLURM_'))}"
        )
    if _has_unknown_changes(run):
        lacking.append("code (its uncommitted changes)")
    return lacking


def unproved_of(runs: Sequence[Run]) -> list[str]:
    """Return what the manifest of one of the runs at least does not record."""
    known = recorded(runs)
    return list(dict.fromkeys(what for run in runs for what in not_recorded(run, known)))


def _wanted_here(run: Run) -> list[str]:
    on_gpus = [] if run.plan.on_cpu else [*ON_A_GPU, *(ON_SEVERAL if run.plan.num_gpus > 1 else ())]
    return [*on_gpus, *(OF_INDEXED if run.plan.data.kind == "indexed" else ())]


def _is_compared(key: str) -> bool:
    """Whether a fact that one run records should be recorded of another.

    Not single variables, nor what moves no number.
    """
    whole = not key.startswith("environment.") and key not in OF_INDEXED
    return whole and (
        key in ("code", "environment")
        or (MANIFEST_FIELDS.get(key) or entry_effect(key)) is not Effect.NONE
    )


def check_pair(base: Run, candidate: Run) -> None:
    """Raise InputError where two runs cannot be compared."""
    refused = _plan_keys(base, candidate, Effect.REFUSED)
    if refused:
        what = ", ".join(_with_values(base, candidate, refused))
        raise InputError(
            f"{candidate.folder} and {base.folder} differ in more than precision, layout, stack and"
            f" GPU: {what}; compare runs of one experiment"
        )
    if tolerance := _plan_keys(base, candidate, Effect.TOLERANCE):
        what = ", ".join(_with_values(base, candidate, tolerance))
        raise InputError(
            f"{candidate.folder} and {base.folder} were planned with different tolerances: {what};"
            " a comparison has one, which is set before its runs: compare runs of one tolerance"
        )
    if base.imported or candidate.imported:
        _check_imported(base, candidate)
    _check_batches(base, candidate)


def _check_batches(base: Run, candidate: Run) -> None:
    """Raise InputError where manifests do not show that both runs saw the same batches."""
    for run in (base, candidate):
        if lacking := _unhashed(run):
            raise InputError(
                f"{run.folder}: its manifest has no hash of {lacking}, so nothing proves that it"
                " saw the batches that the other run saw; run it again"
            )
    sampled = [_hashes(run, "sampled_sha256") for run in (base, candidate)]
    ours, theirs = (
        {name: value for name, value in _hashes(run).items() if value} for run in (base, candidate)
    )
    apart = {
        "order_sha256": _order(base) != _order(candidate),
        "data": any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys())
        or (all(sampled) and sampled[0] != sampled[1]),
    }
    for key, what in (("order_sha256", "the order of the batches"), ("data", "the data")):
        if apart[key]:
            raise InputError(
                f"{candidate.folder} and {base.folder} differ in {what} ({key} in their manifests):"
                " their losses are not comparable"
            )


def _unhashed(run: Run) -> str | None:
    """Return which hash of a run's batches its manifest lacks; an imported log is vouched for."""
    if run.imported or run.plan.data.kind == "mock":
        return None
    if not _order(run):
        return "the order of its batches (order_sha256)"
    lacking = _unhashed_files(run, TRAIN)
    return f"its data (data.sha256 of {lacking[0]})" if lacking else None


def _unhashed_files(run: Run, split: str) -> list[str]:
    """Return which files of a split have no hash in a run's manifest.

    Random tokens have no files.
    """
    data, hashes = run.plan.data, _hashes(run)
    try:
        indexed = (
            blend(data.train if split == TRAIN else data.heldout) if data.kind == "indexed" else []
        )
    except ValueError as error:
        raise InputError(f"{run.folder / 'plan.json'}: data.{split} {error}") from None
    files = [f"{split}.bin"] if data.kind == "text" else [f"{prefix}.idx" for _, prefix in indexed]
    return [name for name in files if not hashes.get(name)]


def _order(run: Run) -> str | None:
    return run.manifest.get("order_sha256") or None


def _hashes(run: Run, key: str = "sha256") -> dict[str, str]:
    """Return the hashes of a run's data by file; {} where there are none."""
    return dict((run.manifest.get("data") or {}).get(key) or {})


def _check_averages(base: Run, candidate: Run) -> None:
    """A mean over ten steps and the tenth step's own loss differ by the noise between batches."""
    means = {run.imported.get("averaged"): run.folder for run in (base, candidate)}
    intervals = {
        every for run in (base, candidate) for _, _, every in run.imported.get("stretches") or []
    }
    if {True, False} <= means.keys() and max(intervals, default=1) > 1:
        raise InputError(
            f"{means[True]} holds means over its logging interval, {means[False]} single steps'"
            " losses: they are not comparable; import both from one kind of source"
        )


def _check_imported(base: Run, candidate: Run) -> None:
    """An imported log proves neither the batches nor the schedule.

    The first must be vouched for, the second must not be refuted.
    """
    for run in (base, candidate):
        if "loss" not in run.steps:
            raise InputError(
                f"{run.folder}: its log holds no loss, which is what is compared; import one that"
                " does"
            )
        if not run.manifest.get("order_sha256"):
            raise InputError(
                f"{run.folder}: nothing in the imported log shows which batches it saw; "
                "if both runs saw the same, import them again with one --same-data NAME"
            )
    _check_averages(base, candidate)
    if not np.array_equal(base.steps["step"], candidate.steps["step"]):
        raise InputError(
            f"{candidate.folder} and {base.folder} were logged at different steps; their losses are"
            " no pairs; import logs of one interval"
        )
    rates = [run.steps.get("lr") for run in (base, candidate)]
    if rates[0] is not None and rates[1] is not None:
        apart = np.flatnonzero(
            ~np.isclose(rates[0], rates[1], rtol=PRINTED, atol=0, equal_nan=True)
        )
        if apart.size:
            step = int(base.steps["step"][apart[0]])
            raise InputError(
                f"{candidate.folder} and {base.folder} differ in the learning rate from step {step}"
                " on: their losses are not comparable"
            )


def asserted(run: Run) -> list[str]:
    """Return what a comparison with this run rests on that is asserted, not proved.

    [] for a run of this project.
    """
    return [str(what) for what in run.imported.get("asserted", [])]


# What sessions computed with


def _facts(run: Run, session: Mapping[str, Any], variables: Iterable[str] = ()) -> dict[str, Any]:
    """Return what a session of a run computed with, by dotted key; what its record (the manifest:
    the last one's) lacks has no key.

    `environment` holds the patterns of the variables that are known, set or not; `code` what tells
    its identity.  Of `variables` that the record did not look at, the plan says whether they are
    set.
    """
    facts: dict[str, Any] = {
        key: session[key] for key in ("device", "attention") if session.get(key)
    }
    for part in ("versions", "cudnn"):
        facts |= {f"{part}.{name}": value for name, value in (session.get(part) or {}).items()}
    code, data = session.get("code") or {}, session.get("data") or {}
    facts |= {"code": code} if code.get("sha256") or code.get("commit") else {}
    facts |= {key: data[field] for key in OF_INDEXED if data.get(field := key.partition(".")[2])}
    looked_at, planned = _patterns(session), run.plan.cluster.environment
    unseen = [name for name in variables if not is_looked_at(name, looked_at)]
    values = {
        **{name: planned[name] for name in unseen if name in planned},
        **(session.get("environment") or {}),
    }
    facts |= {"environment": [*looked_at, *unseen]} if looked_at or unseen else {}
    return facts | {f"environment.{name}": value for name, value in values.items()}


def _patterns(found: Mapping[str, Any]) -> list[str]:
    """Return which variables were looked at, as patterns; [] where none were."""
    return (
        []
        if found.get("environment") is None
        else list(found.get("environment_looked_at") or ENVIRONMENT_BEFORE)
    )


def _session_differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[Effect, str]]:
    """Yield in what two sessions' facts differ, with the effect.

    What one of them did not record is no difference.
    """
    if "code" in a and "code" in b and (text := _code_difference(a["code"], b["code"])):
        yield MANIFEST_FIELDS["code.commit"], text
    for key in sorted({*a, *b} - {"code", "environment", "data.sampled_sha256"}):
        ours, theirs, effect = (
            _value(key, a),
            _value(key, b),
            MANIFEST_FIELDS.get(key) or entry_effect(key),
        )
        if ours is not None and theirs is not None and ours != theirs and effect is not Effect.NONE:
            yield effect, f"{key} {_short(key, ours)} → {_short(key, theirs)}"


def _value(key: str, facts: dict[str, Any]) -> str | None:
    """Return a fact as text.

    None where it was not recorded, but UNKNOWN of a variable, which the other's record names.
    """
    if key in facts:
        return "not installed" if facts[key] is None else str(facts[key])
    if key.startswith("environment."):
        return (
            UNSET if is_looked_at(key.partition(".")[2], facts.get("environment", ())) else UNKNOWN
        )
    return None


def _short(key: str, value: str) -> str:
    return value[:7] if key.endswith("sha256") else value


def _code_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Return in what code differs: its commit, its files, or that one has uncommitted changes.

    None where nothing shows that it does.
    """
    named = [_named_code(code) for code in (a, b)]
    hashes, commits = (
        [str(code.get(key) or "") for code in (a, b)] for key in ("sha256", "commit")
    )
    if all(commits) and not _is_same_commit(*commits):
        same_files = all(hashes) and hashes[0] == hashes[1]
        return f"code.commit {named[0]} → {named[1]}" + (
            " (the same files in recipes/)" if same_files else ""
        )
    if all(hashes):
        return (
            None
            if hashes[0] == hashes[1]
            else f"code.sha256 {hashes[0][:7]} → {hashes[1][:7]} (commit {named[0]} → {named[1]})"
        )
    return (
        f"code.commit {named[0]} → {named[1]}"
        if all(commits) and bool(a.get("dirty")) != bool(b.get("dirty"))
        else None
    )


def _is_same_commit(a: str, b: str) -> bool:
    """Whether two commits are one.

    Earlier manifests hold the first digits alone, seven at least.
    """
    short, whole = sorted((a, b), key=len)
    return short == whole or (len(short) >= 7 and len(whole) == 40 and whole.startswith(short))


def _named_code(code: Mapping[str, Any]) -> str:
    return f"{(code.get('commit') or 'unknown')[:7]}{' with changes' if code.get('dirty') else ''}"


def _has_unknown_changes(run: Run) -> bool:
    code = run.manifest.get("code") or {}
    return bool(code.get("commit")) and not code.get("sha256") and code.get("dirty") is not False


def _gpu_differences(base: Run, candidate: Run) -> list[str]:
    """Return how GPUs were set otherwise, where both runs recorded it.

    analysis.runs.devices compares which GPUs they were.
    """
    found = list[str]()
    for field in ("name", "driver", "power_limit_w", "max_sm_clock_mhz"):
        ours, theirs = (
            sorted(
                {gpu[field] for gpu in run.manifest.get("gpus") or [] if gpu.get(field) is not None}
            )
            for run in (base, candidate)
        )
        if ours and theirs and ours != theirs:
            found.append(
                f"gpus.{field} {', '.join(map(str, ours))} → {', '.join(map(str, theirs))}"
            )
    return found


def _with_values(base: Run, candidate: Run, keys: Sequence[str]) -> list[str]:
    a, b = flat(base.plan), flat(candidate.plan)
    return [f"{key} {a.get(key, '-')} → {b.get(key, '-')}" for key in keys]


# Sentences


def grouped(keys: Sequence[str]) -> str:
    """Return dotted keys with those of one part together: "code, versions (cuda, nccl)"."""
    parts: dict[str, list[str]] = {}
    for key in keys:
        part, _, entry = key.partition(".") if " " not in key else (key, "", "")
        parts.setdefault(part, []).extend([entry] if entry else [])
    return ", ".join(
        f"{part} ({', '.join(entries)})" if entries else part for part, entries in parts.items()
    )


def by_what(found: Iterable[tuple[str, Sequence[str]]]) -> list[tuple[tuple[str, ...], str]]:
    """Return each set of things with the names that share it, in the order in which they come.

    What has none is left out.
    """
    names: dict[tuple[str, ...], list[str]] = {}
    for name, what in found:
        if what:
            names.setdefault(tuple(what), []).append(name)
    return [(what, ", ".join(dict.fromkeys(who))) for what, who in names.items()]


def records_notes(runs: Sequence[Run]) -> list[str]:
    """Return which runs were continued with something else, and what the manifests of several leave
    unproved.
    """
    continued = by_what((run.name, continued_otherwise(run)) for run in runs)
    found = [
        f"{names}: was continued after a session with other {', '.join(what)}"
        for what, names in continued
    ]
    known = recorded(runs)
    lacking = [(run.name, not_recorded(run, known)) for run in runs]
    return [*found, *(unproved(lacking) if len(runs) > 1 else [])]


def unproved(lacking: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return what is not recorded of named runs as sentences.

    What is recorded of none of them stands there once.
    """
    of_all = (
        [
            what
            for what in lacking[0][1]
            if len(lacking) > 1 and all(what in each for _, each in lacking)
        ]
        if lacking
        else []
    )
    rest = by_what((name, [what for what in each if what not in of_all]) for name, each in lacking)
    groups = [*([(of_all, "any run")] if of_all else []), *rest]
    return [
        f"Not recorded by {names}, and so not proved to be the same: {grouped(what)}"
        for what, names in groups
    ]


def split_runs(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return the BF16 runs and the candidates; InputError where either is missing."""
    bases, candidates = [r for r in runs if r.is_base], [r for r in runs if not r.is_base]
    if not bases:
        raise InputError("none of the runs is BF16: nothing to compare with; name one")
    if not candidates:
        raise InputError("all runs are BF16: no candidate to judge; name an FP8 run")
    return bases, candidates


def base_of(candidate: Run, bases: Sequence[Run]) -> Run:
    """Return the BF16 run with the candidate's seed, and so its initial weights, that differs least
    from it; else the first.
    """
    same = [base for base in bases if base.plan.seed == candidate.plan.seed]
    return min(same, key=lambda base: _distance(base, candidate), default=bases[0])


def _distance(base: Run, candidate: Run) -> tuple[int, int]:
    """Return in how many things that move a loss two runs differ, those that refuse the pair
    first.
    """
    refused = _plan_keys(base, candidate, Effect.REFUSED, Effect.TOLERANCE)
    others = [
        key for key in plan_differences(base, candidate) if plan_effect(key) is not Effect.ASKED
    ]
    return len(refused), len(others) + len(run_differences(base, candidate).named)
