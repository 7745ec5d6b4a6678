"""The page: six curves and the table are in it, it needs nothing beside itself, and text of runs
cannot become markup.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.render.figure import COLOURS
from analysis.report import main as report
from tests.analysis.conftest import Maker, curve, own_noise

FP8 = ("fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8")
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)> & {{ 7*7 }}"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def six(make: Maker, **manifest: object) -> list[str]:
    runs = [
        make("bf16", curve(400), "bf16", **manifest),
        make("bf16.2", curve(400, 3), "bf16", ("seed=2",), **manifest),
    ]
    runs += [
        make(name, curve(400) + own_noise(i, 400, 0.002), name, **manifest)
        for i, name in enumerate(FP8)
    ]
    return [str(run) for run in runs]


def test_the_page_holds_six_curves_the_table_and_nothing_from_elsewhere(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "report.html"
    assert report([*six(make), "--out", str(out), "--png", str(tmp_path / "png")]) == 0
    page = Page(out)
    loss = out.read_text().split("<figure>")[1]
    for precision in COLOURS:
        assert f"stroke: {COLOURS[precision].lower()}" in loss, precision
    assert (
        loss.count(f"stroke: {COLOURS['bf16'].lower()}; stroke-width: 1.4")
        + loss.count("stroke-dasharray: 5.18")
        >= 2
    ), "two BF16 seeds"
    assert [tag for tag, _ in page.tags].count("figure") == 4
    assert all(name in page.text for name in FP8) and "verdict" in page.text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [
        a for _, a in page.tags if re.match(r"https?:", a.get("src") or a.get("xlink:href") or "")
    ]
    assert sorted(p.name for p in (tmp_path / "png").iterdir()) == [
        "gap.png",
        "heldout.png",
        "loss.png",
        "step_time.png",
    ]
    assert str(out) in capsys.readouterr().out.replace("\n", "")


def test_text_of_a_run_is_shown_not_run(make: Maker, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    runs = six(make, device=HOSTILE, versions={"torch": HOSTILE})
    bad = make("bad", curve(400))
    (bad / "status.json").write_text(json.dumps({"status": HOSTILE}))
    assert report([*runs, str(bad), "--out", str(out)]) == 0
    page = Page(out)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("alert(1)") >= 12 and "{{ 7*7 }}" in page.text
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_unsound_runs_are_left_out_by_name_and_none_at_all_is_an_error(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    runs = six(make)
    broken = make("broken", curve(400))
    (broken / "metrics.jsonl").write_text("")
    assert report([*runs, str(broken), "--out", str(out)]) == 0
    assert "broken" in Page(out).text.partition("Left out")[2]
    capsys.readouterr()
    assert report([str(broken), "--out", str(tmp_path / "none.html")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "none.html").exists()
