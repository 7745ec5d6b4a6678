"""`python -m analysis.import_logs SOURCE… --out RUN --set model=… gpu=…`: a run folder from what
you have.

Sources, told by their content (docs/imports.md lists what each gives): console logs of NeMo 1 and
2, Megatron-LM, Megatron-Bridge, Megatron-DeepSpeed, torchtitan and ten more harnesses (also .gz,
.bz2, .xz, .zst), TensorBoard event files or their folder and its downloads, W&B offline runs,
exports and API rows, DLLogger's files, Hugging Face's trainer_state.json, CSV. Several sources are
one run: the parts of a log that was continued, in their order.

The log is asked first: what it states is taken from it, and a --set that says otherwise is refused.
What it does not state is stated with --set, as for `python -m launch`; what nothing can show is
vouched for: --same-data NAME (two runs with one NAME saw the same batches) and --assert-fp8.  A
comparison says which of its grounds are asserted, and is no finer than the digits that a log was
printed with.

Exit code 0 if a run folder was written, also for a run that is not sound, which analysis.compare
then refuses; 2 for an input that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.importers.checks import refuse_impossible
from analysis.importers.detect import FORMATS, Options, read
from analysis.importers.folder import Vouched, add_step_times, write
from analysis.importers.log import Log, settle
from analysis.importers.planning import NAME, SCALE, Planned, plan_of
from analysis.importers.records import Vocabulary
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError, one_line
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.run_folder import flatten


def run(args: argparse.Namespace) -> int:
    """Import the sources and say what was found; return the exit code."""
    out: Path = args.out
    if out.exists() or out.is_symlink():
        raise InputError(
            f"{out} exists; an import writes a new run folder; choose another --out or remove it"
        )
    if args.same_data is not None and not NAME.fullmatch(args.same_data):
        raise InputError(
            "--same-data takes a name of letters, digits, '.', '_' and '-'; two runs with one name"
            " saw the same batches"
        )
    log, files = read(args.sources, args.format, Options(args.run, Vocabulary(args.loss_key)))
    log = settle(log)
    planned = plan_of(log, args.set, out)
    plan = planned.plan
    vouched = Vouched(args.same_data, args.assert_fp8, args.label)
    if vouched.fp8 and plan.precision.fp8 is None:
        raise InputError(
            f"--assert-fp8 says that FP8 ran, the plan precision={plan.precision.name}; set the"
            " precision that ran, or leave it out"
        )
    add_step_times(log, planned)
    refuse_impossible(log, planned)
    reason = write(out, log, planned, files, vouched)
    for line in _summary(out, log, planned, vouched, reason):
        print(one_line(line))
    return 0


def _summary(out: Path, log: Log, planned: Planned, vouched: Vouched, reason: str) -> list[str]:
    plan, steps = planned.plan, log.steps["step"]
    lines = [
        f"{out}: {steps.size:,} training lines to step {int(steps[-1]):,},"
        f" {len(log.heldout.get('step', ()))} held-out losses, {log.format}"
    ]
    if log.test:
        lines.append(
            f"note: {len(log.test['step'])} loss(es) on a test set are kept in manifest.json, apart"
            " from held-out losses"
        )
    lines += [f"note: {said}" for said in log.said]
    lines += _asked(planned)
    for key, lost in (
        ("loss", "losses cannot be compared"),
        ("step_time_s", "tables of throughput leave it out"),
    ):
        if key not in log.steps:
            lines.append(
                f"note: the log holds no {key.replace('_s', '').replace('_', ' ')}: {lost}"
            )
    if reason:
        lines.append(f"note: not a sound run: {reason}; analysis.compare will refuse it")
    if vouched.same_data is None:
        lines.append(
            "note: nothing says which batches it saw; comparing it needs --same-data NAME on both"
            " runs"
        )
    if plan.precision.fp8 and not vouched.fp8 and "fp8_gemms" not in log.steps:
        lines.append(
            "note: nothing shows that FP8 ran; comparing it needs --assert-fp8, if you know that"
            " it did"
        )
    return lines


def _asked(planned: Planned) -> list[str]:
    """Return what the log does not state, and what to do about it."""
    values = flatten(planned.plan.model_dump())
    on_cpu = planned.plan.on_cpu  # where there is no layout, and no rate that a table would have
    unknown = [key for key in SCALE if key in planned.assumed and not on_cpu]
    filled = [key for key in planned.assumed if key not in SCALE]
    if on_cpu:
        filled = [key for key in planned.assumed if key in ("mapping.global_batch", "seq_length")]
    layout = [f"{key.removeprefix('mapping.')}={values[key]}" for key in filled]
    said = []
    if layout:
        said.append(
            f"note: the log does not state {', '.join(layout)}: taken from the model and its"
            " recommended layout; name what ran with --set"
        )
    if unknown:
        ask = " ".join(f"{key}=…" for key in unknown)
        said.append(
            f"note: the log does not state {' and '.join(unknown)}, so tables have no rate per GPU;"
            f" import it again with --set {ask}"
        )
    return said


def parser() -> ArgumentParser:
    """Return the command's arguments."""
    said = __doc__ or ""
    found = ArgumentParser(
        prog="python -m analysis.import_logs",
        description=said,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="log, event file, .wandb file, CSV table, or a folder of one run",
    )
    found.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="RUN",
        help="the run folder to write; must not exist",
    )
    found.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="the plan, as overrides of `python -m launch`",
    )
    found.add_argument(
        "--format", choices=FORMATS, help="what the source is (default: told by its content)"
    )
    found.add_argument("--run", metavar="NAME", help="which run of a W&B table that holds several")
    found.add_argument(
        "--loss-key",
        metavar="NAME",
        help="what the source calls the training loss: a tag, a column or a field",
    )
    found.add_argument(
        "--same-data",
        metavar="NAME",
        help="vouch that all runs imported with this name saw the same batches",
    )
    found.add_argument(
        "--assert-fp8",
        action="store_true",
        help="vouch that the run computed in FP8 as its plan says",
    )
    found.add_argument(
        "--label",
        choices=("measured", "emulated"),
        help="where the loss comes from (default: measured; emulated for FP8 on gpu=cpu)",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except InputError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return EXIT_WRONG_INPUT


if __name__ == "__main__":
    command(main)
