"""The loader that remembers composes what Hydra itself composes, and sees every change of a
file.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recipes.compose.hydra_loader import composed, without_hydra
from recipes.compose.tree import CONF, UNUSABLE, compose_plan


def answer(config: Any) -> Any:
    """Return a configuration as a tree, or what is wrong with it."""
    try:
        return OmegaConf.to_container(config(), resolve=True)
    except UNUSABLE as error:
        return type(error), str(error)


def by_hydra(overrides: list[str], conf: Path) -> Any:
    def config() -> Any:
        with initialize_config_dir(str(conf), version_base="1.3"):
            return compose("config", overrides=overrides)

    return answer(config)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=llama3_8b", "precision=fp8_current", "gpu=h100", "mapping.tp=4", "seed=2"],
        [
            "gpu=h100",
            "mapping.tp=4",
            "precision=fp8_current",
            "seed=3",
            "model=llama3_8b",
        ],  # the same files, other values
        ["mapping={tp: 2}", "++cluster.environment={A: b}", "data.root=${runs_dir}/x"],
        ["experiment=throughput", "model=llama3_70b", "gpu=b200", "~train.max_steps"],
        ["hydra.searchpath=[file:///nowhere]", "seed=5"],
        ["+model=llama3_8b"],
        ["~logger", "seed=4"],
        ["gpu=h100", "gpu=h200"],
        ["model@precision=llama3_8b"],
        ["no.such=1", "gpu=nowhere", "model=nothing"],
        ["mapping.tpp=1"],
        ["seed=1,2"],
        ["model=[llama3_8b]"],
        ["seed={"],
    ],
    ids=str,
)
def test_the_result_is_hydras(overrides: list[str]) -> None:
    expected = by_hydra(overrides, CONF)
    for _ in range(2):  # when files are read, and when they are remembered
        assert answer(lambda: without_hydra(composed(overrides, CONF))) == expected


def test_what_a_caller_does_to_a_result_stays_his() -> None:
    first = composed(["gpu=h100"], CONF)
    first.train.max_steps = 7
    assert composed(["gpu=h100"], CONF).train.max_steps == 100


def test_a_change_of_a_file_is_seen(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    site, other, here = conf / "local/site.yaml", tmp_path / "other.yaml", ["executor=slurm"]

    def account() -> str | None:
        return compose_plan(here, conf).cluster.account

    def write(path: Path, name: str) -> None:
        path.write_text(f"# @package cluster\naccount: {name}\n")

    assert account() is None
    write(site, "one")
    assert account() == "one"
    times = site.stat()
    write(site, "two")  # of the same length, and as old
    os.utime(site, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert account() == "two"
    write(other, "six")
    site.unlink()
    site.symlink_to(other)
    assert account() == "six"
    write(other, "ten")
    assert account() == "ten"
    site.unlink()
    assert account() is None
    copy = (
        (conf / "precision/fp8_current.yaml").read_text().replace("name: fp8_current", "name: mine")
    )
    (conf / "precision/mine.yaml").write_text(copy)
    assert compose_plan(["precision=mine"], conf).precision.name == "mine"


def test_a_change_of_the_environment_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: ${oc.env:MY_MODEL}\n"
    )
    for name in ("llama3_8b", "llama3_70b"):
        monkeypatch.setenv("MY_MODEL", name)
        assert composed(["experiment=mine"], conf).model.name == name
