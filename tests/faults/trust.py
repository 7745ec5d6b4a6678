"""Secrets, shells and strangers: what must not be written, run or read.

Secrets are drawn anew for each input, so that none stands in a file of the project; then every byte that was written or printed
is searched for them.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from analysis import report
from launch.__main__ import main
from launch.job import write_job
from recipes.compose import compose_plan
from recipes.plan import Plan
from tests.faults.commands import REFUSED, Ended, call
from tests.faults.load import SLURM, pretended_slurm, stub_python
from tests.faults.mutations import HOSTILE
from tests.faults.registry import Outcome, fault
from tests.faults.run_folders import DEMO, PROJECT

AREA = "Secrets and trust"
BASE62 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def _drawn(length: int, alphabet: str = BASE62) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))


def planted() -> dict[str, str]:
    """Return secrets as they are issued, by the variable that holds each."""
    return {
        "HF_TOKEN": f"hf_{_drawn(34)}",
        "HUGGING_FACE_HUB_TOKEN": f"hf_{_drawn(34)}",
        "WANDB_API_KEY": secrets.token_hex(20),
        "AWS_ACCESS_KEY_ID": f"AKIA{_drawn(16, 'ABCDEFGHIJKLMNOPQRSTUVWXYZ234567')}",
        "AWS_SECRET_ACCESS_KEY": _drawn(40),
        "AWS_SESSION_TOKEN": _drawn(200),
        "AZURE_STORAGE_KEY": base64.b64encode(secrets.token_bytes(64)).decode(),
        "GOOGLE_API_KEY": f"AIza{_drawn(35)}",
        "NGC_API_KEY": f"nvapi-{_drawn(64)}",
        "GITHUB_TOKEN": f"ghp_{_drawn(36)}",
        "OPENAI_API_KEY": f"sk-{_drawn(48)}",
        "https_proxy": f"http://me:{_drawn(20)}@proxy.site:3128",
        "SSH_PRIVATE_KEY": f"-----BEGIN OPENSSH PRIVATE KEY-----\\n{_drawn(64)}",
    }


def bare(secret: str) -> bytes:
    """Return the part of a secret that nobody may learn."""
    return secret.removeprefix("-----BEGIN OPENSSH PRIVATE KEY-----\\n").removeprefix("http://me:").removesuffix("@proxy.site:3128").encode()


def leaks(secret: str, folder: Path, *texts: str) -> str | None:
    """Return where a secret is found among all files under a folder and what was printed; None for nowhere."""
    found = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and bare(secret) in p.read_bytes()]
    found += ["what was printed"] if any(bare(secret) in text.encode(errors="replace") for text in texts) else []
    return ", ".join(found) or None


@fault(AREA, "HF, W&B, cloud, proxy and other secrets in the environment of a launch, a run and a report", small=3, full=13)
def secrets_in_the_environment(count: int, folder: Path) -> Outcome:
    """Everything is launched with all secrets in the environment; `count` of them are searched for in what was written and printed."""
    outcome, all_secrets = Outcome(), planted()
    written = folder / "written"
    stub = stub_python(folder / "stub", "exit 0")["STUB"]
    with mock.patch.dict(os.environ, {**pretended_slurm(folder), **all_secrets}), mock.patch.object(sys, "executable", stub):
        ends = [
            call(main, [*SLURM, f"runs_dir={written}", "run_name=slurm"]),
            call(main, [f"runs_dir={written}", "run_name=here"]),
            call(main, [*SLURM, f"runs_dir={written}", "dry_run=true", "--json"]),
            call(report.main, [*DEMO, "--out", written / "report.html"]),
        ]
    printed = [text for end in ends for text in (end.out, end.err, end.trace)]
    wrong = next((end.wrong((0, 1)) for end in ends if end.wrong((0, 1))), None)
    for name, secret in list(all_secrets.items())[:count]:
        where = leaks(secret, written, *printed)
        outcome.add("found nowhere", lost=wrong or (where and f"{name} is in {where}"))
    return outcome


def _places(name: str, secret: str) -> Iterator[tuple[str, list[str]]]:
    """Yield ways to pass a secret on the command line that a hurried user might take."""
    value = "'" + secret.replace("\\", "\\\\") + "'"
    yield "its own variable", [f"+cluster.environment.{name}={value}"]
    yield "another variable", [f"+cluster.environment.SETTING={value}"]
    yield "the environment, by interpolation", [f"+cluster.environment.SETTING=${{oc.env:{name}}}"]
    yield "a flag of srun", [f"cluster.extra_srun=['--export={name}={secret}']".replace("\\", "\\\\")]
    yield "a flag of sbatch", [f"cluster.extra_sbatch=['--export={name}={secret}']".replace("\\", "\\\\")]
    yield "in place of its file", [f"+cluster.token_files.{name}={value}"]


@fault(AREA, "the same secrets in overrides: as variables, flags, interpolations, in place of a file", small=20, full=100)
def secrets_in_overrides(count: int, folder: Path) -> Outcome:
    """Refused without being repeated, and in no file."""
    outcome = Outcome()
    ways = [(name, how, overrides, secret) for name, secret in planted().items() for how, overrides in _places(name, secret)]
    for n, (name, how, overrides, secret) in enumerate(ways[:: max(1, len(ways) // count)]):
        written = folder / f"runs{n}"
        written.mkdir()
        known = {name: secret} if "environment" in how or how == "another variable" else {}
        with mock.patch.dict(os.environ, {**pretended_slurm(folder), **known}):
            ended = call(main, [*SLURM, *overrides, f"runs_dir={written}", "run_name=one"])
        where = leaks(secret, written, ended.out, ended.err, ended.trace)
        wrong = ended.wrong(()) or (where and f"found in {where}")
        outcome.add(f"{REFUSED} that does not repeat it", lost=wrong and f"{name} as {how}: {wrong}")
    return outcome


@fault(AREA, "the same secrets in site files (values, comments, files that are not used), with and without git", small=4, full=26)
def secrets_in_site_files(count: int, folder: Path) -> Outcome:
    """The project lies elsewhere, with a site's files: conf/local/site.yaml is never copied, another file with a secret is refused."""
    outcome, project = Outcome(), folder / "project"
    for part in ("recipes", "launch", "conf"):
        shutil.copytree(PROJECT / part, project / part, ignore=shutil.ignore_patterns("__pycache__", "site.yaml", "training"))
    ways = [(name, secret, place) for name, secret in planted().items() for place in ("conf/local/site.yaml", "conf/cluster/mine.yaml")]
    for n, (name, secret, place) in enumerate(ways[:: max(1, len(ways) // count)]):
        written, file = folder / f"runs{n}", project / place
        written.mkdir()
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"# @package cluster\n# once was {name}: {secret}\naccount: mine\n")
        env = {**os.environ, **pretended_slurm(folder), "PYTHONSAFEPATH": "1", "PYTHONPATH": str(project), "GIT_CEILING_DIRECTORIES": str(folder)}
        command = [sys.executable, "-m", "launch", *SLURM, f"runs_dir={written}", "run_name=one"]
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
        file.unlink()
        expected = 0 if place.endswith("site.yaml") else 2
        where = leaks(secret, written, done.stdout, done.stderr)
        wrong = f"found in {where}" if where else None if done.returncode == expected else f"exit code {done.returncode}: {done.stderr[-200:]}"
        what = "launched, found nowhere" if expected == 0 else f"{REFUSED}, found nowhere"
        outcome.add(what, lost=wrong and f"{name} in a comment of {place}: {wrong}")
    return outcome


SRUN = """#!/bin/bash
{ printf '%s\\0' "$@"; printf '%s\\0' "ENV $TEXT"; } > "$RECORD/srun"
while [[ $# -gt 0 && $1 != bash ]]; do shift; done
exec "$@"
"""
SHELL = (
    *(
        "$(touch owned)",
        "`touch owned`",
        "; touch owned;",
        "& touch owned &",
        "| touch owned",
        "> owned",
        "' ; touch owned ; '",
        '" ; touch owned ; "',
    ),
    *("${PATH}", "$HOME", "~", "*", "?", "[a-z]", "{a,b}", "!!", "# comment", "\\", "\\\\n", "%s%n", "--flag", "-", "a  b", "é漢", "<(touch owned)"),
    *("$'\\x41'", "((touch owned))", "a=b", ",", "''", "\u202e"),
)


@fault(AREA, "shell metacharacters in every text of a plan that reaches the job's script, run in bash", small=6, full=100)
def shell_metacharacters(count: int, folder: Path) -> Outcome:
    """The script runs with stand-ins for srun and the interpreter, which write down what reached them: the text itself, and nothing ran."""
    outcome = Outcome()
    texts = [*SHELL, *(text for text in HOSTILE if text.isprintable())]
    for n, text in enumerate(texts[:count]):
        place = folder / f"case{n}"
        place.mkdir()
        wrong = _run_script(place, text)
        outcome.add("reached the job as text", lost=wrong and f"{text!r}: {wrong}")
    return outcome


def _run_script(place: Path, text: str) -> str | None:
    name = text.replace("/", "_")
    python = place / "bin" / f"python{name}"
    stub_python(place / "bin", f'printf "%s\\0" "$@" > {shlex.quote(str(place))}/"python.$2"')
    (place / "bin" / "python").rename(python)
    (place / "tools").mkdir()
    for tool, does in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho n0\n")):
        (place / "tools" / tool).write_text(does)
        (place / "tools" / tool).chmod(0o755)
    token = place / f"token{name}"
    token.write_text("of no value")
    plan = _poisoned(text, python, token, place / f"runs{name}")
    script = write_job(plan)
    named = [shlex.split(line.removeprefix("#SBATCH "), comments=True)[0] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    env = {"PATH": f"{place}/tools:{os.environ['PATH']}", "RECORD": str(place), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n0", "SLURM_NNODES": "1"}
    env |= {"SLURM_LOCALID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    done = subprocess.run(["bash", str(script)], cwd=place, env=env, capture_output=True, text=True)
    if done.returncode:
        return f"the script failed: {done.stderr[-300:]}"
    if list(place.rglob("owned")):
        return "a command in the text was run"
    reached = (place / "srun").read_bytes().decode().split("\0")
    run = str(place / f"runs{name}" / "one")
    trained = (place / "python.recipes.training.run").read_bytes().decode().split("\0")
    expected = {
        "the variable": f"ENV {text}" in reached,
        "srun's flag": text in reached and f"--mpi={text}" in reached,
        "the mount": any(flag.startswith("--container-mounts=") and flag.endswith(f",{text}") for flag in reached),
        "sbatch's flags": {text, f"--account={text}", f"--partition={text}"} <= set(named),
        "the run folder": trained[2] == run,
    }
    return ", ".join(what for what, arrived in expected.items() if not arrived) or None


def _poisoned(text: str, python: Path, token: Path, runs: Path) -> Plan:
    flags = [*SLURM, "cluster.container_runtime=pyxis", f"runs_dir={json.dumps(str(runs.parent))}", "run_name=one"]
    plan = compose_plan(flags)
    changed = {
        "account": text,
        "partition": text,
        "qos": text,
        "reservation": text,
        "mpi": text,
        "container_image": text,
        "python": str(python),
        "mounts": (text,),
        "extra_sbatch": (text,),
        "extra_srun": (text,),
        "environment": {"TEXT": text},
        "token_files": {"NAMED": str(token)},
    }
    tree = plan.model_dump() | {"runs_dir": str(runs)}
    tree["cluster"] |= changed
    tree["mapping"] |= {"source": f"{text}\ntouch owned"}
    tree["stack"] |= {"container": text}
    return Plan.model_validate(tree)


@fault(AREA, "control characters in texts and paths that stand in a script", small=8, full=8)
def control_characters(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    fields = ("cluster.account", "cluster.python", "data.root", "runs_dir", "+cluster.environment.A", "+cluster.token_files.A", "cluster.extra_srun")
    for field in fields[:count]:
        value = '["a\nb"]' if field.endswith("srun") else '"a\nb"'
        place = [] if field == "runs_dir" else [f"runs_dir={folder}/runs"]
        ended = call(main, [*SLURM, f"{field}={value}", *place, "dry_run=true"])
        outcome.add(REFUSED, lost=(wrong := ended.wrong(())) and f"{field}: {wrong}")
    inside = folder / "a\ntouch owned"
    inside.mkdir()
    command = [sys.executable, "-m", "launch", *SLURM, "runs_dir=runs", "dry_run=true"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=inside, env=environment, capture_output=True, text=True)
    wrong = Ended(done.returncode, done.stdout, done.stderr).wrong(())
    outcome.add(REFUSED, lost=wrong and f"a working folder whose name has a line end: {wrong}")
    return outcome


@fault(AREA, "files of job and run folders, written under umask 000: who may read them", small=100, full=100_000)
def private_folders(count: int, folder: Path) -> Outcome:
    outcome, before = Outcome(), os.umask(0)
    try:
        stub = stub_python(folder / "stub", 'echo "{}" > "$3/manifest.json"')["STUB"]
        with mock.patch.dict(os.environ, pretended_slurm(folder)), mock.patch.object(sys, "executable", stub):
            call(main, [*SLURM, f"runs_dir={folder}/runs", "run_name=slurm"])
            call(main, [f"runs_dir={folder}/runs", "run_name=here"])
        umasks = [path.read_text().strip() for path in (folder / "jobs").glob("*/umask")]
    finally:
        os.umask(before)
    written = sorted((folder / "runs").rglob("*"))
    assert {"log.txt", "manifest.json", "job.sbatch", "submitted.jsonl", "plan.json"} <= {path.name for path in written}
    for path in written[:count]:
        others = stat.S_IMODE(path.stat().st_mode) & 0o077
        outcome.add("its owner alone", lost=f"{path.relative_to(folder)}: {others:o}" if others else None)
    outcome.add("its owner alone", lost=None if umasks == ["0077"] else f"Slurm's job begins with umask {umasks}")
    return outcome


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__", "read_pickle", "to_pickle", "unsafe_load", "full_load", "system", "popen"}


@fault(AREA, "modules of analysis, searched for pickle, torch.load, eval and unsafe YAML", small=1000, full=1000)
def no_code_from_data(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    for path in sorted((PROJECT / "analysis").rglob("*.py"))[:count]:
        found = sorted(set(_dangers(ast.parse(path.read_text()))))
        outcome.add("reads data alone", lost=f"{path.relative_to(PROJECT)}: {', '.join(found)}" if found else None)
    return outcome


def _dangers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            plain = not (isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "re.compile")
            if (name in CALLS and plain) or any(k.arg == "allow_pickle" for k in node.keywords) or ast.unparse(node.func) in ("yaml.load", "np.load"):
                yield ast.unparse(node.func)
