"""A comparison as rows: one dictionary a candidate with the project's words as keys, for --json,
terminal and report.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from analysis.convergence.verdict import (
    MOST_SEEDS,
    UNDECIDED,
    SeedsVerdict,
    Verdict,
    judge,
    judge_seeds,
    limit_of,
    limits_in_nats,
)
from analysis.runs import devices
from analysis.runs.load import Run
from analysis.runs.pairing import (
    asserted,
    base_of,
    by_what,
    plan_differences,
    platform_differences,
    records_notes,
    run_differences,
    split_runs,
    unproved_of,
)
from analysis.runs.timing import Interval, loss_matched, speedup, step_time, unsteady
from analysis.stats.series import Mean


@dataclass(frozen=True)
class Comparison:
    """The BF16 runs, each pair's verdict, and that over the seeds of a recipe which has several."""

    bases: list[Run]
    verdicts: list[Verdict]
    over_seeds: list[SeedsVerdict]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row a pair, with the verdict over its recipe's seeds in it."""
        return [row(verdict, self.together(verdict)) for verdict in self.verdicts]

    @property
    def outcomes(self) -> list[str]:
        """What each recipe's evidence comes to: over seeds where there are several, else the
        pair's.
        """
        alone = [verdict.verdict for verdict in self.verdicts if not self.together(verdict)]
        return [*alone, *(seeds.verdict for seeds in self.over_seeds)]

    def together(self, verdict: Verdict) -> SeedsVerdict | None:
        """Return the verdict over seeds in which a pair counts, or the one that it repeats."""
        return next(
            (
                seeds
                for seeds in self.over_seeds
                if any(_repeats(verdict, counted) for counted in seeds.verdicts)
            ),
            None,
        )

    @property
    def runs(self) -> list[Run]:
        """All runs, BF16 first."""
        return [*self.bases, *(verdict.candidate for verdict in self.verdicts)]


def compare(runs: Sequence[Run]) -> Comparison:
    """Return the verdict on each FP8 run against the BF16 run that fits it; InputError where a pair
    cannot be compared.
    """
    bases, candidates = split_runs(runs)
    verdicts = []
    for candidate in candidates:
        base = base_of(candidate, bases)
        verdicts.append(judge(base, candidate, [other for other in bases if other is not base]))
    return Comparison(bases, verdicts, [judge_seeds(group) for group in _seed_groups(verdicts)])


def _seed_groups(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    """Return the pairs of each recipe that has several seeds, each beside BF16 of its own seed.

    Pairs that share a base or a seed are not independent, and pairs of different layouts or
    platforms are not of one recipe: such a recipe has no group.  A repeat to the last bit adds
    nothing and counts once.
    """
    by_recipe: dict[tuple[str, ...], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.base.plan.seed == verdict.candidate.plan.seed:
            key = (
                verdict.candidate.plan.precision.name,
                verdict.layout,
                *verdict.platform,
                *recipe_of(verdict),
            )
            group = by_recipe.setdefault(key, [])
            group += [] if any(_repeats(verdict, counted) for counted in group) else [verdict]
    seeds = {key: [v.candidate.plan.seed for v in group] for key, group in by_recipe.items()}
    return [group for key, group in by_recipe.items() if 1 < len(group) == len(set(seeds[key]))]


def _repeats(verdict: Verdict, counted: Verdict) -> bool:
    """Whether a pair is another one, or a repeat of its plan with its losses to the last bit."""
    candidate, other = verdict.candidate, counted.candidate
    return candidate is other or (
        verdict.base is counted.base
        and not plan_differences(candidate, other)
        and np.array_equal(candidate.steps["loss"], other.steps["loss"])
    )


def recipe_of(verdict: Verdict) -> list[str]:
    """Return in what the candidate's precision differs from BF16, without the seed."""
    return [what for what in verdict.asked if not what.startswith("seed ")]


def row(verdict: Verdict, together: SeedsVerdict | None = None) -> dict[str, Any]:
    """Return a verdict as plain values; infinite ends of intervals become None, for JSON has no
    infinity.

    Emulated FP8 has no speedup, for its step time is that of the emulation, and unsteady step times
    are none.
    """
    base, candidate, tail = verdict.base, verdict.candidate, verdict.gaps["tail"]
    faster = (
        None
        if candidate.emulated or unsteady(base) or unsteady(candidate)
        else speedup(base, candidate).wider(devices.apart(base, candidate))
    )
    matched = faster and loss_matched(base, faster, tail.nats, tail.nats.count)
    saving = None if candidate.emulated else energy_saving(base, candidate)
    matched_saving = saving and loss_matched(
        base, Interval(saving, saving, saving), tail.nats, tail.nats.count
    )
    bar = base.plan.bar
    seconds = step_time(candidate).value if "step_time_s" in candidate.steps else None
    return {
        "run": candidate.name,
        "base": base.name,
        "model": candidate.plan.model.name,
        "precision": candidate.plan.precision.name,
        "seed": candidate.plan.seed,
        "gpu": candidate.plan.gpu.name,
        "verdict": verdict.verdict,
        "verdict_by_limit": verdict.by_limit,
        "over_seeds": together and _over_seeds(together),
        "bar": {
            "decides": bar.decides,
            **{k: getattr(bar, k) for k in ("relative", "perplexity", "absolute", "tail_fraction")},
        },
        "bar_nats": limits_in_nats(bar, tail.base_loss),
        "gap_nats": {name: _mean(gap.nats) for name, gap in verdict.gaps.items()},
        "gap_relative": {name: _mean(gap.relative) for name, gap in verdict.gaps.items()},
        "heldout_gap_nats": verdict.heldout,
        "heldout_loss": None if verdict.heldout is None else candidate.heldout["heldout_loss"][-1],
        "rounding_nats": tail.rounding,
        "asserted": {run.name: asserted(run) for run in (base, candidate) if run.imported},
        "noise_floor_nats": verdict.noise_floor,
        "seed_noise_nats": verdict.seed_noise,
        "within_noise_floor": verdict.within_noise,
        "tokens_to_decide": verdict.tokens_to_decide,
        "spikes": verdict.spikes,
        "spikes_of_base": verdict.base_spikes,
        "layout": verdict.layout,
        "differs": [*verdict.asked, *verdict.platform, *verdict.differs.named],
        "differs_for_speed": list(verdict.differs.speed),
        "not_recorded": unproved_of((base, candidate)),
        "step_time_s": seconds,
        "tokens_per_s_per_gpu": _rate(candidate, seconds),
        "speedup_over_bf16": faster and _interval(faster),
        "loss_matched_speedup": matched and _interval(matched),
        "pair_gpu": devices.together(base, candidate),
        **devices.facts(candidate),
        "energy_saving_over_bf16": saving,
        "loss_matched_energy_saving": matched_saving and _interval(matched_saving),
        "labels": {
            "loss": candidate.label("loss"),
            "step_time": candidate.label("step_time"),
            "device": candidate.plan.gpu.name,
        },
    }


def _rate(run: Run, seconds: float | None) -> float | None:
    """Return tokens/s/GPU; None where the log tells no step time, or not on how many GPUs and in
    which batches it ran.
    """
    return (
        run.plan.tokens_per_step / seconds / run.plan.num_gpus if seconds and run.has_rate else None
    )


def _over_seeds(together: SeedsVerdict) -> dict[str, Any]:
    return {
        "verdict": together.verdict,
        "seeds": together.seeds,
        "gap_relative": _mean(together.gap),
        "further_seeds": together.further_seeds,
    }


def energy_saving(base: Run, candidate: Run) -> float | None:
    """Return the joules a token of `base` over those of `candidate`; None where one of them was not
    recorded.
    """
    ours, theirs = (devices.facts(run)["energy_per_token_j"] for run in (candidate, base))
    return theirs / ours if ours and theirs else None


def _mean(mean: Mean) -> dict[str, Any]:
    return {
        "value": mean.value,
        "low": _finite(mean.low),
        "high": _finite(mean.high),
        "steps": mean.count,
    }


def _interval(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "low": _finite(interval.low), "high": _finite(interval.high)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


EMULATED = (
    "FP8 is emulated: losses mean something, step times say nothing about hardware that computes"
    " FP8, so there is no speedup"
)


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share as a signed percentage."""
    return "?" if value is None else f"{value * 100:+.{digits}f}"


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return rows as the columns that people read.

    Of a precision with several seeds, each row names its seed, and a row over the seeds follows.
    """
    several, by_nvml = (
        _with_several_seeds(rows),
        any(row["energy_per_token_j"] is not None for row in rows),
    )
    lines = list[dict[str, str]]()
    for place, values in enumerate(rows):
        cells = _cells(values, f" s{values['seed']}" if values["precision"] in several else "")
        lines.append(cells | _energy(values) if by_nvml else cells)
        together = values["over_seeds"]
        if together and not any(later["over_seeds"] == together for later in rows[place + 1 :]):
            lines.append(
                dict.fromkeys(lines[-1], "") | _cells_over_seeds(values["precision"], together)
            )
    return lines


def _cells_over_seeds(precision: str, together: dict[str, Any]) -> dict[str, str]:
    gap, count = together["gap_relative"], len(together["seeds"])
    return {
        "precision": precision,
        "verdict": together["verdict"],
        "seeds": str(count),
        "gap %": percent(gap["value"]),
        "interval": f"{percent(gap['low'])} to {percent(gap['high'])}",
    }


def _energy(values: dict[str, Any]) -> dict[str, str]:
    """Return joules a token, and how often they fit into BF16's, as they are and to an equal
    loss.
    """
    saving, matched = values["energy_saving_over_bf16"], values["loss_matched_energy_saving"]
    return {
        "J/token": devices.per_token(values).replace("–", "-"),
        "energy": "-" if saving is None else f"{saving:.2f}x",
        "energy, matched": "-" if matched is None else f"{matched['value']:.2f}x",
    }


def _with_several_seeds(rows: Sequence[dict[str, Any]]) -> set[str]:
    return {
        name
        for name, number in Counter(
            name for name, _ in {(row["precision"], row["seed"]) for row in rows}
        ).items()
        if number > 1
    }


def _cells(values: dict[str, Any], seed: str) -> dict[str, str]:
    tail = values["gap_relative"]["tail"]
    matched, faster, heldout = (
        values["loss_matched_speedup"],
        values["speedup_over_bf16"],
        values["heldout_gap_nats"],
    )
    return {
        "precision": values["precision"] + seed,
        "verdict": values["verdict"],
        "seeds": "1",
        "gap %": percent(tail["value"]),
        "interval": f"{percent(tail['low'])} to {percent(tail['high'])}",
        "held-out": "-" if heldout is None else f"{heldout:+.4f}",
        "step s": (
            "-"
            if values["step_time_s"] is None
            else f"{values['step_time_s']:.3f}{devices.mark(values)}"
        ),
        "speedup": "-" if faster is None else f"{faster['value']:.2f}x",
        "matched": "-" if matched is None else f"{matched['value']:.2f}x",
    }


def headline(rows: Sequence[dict[str, Any]]) -> str:
    """Return what the columns mean: window, bar, noise floor and labels, which rows may differ
    in.
    """
    values = rows[0]
    bar, floor, device = values["bar"], values["noise_floor_nats"], values["labels"]["device"]
    loss = values["bar_nats"]["relative"] / bar["relative"]
    seeds = "no second BF16 seed" if floor is None else f"BF16 seeds lie {floor / loss:.2%} apart"
    interval = "interval: 99.5 % of one pair" + (
        ", 95 % over seeds" if any(row["over_seeds"] for row in rows) else ""
    )
    window = (
        f"loss ({_labels(rows, 'loss')}) against BF16 over the last {bar['tail_fraction']:.0%} of"
        " the run"
    )
    layouts = _grouped(rows, lambda row: row["layout"].split(" (")[0])
    energy = any(row["energy_per_token_j"] is not None for row in rows)
    parts = [
        f"{values['model']} on {values['gpu']}, {layouts}: {window}",
        f"tolerance ±{bar[bar['decides']]:g} ({bar['decides']}), {seeds}",
        interval,
        "held-out gap in nats",
        f"step time {_labels(rows, 'step_time')} on {device}",
        "matched: speedup to an equal loss",
        *(["energy: BF16's joules over the recipe's"] if energy else []),
        *(["s1: seed 1"] if _with_several_seeds(rows) else []),
    ]
    return "; ".join(parts)


def _labels(rows: Sequence[dict[str, Any]], what: str) -> str:
    return _grouped(rows, lambda row: str(row["labels"][what]))


def _grouped(rows: Sequence[dict[str, Any]], label_of: Callable[[dict[str, Any]], str]) -> str:
    """Return the label of all rows, or each label with the precisions that bear it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(label_of(row), []).append(row["precision"])
    return (
        next(iter(found))
        if len(found) == 1
        else "; ".join(
            f"{label}: {', '.join(dict.fromkeys(names))}" for label, names in found.items()
        )
    )


def terminal_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table for the terminal, with what they mean above it."""
    table = Table(
        title=escape(headline(rows)),
        title_justify="left",
        title_style="",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    lines = shown(rows)
    for column in lines[0]:
        table.add_column(
            column, justify="left" if column in ("precision", "verdict") else "right", no_wrap=True
        )
    for line in lines:
        colour = {"pass": "green", "fail": "red"}.get(line["verdict"], "yellow")
        table.add_row(
            *(f"[{colour}]{v}[/]" if k == "verdict" else escape(v) for k, v in line.items())
        )
    return table


def notes(verdict: Verdict) -> list[str]:
    """Return what a reader should know of a verdict beside its row, as sentences."""
    said, name = list[str](), verdict.candidate.name
    if verdict.tokens_to_decide is not None:
        said.append(
            f"{name}: undecided; about {verdict.tokens_to_decide:,.0f} more tokens would decide it"
            " if the gap stays as it is"
        )
    elif verdict.verdict == UNDECIDED:
        said.append(f"{name}: undecided; {_why_open(verdict)}")
    moved = not verdict.candidate.emulated and [
        f"of {run.name} {why}"
        for run in (verdict.candidate, verdict.base)
        if (why := unsteady(run))
    ]
    if moved:
        said.append(f"{name}: no speedup, since {moved[0]}")
    elif not verdict.candidate.emulated:
        said += devices.notes([(name, devices.together(verdict.base, verdict.candidate))])
    if verdict.spikes > verdict.base_spikes:
        said.append(f"{name}: {verdict.spikes} loss spike(s), BF16 {verdict.base_spikes}")
    if verdict.base.plan.seed != verdict.candidate.plan.seed:
        said.append(f"{name}: its seed differs from its base's; the gap includes seed noise")
    return [*said, *_imports(verdict)]


def _imports(verdict: Verdict) -> list[str]:
    """Return what a verdict on imported logs rests on, and how fine it can be."""
    said = list[str]()
    for run in (verdict.base, verdict.candidate):
        if run.imported:
            what = ", ".join(asserted(run))
            said.append(
                f"{run.name}: imported from a {run.imported.get('format', 'log')}; asserted, not"
                f" proved: {what} ({run.manifest.get('order_sha256')})"
            )
    tail = verdict.gaps["tail"]
    if tail.rounding:
        digits = min(
            d for run in (verdict.base, verdict.candidate) if (d := run.imported.get("loss_digits"))
        )
        said.append(
            f"{verdict.candidate.name}: losses were printed with {digits} digits; the interval is"
            f" ±{tail.rounding:.2g} nats ({tail.rounding / tail.base_loss:.2%}) wider for that"
        )
    return said


def _why_open(verdict: Verdict) -> str:
    gap = verdict.gaps["tail"]
    if verdict.within_noise:
        noise = (verdict.seed_noise or 0.0) / gap.base_loss
        return (
            "the gap is outside the tolerance, but BF16 with another seed could be as far away (up"
            f" to {noise:.2%}): compare more seeds, or train longer or with a lower learning rate"
        )
    if not math.isfinite(gap.nats.half_width):
        return "too few steps for an interval: run longer"
    limit = limit_of(verdict)
    if gap.rounding and abs(limit - abs(gap.nats.value)) <= gap.rounding:
        return (
            f"the losses were printed with too few digits (±{gap.rounding:.2g} nats): import"
            " TensorBoard's events or W&B's history"
        )
    if abs(gap.nats.value) + gap.nats.half_width <= limit:
        return "the tail lies inside the tolerance but its end outside: run longer"
    if gap.wanders:
        return (
            f"the gap wanders as slowly as the tail is long (probability {gap.nats.slow:.0%}), so"
            " its mean says little: compare more seeds, or run longer"
        )
    return (
        "the gap lies at the tolerance itself, no reasonable length of run would settle it: compare"
        " more seeds"
    )


def pair_notes(found: Comparison) -> list[str]:
    """Return what the runs of pairs differ in beside precision, and what nothing proves to be the
    same, each thing once.
    """
    verdicts, (first, *others) = found.verdicts, found.bases
    moved = by_what((v.candidate.name, [*v.platform, *v.differs.named]) for v in verdicts)
    lines = [
        f"{names}: not only precision differs from BF16, but also {', '.join(what)}"
        for what, names in moved
    ]
    seeds = by_what(
        (other.name, [*platform_differences(first, other), *run_differences(first, other).named])
        for other in others
    )
    lines += [
        f"{names}: not only the seed differs from {first.name}, but also {', '.join(what)}"
        for what, names in seeds
    ]
    timed = by_what(
        (v.candidate.name, v.differs.speed) for v in verdicts if not v.candidate.emulated
    )
    lines += [f"{names}: step time may differ for {', '.join(what)} too" for what, names in timed]
    return [
        *lines,
        *records_notes(found.runs),
        *devices.shared_notes(run for run in found.runs if not run.emulated),
    ]


def all_notes(found: Comparison) -> list[str]:
    """Return the notes on every verdict, and what holds for all."""
    emulated = [
        verdict.candidate.plan.precision.name
        for verdict in found.verdicts
        if verdict.candidate.emulated
    ]
    lines = [f"{', '.join(dict.fromkeys(emulated))}: {EMULATED}"] if emulated else []
    lines += [note for verdict in found.verdicts for note in notes(verdict)]
    lines += [note for seeds in found.over_seeds for note in _seed_notes(seeds)]
    lines += pair_notes(found)
    lines += [
        f"{again.candidate.folder}: repeats {first.candidate.folder} to the last bit, and counts"
        " once over seeds"
        for again, first in _repeated(found)
    ]
    if not all(found.together(verdict) for verdict in found.verdicts):
        lines.append(ONE_SEED)
    return lines


def _repeated(found: Comparison) -> list[tuple[Verdict, Verdict]]:
    """Return each pair that does not count over seeds, with the one that it repeats."""
    return [
        (verdict, counted)
        for seeds in found.over_seeds
        for counted in seeds.verdicts
        for verdict in found.verdicts
        if verdict is not counted and _repeats(verdict, counted)
    ]


ONE_SEED = (
    "1 seed: the verdict is about this pair of runs; a statement about the recipe needs several"
    " seeds of it beside BF16 of the same seeds"
)


def _seed_notes(together: SeedsVerdict) -> list[str]:
    """Return what an undecided verdict over seeds needs; nothing for a decided one."""
    if together.verdict != UNDECIDED:
        return []
    name, count = together.verdicts[0].candidate.plan.precision.name, len(together.seeds)
    more = together.further_seeds
    needs = f"about {more} more would decide" if more else f"more than {MOST_SEEDS} would be needed"
    return [f"{name}: undecided over {count} seeds; {needs} if mean and spread stay as they are"]
