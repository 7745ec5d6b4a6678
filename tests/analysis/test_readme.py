"""The documentation is what the shipped results make: every table between markers and every image,
made again and compared.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.predictor.calibration.published_steps import pairs, rows
from docs.build import render, tables
from docs.build.render import main as command
from docs.build.tables import FIGURES, TABLES
from recipes.errors import InputError

RESULTS = render.ROOT / "analysis" / "results"
GEMM = "<!-- table: gemm gemm_h100 -->\n<!-- end -->"


@pytest.mark.slow
def test_the_committed_documents_are_what_the_results_make() -> None:
    differing = [str(path.relative_to(render.ROOT)) for path in render.make().differing()]
    assert not differing, "python -m docs.build.render makes them again"


def test_every_table_and_image_of_the_documents_is_made() -> None:
    """A table's rule or an image outside the markers would be typed by hand."""
    text = render.BLOCK.sub("", (render.ROOT / "README.md").read_text())
    assert "|---" not in text.replace(" ", "") and "](docs/images/" not in text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a copy of the repository's GEMM results with a README of their table and figure."""
    shutil.copytree(RESULTS / "gemm_h100", tmp_path / "analysis" / "results" / "gemm_h100")
    (tmp_path / "README.md").write_text(
        f"# Title\n\nBefore.\n\n{GEMM}\n\nBetween.\n\n<!-- figure: gemm gemm_h100 -->\n<!-- end"
        " -->\n\nAfter.\n"
    )
    return tmp_path


def test_the_table_and_the_image_are_made_and_prose_is_left_alone(root: Path) -> None:
    render.make(root).write()
    text = (root / "README.md").read_text()
    rows = [
        json.loads(line)
        for line in (root / "analysis/results/gemm_h100/gemm.jsonl").read_text().splitlines()
    ]
    best = next(
        row
        for row in rows
        if (row["granularity"], row["accumulation"], row["k"], row["name"])
        == ("tensor", "fast", 53248, "K sweep")
    )
    assert f"{best['speedup_over_bf16']:.2f}" in text and "measured on" in text
    for prose in ("# Title", "Before.", "Between.", "After."):
        assert f"{prose}\n" in text
    assert "](docs/images/gemm.png)" in text and (
        root / "docs/images/gemm.png"
    ).read_bytes().startswith(b"\x89PNG")


def test_twice_changes_nothing_and_a_changed_result_or_number_is_found(root: Path) -> None:
    render.make(root).write()
    assert render.make(root).differing() == []
    page, results = root / "README.md", root / "analysis/results/gemm_h100/gemm.jsonl"
    good = page.read_text()
    page.write_text(good.replace("1.9", "2.9", 1))
    assert render.make(root).differing() == [page]
    page.write_text(good)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    results.write_text(
        "".join(
            json.dumps({**row, "speedup_over_bf16": (row["speedup_over_bf16"] or 0) * 1.1}) + "\n"
            for row in rows
        )
    )
    assert render.make(root).differing() == [page, root / "docs/images/gemm.png"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: gemm gemm_h100 -->\n", "not closed"),
        ("<!-- table: nothing -->\n<!-- end -->\n", "no table of this name; choose one of memory"),
        ("<!-- table: gemm nowhere -->\n<!-- end -->\n", "analysis/results/nowhere is not there"),
        ("<!-- figure: gemm -->\n<!-- end -->\n", "name it in the marker"),
        ("<!-- table: gemm-models gemm_h100 -->\n<!-- end -->\n", r"no layers\.jsonl"),
        ("<!-- table: bits gemm_h100 -->\n<!-- end -->\n", r"no bits\.jsonl"),
        ("<!-- table: fig3-layers gemm_h100 -->\n<!-- end -->\n", "two depths"),
    ],
)
def test_a_marker_that_cannot_be_served_is_one_line_that_names_it(
    root: Path, text: str, said: str
) -> None:
    (root / "README.md").write_text(text)
    with pytest.raises(InputError, match=rf"README\.md.*{said}") as error:
        render.make(root)
    assert "\n" not in str(error.value)


def test_an_unsound_run_makes_no_table(root: Path) -> None:
    shutil.copytree(RESULTS / "llama3_8b_h100", root / "analysis/results/runs")
    (root / "README.md").write_text("<!-- table: fig3-layers runs -->\n<!-- end -->\n")
    assert "0.9" in render.make(root).documents[root / "README.md"]
    metrics = root / "analysis/results/runs/llama3_8b.bf16.layers2/metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="lost its end"):
        render.make(root)


def test_the_command_checks_and_writes(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(render, "ROOT", root)
    monkeypatch.setattr(render, "make", lambda root=root, make=render.make: make(root))
    assert (
        command(["--check"]) == 1
        and "differs from the results: README.md" in capsys.readouterr().out
    )
    assert not (root / "docs").exists()
    assert command([]) == 0 and "written: README.md" in capsys.readouterr().out
    assert command(["--check"]) == 0 and capsys.readouterr().out == ""
    (root / "README.md").write_text("<!-- table: nothing -->\n<!-- end -->\n")
    assert command([]) == 2 and capsys.readouterr().err.startswith(
        "error: README.md, table nothing: "
    )


def test_a_data_frame_is_markdown_with_its_index_its_digits_and_its_words_escaped() -> None:
    frame = pd.DataFrame(
        {"recipe": ["a|b", "c"], "count": [1234567, 1], "share": [0.999998, float("nan")]}
    ).set_index("recipe")
    assert tables._frame(frame, "A note.").splitlines() == [
        "| recipe | count | share |",
        "| --- | ---: | ---: |",
        "| a\\|b | 1,234,567 | 0.999998 |",
        "| c | 1 | – |",
        "",
        "- A note.",
    ]


def test_what_markers_may_name_is_documented() -> None:
    assert all(maker.__doc__ for maker in TABLES.values()) and set(FIGURES) >= {
        "loss",
        "gemm",
        "fig3",
    }


def test_another_processors_last_bits_are_no_difference_but_moved_lines_and_sizes_are() -> None:
    table = tables.gemm.load(RESULTS / "gemm_h200")
    made = tables.gemm.figure(table).png()
    pixels = np.asarray(Image.open(io.BytesIO(made)).convert("RGBA")).copy()
    drawn = np.argwhere((pixels[..., :3] < 128).any(axis=-1))
    few = drawn[:: max(1, len(drawn) // 150)]
    assert render.same_picture(made, png(brightened(pixels, drawn, 1))) and render.same_picture(
        made, png(brightened(pixels, few, 90))
    )
    assert not render.same_picture(made, png(brightened(pixels, drawn, 90)))
    assert (
        not render.same_picture(made, png(pixels[:-1]))
        and not render.same_picture(made, b"no image")
        and not render.same_picture(made, made[:99])
    )
    slower = table.assign(speedup_over_bf16=table["speedup_over_bf16"] * 0.99)
    assert not render.same_picture(made, tables.gemm.figure(slower).png())


def brightened(
    pixels: np.ndarray[Any, Any], where: np.ndarray[Any, Any], by: int
) -> np.ndarray[Any, Any]:
    """Return the image with `by` levels added to the pixels at `where`."""
    changed = pixels.astype(int)
    changed[where[:, 0], where[:, 1], :3] = np.clip(
        changed[where[:, 0], where[:, 1], :3] + by, 0, 255
    )
    return changed.astype(np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def test_validation_and_the_posts_figures_are_served(root: Path) -> None:
    markers = [
        "table: validation",
        "table: validation-speedups",
        "table: validation-steps",
        "table: post-fig4",
        "figure: post-fig4",
    ]
    (root / "README.md").write_text(
        "\n\n".join(f"<!-- {marker} -->\n<!-- end -->" for marker in markers)
    )
    made = render.make(root)
    text = made.documents[root / "README.md"]
    assert (
        text.count("\n| ") > len(rows()) + len(pairs(rows()))
        and "docs/images/fig4_post.png" in text
    )
    assert (
        "predicted" in text
        and "published" in text
        and set(made.images) == {root / "docs/images/fig4_post.png"}
    )


def test_a_table_of_measured_and_emulated_losses_labels_each() -> None:
    text = TABLES["verdicts"]([RESULTS / "fig2_h200"])
    assert "loss (measured: fp8_current, fp8_delayed, fp8_subchannel; emulated: mxfp8)" in text
    assert TABLES["verdict-notes"]([RESULTS / "fig2_h200"]).startswith("- mxfp8: FP8 is emulated")
