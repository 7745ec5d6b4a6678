"""Compose conf/ with Hydra, and keep within a process what the files of a choice of groups merge
to.

Hydra reads and merges about twenty-five files for each plan, in 0.1 s.  A matrix, a sweep or a page
composes hundreds of plans.  Most of them differ from another in values alone, which are set after
the merge.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override, open_dict

State = tuple[int, int, int, int, int]
MOST_STATES = 8  # of folders: tests compose from folders of their own
MOST_CHOICES = 1024  # merged choices of groups in one state of a folder, 35 kB each


def composed(overrides: Sequence[str], conf: Path) -> DictConfig:
    """Return what Hydra composes of conf/config.yaml and `overrides`, with its own node `hydra`.

    The result is the caller's own.  Files are read again where one of them, or an environment
    variable, changed since the last call.  Raises as Hydra's `compose`.
    """
    environment = hash(frozenset(os.environ.items()))  # a defaults list may have ${oc.env:NAME}
    loader = _loader(str(conf), tuple(_states(str(conf))), environment)
    return loader.load_configuration("config", list(overrides), RunMode.RUN, from_shell=False)


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a composed configuration without Hydra's own node."""
    with open_dict(config):
        config.pop("hydra", None)
    return config


def values_of(path: Path) -> Any:
    """Return the values of one YAML file, the caller's own.

    Raises as `OmegaConf.load`, or OSError.
    """
    return pickle.loads(_values(str(path), _state(path.stat())))


@functools.lru_cache(MOST_CHOICES)
def _values(path: str, state: State) -> bytes:
    return pickle.dumps(OmegaConf.to_container(OmegaConf.load(path)))


@functools.lru_cache(MOST_STATES)
def _loader(conf: str, states: tuple[tuple[str, State], ...], environment: int) -> _Loader:
    """Return the loader of a folder whose files are in these states, in one environment."""
    version.setbase("1.3")
    setup_globals()
    Plugins.instance()
    return _Loader(create_config_search_path(conf))


def _states(folder: str) -> Iterator[tuple[str, State]]:
    """Yield path and state of each file below a folder."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _states(entry.path)
                continue
            try:
                found = entry.stat()
            except OSError:  # a link to nothing
                found = entry.stat(follow_symlinks=False)
            yield entry.path, _state(found)


def _state(found: os.stat_result) -> State:
    """Return what changes with a file's text, its name or its permissions."""
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class _Loader(ConfigLoaderImpl):
    """Hydra 1.3's loader (hydra/_internal/config_loader_impl.py), which merges the files of each
    choice of groups once.

    Whatever fails is given to Hydra's own loader, whose message it is.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.files = CachingConfigRepository(self.repository)
        self.merged = functools.lru_cache(MOST_CHOICES)(self._merged)
        self.placed = dict[str, bytes]()
        self.begun = dict[str, bytes]()

    def _load_configuration_impl(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        parsed = OverridesParser.create().parse_overrides(overrides)
        self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        groups = [override for override in parsed if self._chooses_file(override)]
        if any(override.is_hydra_override() for override in parsed):  # may name other folders
            return self._by_hydra(config_name, overrides)
        try:
            config: DictConfig = pickle.loads(self.merged(config_name, _sorted(groups)))
        except Exception:
            return self._by_hydra(config_name, overrides)
        self._apply_overrides_to_config([each for each in parsed if each not in groups], config)
        return config

    def _by_hydra(self, config_name: str | None, overrides: list[str]) -> DictConfig:
        loader = ConfigLoaderImpl(self.config_search_path)
        return loader._load_configuration_impl(
            config_name, overrides, RunMode.RUN, from_shell=False
        )

    def _merged(self, config_name: str | None, groups: tuple[str, ...]) -> bytes:
        found = super()._load_configuration_impl(
            config_name, list(groups), RunMode.RUN, from_shell=False
        )
        return pickle.dumps(found)

    def _chooses_file(self, override: Override) -> bool:
        """Whether an override chooses files; else it sets a value
        (hydra/_internal/defaults_list.py, class Overrides).
        """
        is_group = self.repository.group_exists(override.key_or_group)
        return is_group and not isinstance(override.value(), dict)

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        return OverridesParser.create().parse_overrides(overrides), self.files

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        """Hydra's own files come first, and are the same for all."""
        own = list(
            itertools.takewhile(lambda each: str(each.config_path).startswith("hydra/"), defaults)
        )
        key = repr(own)
        if key not in self.begun:
            self.begun[key] = pickle.dumps(super()._compose_config_from_defaults_list(own, repo))
        config: DictConfig = pickle.loads(self.begun[key])
        with flag_override(config, "no_deepcopy_set_nodes", True):
            for default in defaults[len(own) :]:
                config.merge_with(self._load_single_config(default, repo).config)
        return config

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        """Return a copy, since merging changes it."""
        key = repr(default)
        if key not in self.placed:
            self.placed[key] = pickle.dumps(super()._load_single_config(default, repo))
        result: ConfigResult = pickle.loads(self.placed[key])
        return result


def _sorted(groups: Sequence[Override]) -> tuple[str, ...]:
    """Return overrides that choose files; in one order for all, where their order means nothing."""
    lines = [str(override.input_line) for override in groups]
    is_plain = all(line[:1] not in "+~" for line in lines) and len(
        {each.key_or_group for each in groups}
    ) == len(groups)
    return tuple(sorted(lines) if is_plain else lines)
