"""The cluster that the tests of submission share: installed if need be, started once a session,
stopped at its end.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.slurm import install
from tests.launch.slurm.cluster import Slurm


@pytest.hookimpl(tryfirst=True)  # before tests/conftest.py groups by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Four idle nodes of eight H100s.

    In CI a machine that cannot have them is a failure; elsewhere the tests skip and say why.
    """
    if reason := _absence():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def _absence() -> str | None:
    """Why there can be no cluster here, after an attempt to install what it needs."""
    try:
        install.install()
    except subprocess.SubprocessError as error:
        return str(error)
    return install.missing()
