"""The axes of an experiment: what `-m experiment=fig3` sweeps without being told.

`conf/experiment` is the only place where axes are joined, so the values that belong together stand
there, where Hydra itself looks for them: `hydra.sweeper.params`.  A value on the command line
replaces the experiment's axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from recipes.compose.hydra_loader import composed
from recipes.compose.tree import CONF, UNUSABLE, compose_tree
from recipes.errors import InputError


def with_axes(overrides: Sequence[str], conf: Path = CONF) -> list[str]:
    """Return the overrides of a sweep behind those axes of their experiment that they do not name;
    InputError for no such experiment.
    """
    return [*(f"{key}={values}" for key, values in _left_open(overrides, conf).items()), *overrides]


def check_single(overrides: Sequence[str], conf: Path = CONF) -> None:
    """Raise InputError where one plan is asked for and its experiment sweeps an axis that the
    overrides leave open.
    """
    left = _left_open(overrides, conf)
    if left:
        one_each = " ".join(f"{key}={values.partition(',')[0]}" for key, values in left.items())
        name = _keys(overrides)["experiment"]
        raise InputError(
            f"{name} sweeps {', '.join(left)}; use -m for a run of each, or give one value of each,"
            f" as in {one_each}"
        )


def _keys(overrides: Sequence[str]) -> dict[str, str]:
    return {override.lstrip("+~").split("=")[0]: override for override in overrides}


def _left_open(overrides: Sequence[str], conf: Path) -> dict[str, str]:
    """Return the axes of the overrides' experiment that they do not name, with their values."""
    named = _keys(overrides)
    axes = _axes(named["experiment"], conf) if "experiment" in named else {}
    return {key: values for key, values in axes.items() if key not in named}


def _axes(experiment: str, conf: Path) -> dict[str, str]:
    """Return what an experiment sweeps; nothing where it trains nothing, which composing it
    tells.
    """
    try:
        config = composed([experiment], conf)
        found = (
            {}
            if "made_with" in config
            else OmegaConf.to_container(config.hydra.sweeper.params or OmegaConf.create())
        )
    except UNUSABLE:
        compose_tree([experiment], conf)  # says what is wrong with it
        raise
    assert isinstance(found, dict)
    return {str(key): str(values) for key, values in found.items()}
