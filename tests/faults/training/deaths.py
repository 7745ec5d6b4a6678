"""kill -9: at any moment, while a checkpoint is written, at chosen places in the code, of one rank
of two or of both.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path

from tests.faults.registry import Outcome, fault
from tests.faults.training.process import Place, Ranks
from tests.faults.training.runs import (
    AREA,
    EQUAL,
    SAVED_EVERY,
    STEPS,
    finish,
    precision_of,
    prepared,
    step_of,
)


@fault(
    AREA,
    "kill -9 of the process at a random moment, up to three times a run, every precision",
    small=0,
    full=30,
    nemo=True,
)
def killed_at_random(count: int, folder: Path) -> Outcome:
    outcome, kills = Outcome(), 0
    for n in range(count):
        draw, precision = random.Random(n), precision_of(n)
        run = prepared(folder / f"run{n}", precision)
        for _ in range(draw.randint(1, 3)):
            ranks, step = Ranks(run), draw.randrange(STEPS)
            reached = ranks.until(lambda run=run, step=step: step_of(run) >= step)
            time.sleep(draw.random() * (0.4 if reached and step else 2.0))
            kills += ranks.alive
            ranks.kill()
            ranks.wait()
        outcome.add(EQUAL, lost=finish(run, precision))
    outcome.measured.append(f"{count} runs were killed {kills} times")
    return outcome


@fault(AREA, "kill -9 while a checkpoint is written", small=0, full=30, nemo=True)
def killed_while_saving(count: int, folder: Path) -> Outcome:
    outcome, cut = Outcome(), 0
    for n in range(count):
        draw, precision = random.Random(n), precision_of(n)
        run = prepared(folder / f"run{n}", precision)
        ranks, wanted = Ranks(run), draw.randint(1, STEPS // SAVED_EVERY)
        started: set[str] = set()

        def writes(run: Path = run, wanted: int = wanted, started: set[str] = started) -> bool:
            started |= {path.name for path in (run / "checkpoints").glob("*-unfinished")}
            return len(started) >= wanted

        ranks.until(writes)
        time.sleep(draw.random() * 0.2)
        ranks.kill()
        ranks.wait()
        cut += any((run / "checkpoints").glob("*-unfinished"))
        outcome.add(EQUAL, lost=finish(run, precision))
    outcome.measured.append(
        f"{cut} of {count} left a checkpoint that was half-written, or half-removed"
    )
    return outcome


CALLBACK, CHECKPOINTS = (
    "recipes.training.callback:RunFolderCallback",
    "recipes.training.checkpoints:Checkpoints",
)
PLACES = [
    Place(
        "recipes.training.checkpoints:_record", 1
    ),  # the first checkpoint: whole but for its record
    Place(
        f"{CHECKPOINTS}.remove_checkpoint_unfinished_marker", 2
    ),  # recorded, still marked as unfinished
    Place(f"{CALLBACK}.on_validation_end", 1),  # evaluated, not written
    Place("recipes.training.callback:set_status", 2),  # all is written but that it is done
    Place(f"{CHECKPOINTS}._remove_checkpoint", 1),  # the third is whole, the first is still there
    Place(
        "lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint._remove_checkpoint", 1
    ),  # marked for removal
    Place("recipes.training.checkpoints:_record", 3),
    Place(
        f"{CHECKPOINTS}._save_checkpoint", 2, after=True
    ),  # saved; the evaluation that is due at that step not yet
    Place(f"{CHECKPOINTS}.on_train_end", 1),  # all steps trained, the last state not saved
    Place(f"{CHECKPOINTS}.on_train_end", 1, after=True),
    Place(f"{CALLBACK}._write", 7),  # a step trained, not written
    Place(f"{CALLBACK}._write", 8, after=True),
    Place(f"{CALLBACK}.on_train_batch_start", 1),
    Place(f"{CALLBACK}.on_train_start", 1),
    Place("recipes.training.callback:keep_until", 1),
    Place("recipes.training.callback:event", 1),
]
AGAIN = [  # places that a run passes when it is continued
    Place("recipes.training.callback:keep_until", 1),
    Place("recipes.training.callback:keep_until", 1, after=True),
    Place("recipes.training.checkpoints:Strategy.load_checkpoint", 1, after=True),
    Place(f"{CHECKPOINTS}.nemo_topk_check_previous_run", 1),
    Place("nemo.lightning.pytorch.callbacks:ModelCheckpoint._remove_unfinished_checkpoints", 1),
    Place(f"{CALLBACK}._lacks_evaluation", 1, after=True),
]


@fault(
    AREA,
    "kill -9 at places in the code that a clock does not hit: around saving, evaluating, writing,"
    " ending, continuing",
    small=1,
    full=48,
    nemo=True,
)
def killed_at_places(count: int, folder: Path) -> Outcome:
    """The first death at one of PLACES; where the run is continued it dies again, at one of AGAIN,
    before it may come to its end.
    """
    outcome, missed = Outcome(), []
    for n in range(count):
        precision, place = precision_of(n + n // len(PLACES)), PLACES[n % len(PLACES)]
        run = prepared(folder / f"run{n}", precision)
        codes = Ranks(run, dies=place).wait()
        if codes != [-signal.SIGKILL]:
            missed.append(str(place))
        again = AGAIN[n % len(AGAIN)]
        Ranks(run, dies=again).wait()
        wrong = finish(run, precision)
        outcome.add(EQUAL, lost=wrong and f"{place}, then {again}: {wrong}")
    if missed:
        outcome.lost.append(f"never reached: {missed}")
    return outcome


@fault(
    AREA,
    "two processes: kill -9 of one rank at a random moment, or of both",
    small=0,
    full=16,
    nemo=True,
)
def killed_rank_of_two(count: int, folder: Path) -> Outcome:
    """The other rank must end by itself, with an error: in a collective, or where the ranks meet at
    the start, it would wait for ever.
    """
    outcome, came = Outcome(), Counter[str]()
    for n in range(count):
        draw, precision = random.Random(n), precision_of(n)
        run = prepared(folder / f"run{n}", precision, "train.step_timeout_s=20", processes=2)
        ranks, step, who = (
            Ranks(run, 2),
            draw.randrange(STEPS - 1),
            draw.choice([[0], [1], [0, 1]]) if n else [1],
        )
        ranks.until(lambda run=run, step=step: step_of(run) >= step)
        time.sleep(draw.random() * 0.4)
        ranks.kill(*who)
        codes = ranks.wait(300)
        wrong = (
            None
            if None not in codes
            else f"run {n}: rank {who} was killed, the other went on: {codes}"
        )
        came["both" if len(who) == 2 else f"rank {who[0]}"] += 1
        outcome.add(EQUAL, lost=wrong or finish(run, precision, 2))
    outcome.measured.append(
        f"killed: {', '.join(f'{who} {n} times' for who, n in came.most_common())}"
    )
    return outcome
