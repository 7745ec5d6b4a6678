"""Every use of an upstream name holds in every stack, by the committed index; and what the check notices, broken on purpose."""

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
                assert any(re.match(rf"{sources[name]}-{re.escape(version)}\b", part) for part in parts), (stack["name"], name, parts)


def test_index_is_small_and_made_of_these_sources():
    assert INDEX.stat().st_size < 500_000
    assert list(load()) == list(ENVIRONMENTS)


def test_command_names_what_fails(tmp_path):
    for part in ("recipes", "tests/contract", "conf/stack", "conf/model"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "__init__.py").touch()
    broken = tmp_path / "recipes" / "training" / "te.py"
    lines = broken.read_text().count("\n")
    broken.write_text(broken.read_text() + ADDED)
    done = subprocess.run([sys.executable, "-m", "tests.contract"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    at = {text: f"recipes/training/te.py:{lines + 1 + number}" for number, text in enumerate(ADDED.splitlines())}
    where = {text.strip(): place for text, place in at.items()}
    assert f"{where['from nemo.lightning import NoSuchName']}: nemo.lightning.NoSuchName is not in the index; run python" in done.stderr
    assert re.search(
        rf"{where['general_gemm(config, config, no_such_argument=1)']}: .*general_gemm at .*gemm.py:\d+ takes .*no_such_argument",
        done.stderr,
    )
    assert re.search(
        rf"{where['fp8_utils.get_fp8_context = lambda config: None']}: .* at megatron/core/fp8_utils.py:\d+ takes .*too many",
        done.stderr,
    )


UPSTREAM = {
    "__init__.py": "from .a import *\nfrom .b import Base as Renamed\ntry:\n    from .gone import late\nexcept ImportError:\n    late = None\n",
    "a.py": """
__all__ = ["call", "Config"]
from dataclasses import dataclass

@dataclass
class Config:
    size: int
    rate: float = 1.0

def call(a, b=1, *, c=2): pass
def hidden(): pass
""",
    "b.py": """
class Root:
    def __init__(self, root=1): self.root_value = root
    def hook(self, trainer, module): pass

class Base(Root):
    def __init__(self, own=1, **kwargs): super().__init__(**kwargs)
    @property
    def ready(self): return True
""",
}
CASES = {
    "from torch import hidden_name": "torch.hidden_name is missing",
    "from torch import late": None,
    "import torch\ntorch.call(1, 2, c=3)": None,
    "import torch\ntorch.call(1, 2, 3)": "too many positional",
    "import torch\ntorch.call()": "missing a required argument",
    "import torch\ntorch.call(1, d=4)": "unexpected keyword argument 'd'",
    "from torch import a as b\nb.hidden(1)": "too many positional",
    "from torch import Renamed\nRenamed(root=2, own=1)": None,
    "from torch import Renamed\nRenamed(other=2)": "unexpected keyword argument 'other'",
    "from torch import Renamed\nRenamed().ready\nRenamed().root_value": None,
    "from torch import Renamed\nRenamed().no_such": "no_such is missing",
    "from torch import Renamed\nclass Ours(Renamed):\n    def hook(self, trainer): pass": "too many positional",
    "from torch import Renamed\nclass Ours(Renamed):\n    def hook(self, *args): pass": None,
    "from torch import Renamed\nclass Ours(Renamed):\n    def hok(self, trainer, module): pass": "overrides nothing",
    "from torch import Renamed\nclass Ours(Renamed):\n    def f(self): return self.nothing": "nothing is missing",
    "from torch import a\na.call = lambda a, b=1, c=2: 0": None,
    "from torch import a\na.call = lambda a, c=2: 0": "unexpected keyword argument 'b'",
    "from torch import a\na.cal = lambda a: 0": "torch.a.cal is missing",
    "from torch import a\nif not hasattr(a, 'new'):\n    a.new = 1": None,
    "from torch import a\nif hasattr(a, 'new'):\n    a.new(1, 2)": None,
    "from torch import a\nfor name in ('call', 'new'):\n    getattr(a, name)": "torch.a.new is missing",
    "from torch import a\ngetattr(a, 'new', None)": None,
    "try:\n    from torch import new\nexcept ImportError:\n    pass": None,
    "def f():\n    try:\n        from torch import new\n    except ImportError:\n        return\n    new.call()": None,
    "import nemo_run as run\nfrom torch import Config\nrun.Config(Config, rate=1)": None,
    "import nemo_run as run\nfrom torch import Config\nrun.Config(Config, rat=1)": "unexpected keyword argument 'rat'",
    "import nemo_run as run\nfrom torch import Config\nc = run.Config(Config)\nc.size = 1": None,
    "import nemo_run as run\nfrom torch import Config\nc = run.Config(Config)\nc.siz = 1": "torch.Config(siz) is missing",
    "import inspect\nfrom torch import call\nif 'd' in inspect.signature(call).parameters:\n    call(1, d=2)": None,
    "import inspect\nfrom torch import call\nif 'c' in inspect.signature(call).parameters:\n    call(1, d=2)": "keyword argument 'd'",
}


@pytest.mark.parametrize("code", CASES)
def test_what_a_use_may_be(code, tmp_path):
    for name, text in UPSTREAM.items():
        (tmp_path / "torch" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "torch" / name).write_text(text)
    (tmp_path / "nemo_run.py").write_text("class Config:\n    def __init__(self, fn_or_cls, **kwargs): pass\n")
    ours = tmp_path / "ours.py"
    ours.write_text(code)
    sources = Sources({"torch": tmp_path, "nemo_run": tmp_path})
    uses = collect(tmp_path, [ours], Types(frozenset({"torch", "nemo_run"})))
    failures = [v.why for use in uses if (v := verdict(use, sources.fact, {})).outcome == "fails"]
    if CASES[code] is None:
        assert failures == []
    else:
        assert any(CASES[code] in why and why.startswith("ours.py:") for why in failures), failures


def test_changed_upstream_code_is_noticed():
    """A function that ours replaces, with other code in one stack, fails until it was read."""
    index = load()
    name, environment = "megatron.core.fp8_utils.get_fp8_context", "nemo_25_04 v2.3.2"
    use = next(u for u in our_uses() if u.name == name and u.kind == "patch")
    assert {r.verdict.outcome for r in results([use], index) if r.environment == environment} == {"holds"}
    fact = index[environment][name]
    index[environment][name] = type(fact)(fact.kind, fact.at, fact.calls, "another")
    why = next(r.verdict.why for r in results([use], index) if r.environment == environment)
    assert use.where in why and fact.at in why and "patches.yaml" in why


def test_reviewed_code_is_still_met():
    """patches.yaml names no version that is in no stack, which would hide that nobody looks at it."""
    known = {(name, fact.body) for facts in load().values() for name, fact in facts.items()}
    stale = [(name, body) for name, versions in read("patches.yaml").items() for body in versions if (name, body) not in known]
    assert stale == []


def test_python_of_the_containers():
    """The code compiles without warnings, and imports no module that Python 3.12 lacks."""
    for path in [p for part in ("recipes", "launch", "analysis") for p in sorted((ROOT / part).rglob("*.py"))]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = compile(path.read_text(), str(path), "exec", ast.PyCF_ONLY_AST)
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in imported} & GONE, path
