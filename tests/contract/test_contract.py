"""Every use of an upstream name holds in every stack, by the committed index.

The second half breaks things on purpose: the check names file and line.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import yaml

from tests.contract.check import verdict
from tests.contract.index import INDEX, ROOT, load, our_uses, read, results
from tests.contract.sources import Sources
from tests.contract.uses import Types, collect

ENVIRONMENTS = read("stacks.yaml")["environments"]
CASES = read("cases.yaml")
GONE = {
    "asynchat",
    "asyncore",
    "distutils",
    "imp",
    "smtpd",
}  # from the standard library of Python 3.12, which the containers have
ADDED = """

def _broken(config):
    from megatron.core import fp8_utils
    from nemo.lightning import NoSuchName
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(config, config, no_such_argument=1)
    fp8_utils.get_fp8_context = lambda config: None
"""


@functools.cache
def found():
    return results(our_uses(), load())


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_uses_hold(environment):
    here = [r.verdict for r in found() if r.environment == environment]
    assert len(here) > 1000
    assert sorted({v.why for v in here if v.outcome == "fails"}) == []


def test_little_is_unknown():
    unknown = {r.use.name for r in found() if r.verdict.outcome == "unknown"}
    assert len(unknown) <= 10, unknown


def test_every_stack_has_its_environments():
    """Each stack's environments are made of the versions that its own file names."""
    sources = {
        "nemo": "nemo",
        "megatron_core": "megatron",
        "transformer_engine": "transformer_engine",
    }
    for path in (ROOT / "conf" / "stack").glob("*.yaml"):
        stack = yaml.safe_load(path.read_text())
        made_of = [e["sources"] for e in ENVIRONMENTS.values() if stack["name"] in e["stacks"]]
        assert made_of, f"tests/contract/stacks.yaml has no environment for {path.name}"
        for name, version in stack["versions"].items():
            for parts in made_of:
                wanted = rf"{sources[name]}-{re.escape(version)}\b"
                assert any(re.match(wanted, part) for part in parts), (path, wanted, parts)


def test_index_is_small_and_made_of_these_sources():
    assert INDEX.stat().st_size < 500_000
    assert list(load()) == list(ENVIRONMENTS)


def test_command_names_what_fails(tmp_path):
    for part in ("recipes", "tests/contract", "conf/stack", "conf/model"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "__init__.py").touch()
    broken = tmp_path / "recipes" / "training" / "compat" / "transformer_engine.py"
    lines = broken.read_text().count("\n")
    broken.write_text(broken.read_text() + ADDED)
    command = [sys.executable, "-m", "tests.contract"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    broken_lines = ADDED.splitlines()

    def place(text):
        number = next(n for n, line in enumerate(broken_lines, 1) if text in line)
        return f"recipes/training/compat/transformer_engine.py:{lines + number}"

    unlisted = f"{place('NoSuchName')}: nemo.lightning.NoSuchName is not in the index; run python"
    called = rf"{place('general_gemm(')}: .*general_gemm at .*gemm.py:\d+ takes .*no_such_argument"
    replaced = rf"{place('lambda')}: .* at megatron/core/fp8_utils.py:\d+ takes .*too many"
    assert unlisted in done.stderr
    assert re.search(called, done.stderr)
    assert re.search(replaced, done.stderr)


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: " ".join(case["code"].split()))
def test_what_a_use_may_be(case, tmp_path):
    for name, text in CASES["upstream"].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    ours = tmp_path / "ours.py"
    ours.write_text(case["code"])
    packages = ("torch", "nemo_run")
    sources = Sources(dict.fromkeys(packages, tmp_path))
    uses = collect(tmp_path, [ours], Types(frozenset(packages)))
    verdicts = [verdict(use, sources.fact, {}) for use in uses]
    failures = [v.why for v in verdicts if v.outcome == "fails"]
    if case["fails"] is None:
        assert failures == []
    else:
        assert any(why.startswith("ours.py:") and case["fails"] in why for why in failures)


def test_changed_upstream_code_is_noticed():
    """A function that ours replaces, with other code in one stack, fails until it was read."""
    index = load()
    name, environment = "megatron.core.fp8_utils.get_fp8_context", "nemo_25_04 v2.3.2"
    use = next(u for u in our_uses() if u.name == name and u.kind == "patch")
    before = [r for r in results([use], index) if r.environment == environment]
    assert [r.verdict.outcome for r in before] == ["holds"]
    fact = index[environment][name]
    index[environment][name] = type(fact)(fact.kind, fact.at, fact.calls, "another")
    why = next(r.verdict.why for r in results([use], index) if r.environment == environment)
    assert use.where in why and fact.at in why and "patches.yaml" in why


def test_reviewed_code_is_still_met():
    """patches.yaml names no version that no stack has."""
    known = {(name, fact.body) for facts in load().values() for name, fact in facts.items()}
    patches = read("patches.yaml").items()
    reviewed = {(name, body) for name, versions in patches for body in versions}
    stale = sorted(reviewed - known)
    assert stale == []


def test_python_of_the_containers():
    """The code compiles without warnings, and imports no module that Python 3.12 lacks."""
    folders = ("recipes", "launch", "analysis")
    for path in [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = compile(path.read_text(), str(path), "exec", ast.PyCF_ONLY_AST)
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in imported} & GONE, path
