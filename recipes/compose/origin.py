"""Which file gave a key of the plan its value, so that an error names the file that is to be
changed.

Hydra merges many files and keeps no record of which key came from where.  It leaves out a site file
that is no regular file without a message, and takes the keys of one without a package header for a
group of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError  # type: ignore[import-untyped]

from recipes.compose.hydra_loader import composed
from recipes.errors import InputError, one_line
from recipes.plan import Plan

HEADER = "# @package cluster"
PACKAGE = re.compile(r"#+\s*@package\s+(\S+)")


def check_site(overrides: Sequence[str], conf: Path) -> None:
    """Raise InputError, with the file's name, where the site's own file is there and cannot be
    used.

    It is conf/local/site.yaml, or the one that `local=NAME` names, which then has to be there.
    """
    named = [override.partition("=")[2] for override in overrides if override.startswith("local=")]
    path = conf / "local" / f"{named[-1] if named else 'site'}.yaml"
    if not os.path.lexists(path):
        if os.path.lexists(path.with_suffix(".yml")):
            raise InputError(
                f"{shown(path.with_suffix('.yml'), conf)} is not read; rename it to {path.name}"
            )
        if named:
            raise InputError(
                f"local={named[-1]}: {shown(path, conf)} is not there; write it, or correct the"
                " name"
            )
        return
    values = _read(path, conf)
    if values != {} and not isinstance(values, dict):
        raise InputError(
            f"{shown(path, conf)} holds no keys; write lines of `key: value`, as in"
            " conf/cluster/default.yaml"
        )
    package = _package(path)
    if values and package is None:
        raise InputError(
            f"{shown(path, conf)} lacks its first line `{HEADER}`; add it, or its keys belong to no"
            " part of the plan"
        )
    if package and package != "_global_" and package.split(".")[0] not in Plan.model_fields:
        raise InputError(
            f"{shown(path, conf)} begins with `# @package {package}`, which is no part of the plan;"
            f" write `{HEADER}`"
        )


def file_of(key: str, overrides: Sequence[str], conf: Path) -> str | None:
    """Return the file of conf/ that gave `key` (dotted) its value; None where an override did, or
    nothing tells.
    """
    groups = _groups(overrides, conf)
    given = [
        override.lstrip("+~").partition("=")[0] for override in overrides if override not in groups
    ]
    if any(key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in given):
        return None
    found = (path for path, package in _files(groups, conf) if _holds(path, conf, package, key))
    return next((shown(path, conf) for path in found), None)


def _groups(overrides: Sequence[str], conf: Path) -> list[str]:
    """Return those overrides that choose a file of a group."""
    split = [(override, *override.partition("=")[::2]) for override in overrides]
    return [
        override
        for override, key, value in split
        if (conf / key).is_dir() and not value.startswith(("{", "["))
    ]


def shown(path: Path, conf: Path) -> str:
    """Return a file's path from the folder that holds conf/."""
    return str(path.relative_to(conf.parent))


def _files(groups: Sequence[str], conf: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that a composition takes its values from and their packages, the ones that
    win first.
    """
    try:
        choices = composed(groups, conf).hydra.runtime.choices
    except (HydraException, OmegaConfBaseException):
        return
    last = ["local", "experiment"]
    for group in [*last, *(name for name in choices if name not in last)]:
        path = conf / group / f"{choices.get(group)}.yaml"
        if path.is_file():
            yield path, _package(path) or group
    yield conf / "config.yaml", "_global_"


def _package(path: Path) -> str | None:
    """Return the package that a file's first line names; None where it names none.

    Hydra 1.3 reads headers up to the first line that is none (plugins/config_source.py,
    _get_header_dict).
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    first = next((line.strip() for line in lines if line.strip()), "")
    header = PACKAGE.fullmatch(first)
    return header[1] if header else None


def _holds(path: Path, conf: Path, package: str, key: str) -> bool:
    """Return whether a file sets a key, or a value in which the key is looked for in vain."""
    parts = key.split(".")
    inside = [] if package == "_global_" else package.split(".")
    if parts[: len(inside)] != inside:
        return False
    value = _read(path, conf)
    for part in parts[len(inside) :]:
        if isinstance(value, dict) and part not in value:
            return False
        value = value[part] if isinstance(value, dict) else value
    return True


def _read(path: Path, conf: Path) -> Any:
    """Return the values of a YAML file; InputError, with its name, where it cannot be read as
    such.
    """
    name = shown(path, conf)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "is no file, or a link to none"
        raise InputError(f"{name} {what}; put a YAML file in its place, or remove it")
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        if error.errno is None:  # OmegaConf's, for a number or a truth value alone
            return None
        raise InputError(
            f"{name} cannot be read ({error.strerror}); change its permissions, or remove it"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{name} is no text in UTF-8; write it anew, or remove it") from None
    except RecursionError:
        raise InputError(
            f"{name} holds an anchor (&) that refers to itself; write its value out"
        ) from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(
            f"{name} is no valid YAML: {_problem(error)}; correct it, or remove the file"
        ) from None


def _problem(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, {one_line(str(error.problem))}"
    return one_line(str(error))[:200]
