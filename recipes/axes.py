"""The axes of an experiment: what `-m experiment=fig3` sweeps without being told.

`conf/experiment` is the only place where axes are joined, so the values that belong together stand there, where Hydra itself looks for
them: `hydra.sweeper.params`.  A value on the command line replaces the experiment's axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from recipes.compose import CONF, UNUSABLE, compose_tree


def with_axes(overrides: Sequence[str], conf: Path = CONF) -> list[str]:
    """Return the overrides of a sweep behind those axes of their experiment that they do not name; InputError for no such experiment."""
    named = {override.lstrip("+~").split("=")[0]: override for override in overrides}
    if "experiment" not in named:
        return list(overrides)
    axes = _axes(named["experiment"], conf)
    return [*(f"{key}={values}" for key, values in axes.items() if key not in named), *overrides]


def _axes(experiment: str, conf: Path) -> dict[str, str]:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            config = compose("config", overrides=[experiment], return_hydra_config=True)
            found = OmegaConf.to_container(config.hydra.sweeper.params or OmegaConf.create())
    except UNUSABLE:
        compose_tree([experiment], conf)  # says what is wrong with it
        raise
    assert isinstance(found, dict)
    return {str(key): str(values) for key, values in found.items()}
