"""What do NVIDIA's performance scripts build for a cell?  They are executed, from a NeMo source
tree, with the NeMo installed.

`scripts/performance` of the tree is no part of NeMo's wheel.  A script makes a recipe and a Slurm
executor and hands both to an experiment; here an experiment keeps them, and nothing is submitted.
`recipe_fields` turns a recipe, theirs or ours, into one value a field, with the defaults of every
class filled in.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import runpy
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import fiddle as fdl
import nemo_run as run
import torch
from nemo import package_info
from nemo_run.config import get_nemorun_home

from recipes.errors import InputError
from recipes.plan import Plan
from recipes.training.recipe import build
from recipes.upstream.nvidia_scripts import as_text

PACKAGE = "scripts.performance"
ARGUMENTS = (
    "--account=NONE",
    "--partition=NONE",
    "--max_steps={steps}",
    "--gpu={gpu}",
    "--compute_dtype={dtype}",
    "--fp8_recipe={recipe}",
)


def installed() -> str:
    """Return the version of the NeMo that is installed: "2.3.2"."""
    return str(package_info.__version__)


def ours(plan: Plan) -> dict[str, str]:
    """Return the fields of the recipe that this project builds for a plan."""
    return recipe_fields(build(plan, Path("RUN")))


class Kept:
    """In place of NeMo-Run's experiment: keeps what a script adds to it."""

    recipe: Any = None
    executor: Any = None

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> type[Kept]:
        return Kept

    def __exit__(self, *_: Any) -> None: ...

    @staticmethod
    def add(recipe: Any, executor: Any, plugins: list[Any], **_: Any) -> None:
        """Keep recipe and executor, changed by the plugins as NeMo-Run has them do."""
        for plugin in plugins:
            plugin.setup(recipe, executor)
        Kept.recipe, Kept.executor = recipe, executor

    @staticmethod
    def dryrun() -> None:
        """Submit nothing."""


class Job(types.SimpleNamespace):
    """In place of NeMo-Run's Slurm executor: keeps what it is made of, by any version of NeMo-Run's
    names.
    """

    setup_lines: str | None = None


def theirs(tree: Path, plan: Plan, dtype: str, recipe: str) -> dict[str, str]:
    """Return the fields of the recipe that the script of the plan's model builds, and its job's
    environment.
    """
    values = {"steps": plan.train.max_steps, "gpu": plan.gpu.name, "dtype": dtype, "recipe": recipe}
    arguments = [argument.format(**values) for argument in ARGUMENTS]
    arguments += [
        f"--gpus_per_node={plan.gpu.devices_per_node}",
        f"--log_dir={get_nemorun_home()}",
        "--dryrun",
    ]
    with (
        _scripts(tree),
        mock.patch.multiple(run, Experiment=Kept, SlurmExecutor=Job),
        mock.patch.object(sys, "argv", ["script", *arguments]),
        _quiet(),
    ):
        runpy.run_module(f"{PACKAGE}.llm.pretrain_{plan.model.name}", run_name="__main__")
    executor = Kept.executor
    flags = " ".join(
        [
            *executor.srun_args,
            *getattr(getattr(executor, "launcher", None), "template_vars", {}).values(),
        ]
    )
    job = {
        "cluster.mpi": next(
            flag.partition("=")[2] for flag in flags.split() if flag.startswith("--mpi=")
        ),
        "cluster.vboost": str("boost-slider --vboost 1" in (executor.setup_lines or "")),
        "gpu.gpus_per_numa_node": flags.partition("SLURM_LOCALID/")[2].partition(")")[0],
    }
    environment = {
        f"environment.{name}": value
        for name, value in executor.env_vars.items()
        if name != "NEMORUN_HOME"
    }  # a path of this machine
    return {**recipe_fields(Kept.recipe), **job, **environment}


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _scripts(tree: Path) -> Iterator[None]:
    """Let the tree's scripts be imported, and of the tree nothing else."""
    package = types.ModuleType("scripts")
    package.__path__ = [str(tree / "scripts")]
    with mock.patch.dict(sys.modules, {"scripts": package}):
        for name in [name for name in sys.modules if name.startswith("scripts.")]:
            del sys.modules[name]
        _completed()
        yield


def _completed() -> None:
    """Make NeMo v2.4.0's scripts run: an option that they use is nowhere defined.

    scripts/performance/helpers.py:407 reads `use_fsdp_double_buffer` as a name, and two scripts
    take it from the command line, which does not know it, and pass it to a function that does not
    either.  It is None wherever it is documented.
    """
    name, parser = "use_fsdp_double_buffer", importlib.import_module(f"{PACKAGE}.argument_parser")
    try:
        helpers = importlib.import_module(f"{PACKAGE}.helpers")
    except ModuleNotFoundError:  # NeMo 2.3
        return
    make, set_configs = parser.parse_cli_args, helpers.set_primary_perf_configs
    if name in inspect.signature(set_configs).parameters:
        return

    def parse_cli_args() -> Any:
        made = make()
        made.set_defaults(**{name: None})
        return made

    def set_primary_perf_configs(*args: Any, **given: Any) -> Any:
        given.pop(name, None)
        return set_configs(*args, **given)

    setattr(helpers, name, None)
    helpers.set_primary_perf_configs, parser.parse_cli_args = (
        set_primary_perf_configs,
        parse_cli_args,
    )


def check_tree(tree: Path, version: str) -> None:
    """Raise InputError where the tree's scripts cannot be executed with the NeMo that is
    installed.
    """
    if installed() != version:
        packages = f"nemo_toolkit=={version} and its megatron-core"
        raise InputError(
            f"{tree} is NeMo {version} and NeMo {installed()} is installed here; run this in the"
            f" container of that NeMo, or put {packages} into a folder (pip install --no-deps"
            " --target) and name it in PYTHONPATH"
        )


# -------------------------------------------------------------------------------- a recipe's fields


def recipe_fields(recipe: Any) -> dict[str, str]:
    """Return every field of a recipe as text, by its dotted path; callbacks by their class."""
    return dict(_fields(recipe, ""))


def _fields(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, fdl.Buildable):
        target = fdl.get_callable(value)
        yield f"{path}.__fn__".lstrip("."), f"{target.__module__}.{target.__qualname__}"
        values = {**_defaults(target), **value.__arguments__}
        for name in sorted(map(str, values)):
            yield from _fields(values[name], f"{path}.{name}".lstrip("."))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _fields(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, list | tuple) and any(isinstance(item, fdl.Buildable) for item in value):
        for item in value:
            yield from _fields(item, f"{path}[{fdl.get_callable(item).__name__}]")
    else:
        yield path, _text(value)


def _defaults(target: Any) -> dict[str, Any]:
    """Return the defaults of what a config would call; of a dataclass, fields with a factory
    too.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a class of Python's own, such as timedelta
        return {}
    found = {
        name: p.default
        for name, p in parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    if dataclasses.is_dataclass(target):
        factories = {
            f.name: f.default_factory()
            for f in dataclasses.fields(target)
            if f.default_factory is not dataclasses.MISSING and f.init
        }
        found |= factories
    return found


def _text(value: Any) -> str:
    if isinstance(value, str | int | float | bool | type(None) | list | dict | tuple | torch.dtype):
        return as_text(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))
