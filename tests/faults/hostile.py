"""Hostile text in run folders: HTML, scripts, markup and terminal codes in names, plan values,
logs, events and evaluations.

A page is parsed as a browser would.  It may hold no tag and no attribute that the page of harmless
runs does not hold, and no address but places within itself: then nothing of the text was taken for
more than text.
"""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from analysis import compare, report, throughput
from analysis.speed import full_depth_table
from launch import status
from recipes.plan import Plan
from tests.analysis.test_evaluation import evaluate
from tests.faults.commands import Ended, call
from tests.faults.folders import append
from tests.faults.mutations import HOSTILE, fresh, paths_in, put
from tests.faults.registry import Outcome, fault
from tests.faults.run_folders import AREA, DEMO, H100

ADDRESSES = ("href", "xlink:href", "src", "action", "data", "formaction")


class Page(HTMLParser):
    """The tags of a page with the names of their attributes, and the addresses that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.text = set[tuple[str, ...]](), set[str](), text
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags |= {(tag,), *((tag, name) for name, _ in attrs)}
        self.addresses |= {
            str(value)
            for name, value in attrs
            if name in ADDRESSES and not str(value).startswith("#")
        }

    def unlike(self, clean: Page) -> str | None:
        """Return what this page has that a clean one has not; None for nothing."""
        more, away = self.tags - clean.tags, self.addresses - clean.addresses
        return f"tags {sorted(more)}, addresses {sorted(away)}" if more or away else None


def _strings(values: Any) -> list[tuple[Any, ...]]:
    found = []
    for path in paths_in(values)[1:]:
        value = values
        for key in path:
            value = value[key]
        if isinstance(value, str):
            found.append(path)
    return found


def _poison_plan(folder: Path, text: str) -> int:
    """Put `text` into every field of the plan that takes it; return into how many."""
    path = folder / "plan.json"
    plan, count = json.loads(path.read_text()), 0
    for place in _strings(plan):
        changed = put(plan, place, text)
        try:
            Plan.model_validate_json(json.dumps(changed))
        except ValidationError:
            continue
        plan, count = changed, count + 1
    path.write_text(json.dumps(plan))
    return count


def _poison_manifest(folder: Path, text: str) -> int:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    places = [
        place
        for place in _strings(manifest)
        if place[0] not in ("labels", "order_sha256") and "sha256" not in place
    ]
    for place in places:
        manifest = put(manifest, place, text)
    manifest["versions"] = {**manifest["versions"], text: text}
    path.write_text(json.dumps(manifest))
    return len(places) + 1


def _poison_rest(folder: Path, text: str) -> int:
    """Events, log, status, diagnostics, and what an evaluation names."""
    for kind in ("failed", text):
        append(folder / "events.jsonl", {"time": text, "event": kind, "reason": text})
    (folder / "log.txt").write_text(text, errors="replace")
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "reason": text}))
    evaluation = folder / "evaluation.json"
    if evaluation.exists():
        facts = json.loads(evaluation.read_text())
        sets = {text: next(iter(facts["sets"].values()))}
        evaluation.write_text(
            json.dumps({**facts, "sets": sets, "tasks": {text: {}}, "label": text})
        )
    return 6


def _runs(whole: list[Path], folder: Path) -> list[Path]:
    runs = [fresh(run, folder / run.name) for run in whole]
    for run in runs if whole is DEMO else []:
        evaluate(run, "bf16" if ".bf16." in run.name else "fp8_current", [1, 0, 1, 1] * 50, 2.5)
    return runs


def _poisoned(folder: Path, text: str) -> list[Path]:
    """Return the demo's runs with `text` in every place, in folders that are named so as well."""
    name = text.replace("/", "_").replace("\0", "").encode(errors="replace").decode()
    runs = _runs(DEMO, folder / name)
    for run in runs:
        _poison_plan(run, text), _poison_manifest(run, text), _poison_rest(run, text)
    return runs


def _wrong(ended: Ended, out: Path, clean: Page) -> str | None:
    if wrong := ended.wrong():
        return wrong
    if not out.exists():
        return None
    page = out.read_text(encoding="utf-8")
    return Page(page).unlike(clean)


@fault(
    AREA,
    "hostile HTML, script, YAML, markup and terminal codes in every text of runs: the report",
    small=1,
    full=100,
)
def hostile_report(count: int, folder: Path) -> Outcome:
    """The report is parsed and compared with that of the same runs without hostile text."""
    outcome, out = Outcome(), folder / "report.html"
    assert (
        call(
            report.main,
            [*_runs(DEMO, folder / "clean"), folder / "clean" / "nothing", "--out", out],
        ).code
        == 0
    )
    clean = Page(out.read_text())
    for text in itertools.islice(itertools.chain(HOSTILE), count):
        out.unlink(missing_ok=True)
        runs = _poisoned(folder, text)
        left_out = fresh(runs[0], runs[0].with_name("left_out"))
        (left_out / "metrics.jsonl").write_text(json.dumps({text: text, "loss": text}) + "\n")
        ended = call(report.main, [*runs, left_out, "--out", out])
        wrong = _wrong(ended, out, clean) or (None if ended.code == 0 else f"refused: {ended.err}")
        outcome.add("shown as text", lost=wrong and f"{text!r}: {wrong}")
    return outcome


@fault(AREA, "the same: tables and terminal", small=2, full=100)
def hostile_tables(count: int, folder: Path) -> Outcome:
    """HTML tables are parsed; what goes to the terminal holds no control code but line ends and the
    colours of the table itself.
    """
    outcome, out = Outcome(), folder / "table.html"
    assert call(throughput.main, [*_runs(H100, folder / "clean"), "--out", out]).code == 0
    clean = Page(out.read_text())
    for text in HOSTILE[:count]:
        runs = _runs(H100, folder / "hostile")
        for run in runs:
            _poison_manifest(run, text), _poison_rest(run, text)
        for main, options in (
            (throughput.main, ["--out", out]),
            (full_depth_table.main, ["--out", out, "--png", folder / "png"]),
            (compare.main, []),
        ):
            out.unlink(missing_ok=True)
            ended = call(main, [*runs, *options])
            codes = sorted({c for c in ended.out + ended.err if ord(c) < 32 and c != "\n"})
            wrong = _wrong(ended, out, clean) or (
                f"control codes {codes} on the terminal" if codes else None
            )
            outcome.add("shown as text", lost=wrong and f"{text!r}, {main.__module__}: {wrong}")
    return outcome


CODES = (
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b31m",
    "\r\x1b[K",
    "\u202e",
    "\x00\x08",
    "\x1b]8;;http://x\x07y",
)


@fault(
    AREA,
    "control codes and hostile text in log, status, events and folder of runs, a linked run and a"
    " broken one among them: `launch.status`",
    small=3,
    full=22,
)
def hostile_status(count: int, folder: Path) -> Outcome:
    """No control code reaches the terminal, and no run is left out."""
    outcome = Outcome()
    for n, text in enumerate([*CODES, *HOSTILE][:count]):
        runs = folder / str(n)
        hostile, *_ = _poisoned(runs / "runs", text)
        (hostile / "events.jsonl").unlink()
        (hostile / "status.json").write_text(
            json.dumps({"status": "failed", "reason": text, "step": 3})
        )
        (hostile / "log.txt").write_text(f"error: {text}\n", errors="replace")
        (fresh(DEMO[0], runs / "runs" / "broken") / "plan.json").write_text("{")
        (runs / "runs" / "linked").symlink_to(fresh(DEMO[0], runs / "linked"))
        names = {path.parent.name for path in (runs / "runs").rglob("plan.json")} | {"linked"}
        plain, listed = (
            call(status.main, [runs / "runs"]),
            call(status.main, [runs / "runs", "--json"]),
        )
        codes = sorted({c for c in plain.out + plain.err if not c.isprintable() and c != "\n"})
        shown = len(json.loads(listed.out))
        wrong = plain.wrong(()) or (f"control codes {codes}" if codes else None)
        wrong = wrong or (None if shown == len(names) else f"{shown} runs of {len(names)}")
        outcome.add("all named, no control code", lost=wrong and f"{text!r}: {wrong}")
    return outcome
