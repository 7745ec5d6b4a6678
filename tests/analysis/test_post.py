"""The post's figures: every number labelled, measured runs taken up where they are, and pages that
need nothing beside themselves.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from analysis.post import hypotheses, make, sources
from analysis.post.__main__ import main
from analysis.post.training import cells, page
from analysis.post.values import SHADES, Value, chart, looks_of, table
from analysis.runs.load import load_run
from analysis.runs.published import post_speedups
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from tests.analysis.conftest import Maker
from tests.analysis.test_depth import BF16, CURRENT, planted
from tests.analysis.test_throughput import ON_H100, run_of

H100 = ["experiment=fig3", "model=llama3_8b", "precision=fp8_current"]


def rows_of(values: list[Value], **wanted: str) -> list[Value]:
    return [
        value
        for value in values
        if all(getattr(value, key) == text for key, text in wanted.items())
    ]


def values_of(found: Any) -> list[dict[str, Any]]:
    return list(found.tables[0].rows)


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["fig1", "fig2", "fig3", "fig4", "fig5"])
def test_a_page_is_made_of_what_is_shipped_and_is_self_contained(
    figure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"experiment={figure}", "--out", str(tmp_path)]) == 0
    printed, html = capsys.readouterr().out, (tmp_path / f"{figure}.html").read_text()
    assert f"page: {tmp_path / figure}.html" in printed
    assert (
        "<svg" in html and "<table" in html and html.count("<figcaption>") == html.count("<figure>")
    )
    assert (
        not re.search(r"""(src|href)=["']?(https?:|//|file:)""", html)
        and "<script" not in html
        and "<link" not in html
    )
    assert any(word in html for word in ("measured", "published", "predicted", "emulated"))
    assert list(csv.DictReader((tmp_path / f"{figure}.csv").open())) and list(
        tmp_path.glob("*.png")
    )


@pytest.mark.parametrize(("number", "count"), [(3, 5), (4, 5), (5, 20)])
def test_every_cell_is_there_and_every_number_has_label_and_source(number: int, count: int) -> None:
    found = page(number, [], [])
    values = values_of(found)
    assert (
        len({(row["model"], row["precision"]) for row in values})
        == count
        == len(found.tables[0].shown)
    )
    assert {row["label"] for row in values} <= set(SHADES) and all(row["source"] for row in values)
    assert all(
        row["low"] < row["value"] < row["high"] for row in values if row["label"] == "predicted"
    )
    assert all(row["low"] is None for row in values if row["label"] == "published")
    assert "Measured: not yet." in found.tables[0].notes and found.left_out == []


def test_figure_3_holds_what_the_post_prints_and_says_that_its_layouts_are_unknown() -> None:
    printed = {
        (v["model"], v["precision"]): v["value"]
        for v in values_of(page(3, [], []))
        if v["series"] == "the post"
    }
    assert printed == post_speedups()
    best = [v["model"] for v in values_of(page(3, [], [])) if v["series"] == "best-mapping"]
    assert best == [
        "llama3_70b"
    ]  # the one model whose layout for FP8 on an H100 is not that for BF16


def test_published_speedups_are_those_of_rows_side_by_side() -> None:
    """dgxc-benchmarking v25.05.05: Llama 3.1 405B on 512 H100s, 19.81 s in BF16 and 13.02 s in FP8
    (delayed).
    """
    plan = compose_plan(["experiment=fig3", "model=llama31_405b", "precision=fp8_delayed"])
    (value,) = sources.published_speedups(plan)
    assert (
        value.value == pytest.approx(19.81 / 13.02, rel=1e-3)
        and "25.04" in value.source
        and "iso-mapping" in value.source
    )
    stands_in = sources.published_speedups(
        compose_plan(["experiment=fig3", "model=llama31_405b", "precision=fp8_current"])
    )
    assert [v.series for v in stands_in] == ["the post", "NVIDIA's tables, fp8_delayed"]
    assert (
        sources.published_speedups(
            compose_plan(["experiment=fig4", "model=llama3_8b", "precision=mxfp8"])
        )
        == []
    )


def test_whole_runs_are_taken_up_as_measured(make: Maker) -> None:
    folders = [run_of(make, "bf16", 12.0), run_of(make, "fp8_current", 9.0)]
    found = page(3, [], [load_run(folder) for folder in folders])
    (value,) = (row for row in values_of(found) if row["label"] == "measured")
    assert (value["model"], value["series"]) == ("llama3_8b", "") and value[
        "value"
    ] == pytest.approx(12 / 9, rel=0.01)
    assert (
        value["low"] < value["value"] < value["high"]
        and "runs bf16 and fp8_current" in value["source"]
    )
    assert (
        "Measured: not yet." not in found.tables[0].notes
        and found.tables[0].columns[2] == "measured"
    )


def test_another_gpu_and_two_batches_are_named_in_title_and_columns() -> None:
    found = make.make("fig3", ["model=llama3_8b"])
    measured = [f"measured: on H200, {batch} sequences a step" for batch in (4, 8)]
    assert found.title.endswith("; measured on H200") and found.figures[0].title == found.title
    assert found.tables[0].columns[2:5] == [*measured, "measured parts, put together: on H200"]


def test_runs_cut_in_depth_are_measured_parts_and_no_whole_model(make: Maker) -> None:
    folders = [
        planted(make, name, n, parts)
        for name, parts in (("bf16", BF16), ("fp8_current", CURRENT))
        for n in (2, 4)
    ]
    found = values_of(page(3, [], [load_run(folder) for folder in folders]))
    assert not [row for row in found if row["label"] == "measured"]
    (value,) = (row for row in found if row["label"] == sources.PARTS)
    whole = [(32 * (a + 32 * b) + (c + 32 * d) / 4) / 2 for a, b, c, d in (BF16, CURRENT)]
    assert value["value"] == pytest.approx(whole[0] / whole[1], abs=1e-3)
    assert (
        "compute alone" in value["source"]
        and "NVIDIA H200" in value["source"]
        and "depths 2, 4" in value["source"]
    )


def test_figure_5_measures_one_gpu_over_the_other(make: Maker) -> None:
    cell = ("experiment=fig5", "model=llama3_8b", "precision=mxfp8")
    folders = []
    for gpu, seconds in (("b200", 5.0), ("gb200", 4.0)):
        named = lambda name, *args, gpu=gpu, **said: make(f"{gpu}.{name}", *args, **said)  # noqa: E731
        folders.append(
            run_of(named, "mxfp8", seconds, (*cell, f"gpu={gpu}"), device=f"NVIDIA {gpu.upper()}")
        )
    found = values_of(
        page(5, ["model=llama3_8b", "precision=mxfp8"], [load_run(folder) for folder in folders])
    )
    (value,) = (row for row in found if row["label"] == "measured")
    assert value["value"] == pytest.approx(5 / 4, rel=0.01)
    wrong = run_of(
        lambda name, *args, **said: make(f"h.{name}", *args, **said),
        "mxfp8",
        4.0,
        (*cell, "gpu=gb200"),
        device="NVIDIA H200",
    )
    with pytest.raises(InputError, match="device is NVIDIA H200, and the plan's is gb200"):
        load_run(wrong)


def test_one_layout_isolates_the_gpu() -> None:
    """FSDP on the GB200 against tp2 pp4 cp2 on the B200 for 70B: more than the GPU differs, so both
    ratios are shown.
    """
    found = values_of(page(5, ["model=llama3_70b,nemotron4_15b", "precision=fp8_current"], []))
    by_model = {
        model: {row["series"]: row["value"] for row in found if row["model"] == model}
        for model in ("llama3_70b", "nemotron4_15b")
    }
    assert set(by_model["llama3_70b"]) == {"own layouts", "one layout"} and set(
        by_model["nemotron4_15b"]
    ) == {"own layouts"}
    assert by_model["llama3_70b"]["own layouts"] > by_model["llama3_70b"]["one layout"] > 1


def test_a_cell_that_is_refused_is_left_out_with_the_reason() -> None:
    found = page(3, ["model=llama3_8b", "precision=bf16,fp8_current,mxfp8"], [])
    assert {row["precision"] for row in values_of(found)} == {"fp8_current"}
    assert len(found.left_out) == 1 and "mxfp8 on h100" in found.left_out[0]
    with pytest.raises(InputError, match=r"no cell to show.*mxfp8 on h100"):
        page(3, ["model=llama3_8b", "precision=mxfp8"], [])
    with pytest.raises(InputError, match=r"no cell to show.*no FP8 recipe"):
        page(3, ["precision=bf16"], [])


def test_the_title_names_the_recipes_that_are_shown() -> None:
    found = page(4, ["model=llama3_8b", "precision=fp8_current"], [])
    assert (
        found.title == "After figure 4: step-time speedup of fp8_current over BF16 on B200"
        and len(found.tables) == 2
    )


def test_cells_are_the_experiments() -> None:
    assert len(cells(3, [])) == 5 and len(cells(5, [])) == 20
    assert cells(4, ["model=llama3_8b"]) == [
        ["precision=mxfp8", "experiment=fig4", "model=llama3_8b"]
    ]


def test_results_that_are_not_there_are_said_and_the_demo_is_called_emulated(
    tmp_path: Path,
) -> None:
    assert "not yet" in " ".join(make.make("fig1", results=tmp_path).said)
    (tmp_path / "demo").symlink_to(make.RESULTS / "demo")
    folder = make.RESULTS / "gemm_h200"
    once, twice = (
        make.make("fig1", [], given, results=tmp_path)
        for given in ([folder], [folder, folder / ".." / "gemm_h200"])
    )
    assert len(once.figures) == len(twice.figures) > 0
    found = make.make("fig2", results=tmp_path)
    assert any("not yet" in line and "emulated" in line for line in found.said)
    assert "emulated" in found.tables[0].notes[0]


def test_shipped_folders_are_taken_up_once_they_are_there(tmp_path: Path, make: Maker) -> None:
    from analysis.post.make import make as page_of

    folder = run_of(make, "bf16", 12.0), run_of(make, "fp8_current", 9.0)
    (tmp_path / "fig3_h200").mkdir()
    for run in folder:
        run.rename(tmp_path / "fig3_h200" / run.name)
    found = page_of("fig3", ["model=llama3_8b"], results=tmp_path)
    assert [row["value"] for row in values_of(found) if row["label"] == "measured"] == [
        pytest.approx(4 / 3, rel=0.01)
    ]
    again = page_of(
        "fig3", ["model=llama3_8b"], [tmp_path / "fig3_h200" / ".." / "fig3_h200"], results=tmp_path
    )
    assert values_of(again) == values_of(found)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fig9"], "fig9: no figure of the post; give fig1"),
        (["fig3", "nowhere"], "nowhere holds no run folder"),
        (["fig3", "model=nothing"], "model=nothing: conf/model has no such option"),
        (["fig3", "precision=nothing"], "conf/precision has no such option"),
        (["fig3", "model=llama3_8b,foo"], "model=foo: conf/model has no such option"),
        (["fig4", "gpu=gb300"], "gpu=gb300: the gpu of figure 4 is fixed"),
        (["fig3", "experiment=fig4"], "experiment=fig4: the experiment of figure 3 is fixed"),
        (["fig1", "model=llama3_8b"], "takes no overrides"),
        (["fig1", "nowhere"], "no gemm.jsonl"),
        (["fig4", "--out", "/dev/null/x"], "cannot be written"),
        (
            ["fig4", "--out", "deep/x.html"],
            (
                "--out names a folder, in which the page is written as fig4.html; give one, as in"
                " --out deep/x\n"
            ),
        ),
    ],
)
def test_wrong_input_is_one_line(
    argv: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_the_dip_is_computed_and_its_verdict_follows_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares, assumptions = hypotheses.tables()
    rows = {row["assumption"]: row for row in assumptions.rows}
    first = rows["as predicted"]
    assert first["llama3_8b"] == pytest.approx(
        next(v["value"] for v in values_of(page(4, ["model=llama3_8b"], [])))
    )
    assert first["dip"] == pytest.approx(first["llama3_70b"] - first["llama3_8b"])
    longer = rows["gaps between kernels twice as long"]
    assert longer["dip"] < first["dip"] and longer["step_time_error"] > first["step_time_error"]
    assert ("is met" if first["dip"] < 0 else "is missed") in assumptions.notes[0]
    columns = [name for name in shares.rows[0] if name.endswith("_bf16")]
    assert all(0.97 < sum(row[name] for row in shares.rows) <= 1.0001 for name in columns)
    for second, word in ((1.2, "is met"), (1.8, "is missed")):
        changed = {"llama3_8b": 1.5, "llama3_70b": second, "dip": second - 1.5}
        assert word in hypotheses._verdict([{**row, **changed} for row in assumptions.rows])[0]


def test_values_are_drawn_by_label_and_series_and_shown_with_intervals() -> None:
    values = [
        Value("m", "fp8_current", "predicted", "iso-mapping", 1.4, 1.3, 1.5, "x"),
        Value("m", "fp8_current", "measured", "", 1.45, None, None, "a"),
        Value("m", "fp8_current", "measured", "", 1.47, None, None, "b"),
        Value("m", "fp8_current", "predicted", "best-mapping", 1.5, 1.4, 1.6, "x"),
    ]
    looks = looks_of(values)
    assert (
        list(looks) == ["measured", "predicted: iso-mapping", "predicted: best-mapping"]
        and len(set(looks.values())) == 3
    )
    (line,) = table("T", values, []).shown
    assert (
        line["measured"] == "1.45; 1.47" and line["predicted: iso-mapping"] == "1.40 (1.30 to 1.50)"
    )
    assert (
        chart("x", "T", values, {"fp8_current": "#0072B2"}, "C").png()
        == chart("x", "T", values, {"fp8_current": "#0072B2"}, "C").png()
    )


def test_text_of_a_run_is_no_markup_of_the_page(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"device": "NVIDIA H100 <script>alert(1)</script>"}
    folders = [
        run_of(make, "bf16", 12.0, ON_H100, **bad),
        run_of(make, "fp8_current", 9.0, ON_H100, **bad),
    ]
    assert (
        main(["fig3", "model=llama3_8b", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    )
    html = (tmp_path / "out" / "fig3.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert json.dumps(capsys.readouterr().out).count("page: ") == 1
