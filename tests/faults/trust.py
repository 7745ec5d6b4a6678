"""Secrets, shells and strangers: what must not be written, run or read.

Secrets are drawn anew for each input, so that none stands in a file of the project; then every byte
that was written or printed is searched for them.
"""

from __future__ import annotations

import base64
import gzip
import io
import os
import pickle
import random
import secrets
import shlex
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from analysis import compare, import_logs, report, throughput
from analysis.speed import full_depth_table
from launch import status
from launch.__main__ import main
from tests.faults.commands import REFUSED, call, in_a_process, what_came_out
from tests.faults.elsewhere import elsewhere
from tests.faults.load import SLURM, pretended_slurm, stub_python
from tests.faults.mutations import HOSTILE, fresh, quoted
from tests.faults.registry import Outcome, fault
from tests.faults.run_folders import DEMO

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
    return (
        secret.removeprefix("-----BEGIN OPENSSH PRIVATE KEY-----\\n")
        .removeprefix("http://me:")
        .removesuffix("@proxy.site:3128")
        .encode()
    )


def leaks(secret: str, folder: Path, *texts: str) -> str | None:
    """Return where a secret is found among all files under a folder and what was printed; None for
    nowhere.
    """
    found = [
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and bare(secret) in p.read_bytes()
    ]
    found += (
        ["what was printed"]
        if any(bare(secret) in text.encode(errors="replace") for text in texts)
        else []
    )
    return ", ".join(found) or None


@fault(
    AREA,
    "HF, W&B, cloud, proxy and other secrets in the environment of a launch, a run and a report",
    small=3,
    full=13,
)
def secrets_in_the_environment(count: int, folder: Path) -> Outcome:
    """Everything is launched with all secrets in the environment; `count` of them are searched for
    in what was written and printed.
    """
    outcome, all_secrets = Outcome(), planted()
    written = folder / "written"
    stub = stub_python(folder / "stub", "exit 0")["STUB"]
    with (
        mock.patch.dict(os.environ, {**pretended_slurm(folder), **all_secrets}),
        mock.patch.object(sys, "executable", stub),
    ):
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
    yield (
        "a flag of srun",
        [f"cluster.extra_srun=['--export={name}={secret}']".replace("\\", "\\\\")],
    )
    yield (
        "a flag of sbatch",
        [f"cluster.extra_sbatch=['--export={name}={secret}']".replace("\\", "\\\\")],
    )
    yield "in place of its file", [f"+cluster.token_files.{name}={value}"]


@fault(
    AREA,
    "the same secrets in overrides: as variables, flags, interpolations, in place of a file",
    small=20,
    full=100,
)
def secrets_in_overrides(count: int, folder: Path) -> Outcome:
    """Refused without being repeated, and in no file."""
    outcome = Outcome()
    ways = [
        (name, how, overrides, secret)
        for name, secret in planted().items()
        for how, overrides in _places(name, secret)
    ]
    for n, (name, how, overrides, secret) in enumerate(ways[:: max(1, len(ways) // count)]):
        written = folder / f"runs{n}"
        written.mkdir()
        known = {name: secret} if "environment" in how or how == "another variable" else {}
        with mock.patch.dict(os.environ, {**pretended_slurm(folder), **known}):
            ended = call(main, [*SLURM, *overrides, f"runs_dir={written}", "run_name=one"])
        where = leaks(secret, written, ended.out, ended.err, ended.trace)
        wrong = ended.wrong(()) or (where and f"found in {where}")
        outcome.add(
            f"{REFUSED} that does not repeat it", lost=wrong and f"{name} as {how}: {wrong}"
        )
    return outcome


@fault(
    AREA,
    "the same secrets in site files (values, comments, files that are not used), with and"
    " without git",
    small=4,
    full=26,
)
def secrets_in_site_files(count: int, folder: Path) -> Outcome:
    """The project lies elsewhere, with a site's files: conf/local/site.yaml is never copied,
    another file with a secret is refused.
    """
    outcome, kinds = Outcome(), ("conf/local/site.yaml", "conf/cluster/mine.yaml")
    ways = [(name, secret, place) for name, secret in planted().items() for place in kinds]
    with elsewhere(folder / "project", pretended_slurm(folder)) as project:
        for n, (name, secret, place) in enumerate(ways[:: max(1, len(ways) // count)]):
            written, file = folder / f"runs{n}", project.root / place
            written.mkdir()
            file.write_text(f"# @package cluster\n# once was {name}: {secret}\naccount: mine\n")
            ended = project.launch([*SLURM, f"runs_dir={written}", "run_name=one"])
            file.unlink()
            kept = place.endswith("site.yaml")
            where = leaks(secret, written, ended.out, ended.err, ended.trace)
            wrong = f"found in {where}" if where else ended.wrong((0,) if kept else ())
            wrong = wrong or (
                None if ended.code == (0 if kept else 2) else f"exit code {ended.code}"
            )
            what = "launched, found nowhere" if kept else f"{REFUSED}, found nowhere"
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
    *(
        "${PATH}",
        "$HOME",
        "~",
        "*",
        "?",
        "[a-z]",
        "{a,b}",
        "!!",
        "# comment",
        "\\",
        "\\\\n",
        "%s%n",
        "--flag",
        "-",
        "a  b",
        "é漢",
        "<(touch owned)",
    ),
    *("$'\\x41'", "((touch owned))", "a=b", ",", "''", "\u202e"),
)


@fault(
    AREA,
    "shell metacharacters in every text of a plan that reaches the job's script: `launch`, and the"
    " script run in bash",
    small=6,
    full=100,
)
def shell_metacharacters(count: int, folder: Path) -> Outcome:
    """The script runs with stand-ins for srun and the interpreter, which write down what reached
    them: the text itself, and nothing ran.
    """
    outcome = Outcome()
    texts = [*SHELL, *(text for text in HOSTILE if text.isprintable())]
    for n, text in enumerate(texts[:count]):
        place = folder / f"case{n}"
        place.mkdir()
        came, wrong = _launched(place, text)
        outcome.add(came, lost=wrong and f"{text!r}: {wrong}")
    return outcome


def _launched(place: Path, text: str) -> tuple[str, str | None]:
    """Launch a job with `text` in every field, run its script; return what came out, and what is
    wrong.
    """
    name = text.replace("/", "_")
    runs, python, token = (
        place / f"runs{name}",
        place / "bin" / f"python{name}",
        place / f"token{name}",
    )
    stub_python(place / "bin", f'printf "%s\\0" "$@" > {shlex.quote(str(place))}/"python.$2"')
    (place / "bin" / "python").rename(python)
    token.write_text("of no value")
    tools = pretended_slurm(place)
    for tool, does in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho n0\n")):
        (place / "tools" / tool).write_text(does)
        (place / "tools" / tool).chmod(0o755)
    with mock.patch.dict(os.environ, tools):
        ended = call(main, _poisoned(text, python, token, runs))
    if ended.code:
        return REFUSED, ended.wrong(())
    ran = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n0",
        "SLURM_NNODES": "1",
        "SLURM_LOCALID": "0",
    }
    env = {**tools, **ran, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "RECORD": str(place)}
    script = runs / "one" / "job" / "job.sbatch"
    done = subprocess.run(["bash", str(script)], cwd=place, env=env, capture_output=True, text=True)
    if done.returncode:
        return "", f"the script failed: {done.stderr[-300:]}"
    if list(place.rglob("owned")):
        return "", "a command in the text was run"
    return "reached the job as text", _not_arrived(place, script, text)


def _not_arrived(place: Path, script: Path, text: str) -> str | None:
    """Return where the text was to arrive and did not."""
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    named = [shlex.split(line.removeprefix("#SBATCH "), comments=True)[0] for line in directives]
    reached = (place / "srun").read_bytes().decode().split("\0")
    trained = (place / "python.recipes.training.run").read_bytes().decode().split("\0")
    mounts = [flag for flag in reached if flag.startswith("--container-mounts=")]
    expected = {
        "the variable": f"ENV {text}" in reached,
        "srun's flag": f"--comment={text}" in reached and f"--mpi={text}" in reached,
        "the mount": any(flag.endswith(f",/a:/{text}") for flag in mounts),
        "sbatch's flags": (
            {f"--comment={text}", f"--account={text}", f"--partition={text}"} <= set(named)
        ),
        "the run folder": trained[2] == str(script.parents[1]),
    }
    return ", ".join(what for what, arrived in expected.items() if not arrived) or None


def _poisoned(text: str, python: Path, token: Path, runs: Path) -> list[str]:
    """Return a launch command with `text` in every field that reaches the job's script."""
    fields = {
        **{
            f"cluster.{field}": text
            for field in ("account", "partition", "qos", "reservation", "mpi", "container_image")
        },
        "stack.container": text,
        "cluster.python": str(python),
        "cluster.mounts": [f"/a:/{text}"],
        "cluster.extra_sbatch": [f"--comment={text}"],
        "cluster.extra_srun": [f"--comment={text}"],
        "+cluster.environment.TEXT": text,
        "+cluster.token_files.NAMED": str(token),
        "runs_dir": str(runs),
        "run_name": "one",
    }
    return [
        *SLURM,
        "cluster.container_runtime=pyxis",
        *(f"{key}={quoted(value)}" for key, value in fields.items()),
    ]


@fault(AREA, "control characters in texts and paths that stand in a script", small=8, full=8)
def control_characters(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    fields = (
        "cluster.account",
        "cluster.python",
        "data.root",
        "runs_dir",
        "+cluster.environment.A",
        "+cluster.token_files.A",
        "cluster.extra_srun",
    )
    for field in fields[:count]:
        value = '["a\nb"]' if field.endswith("srun") else '"a\nb"'
        place = [] if field == "runs_dir" else [f"runs_dir={folder}/runs"]
        ended = call(main, [*SLURM, f"{field}={value}", *place, "dry_run=true"])
        outcome.add(REFUSED, lost=(wrong := ended.wrong(())) and f"{field}: {wrong}")
    inside = folder / "a\ntouch owned"
    inside.mkdir()
    wrong = in_a_process("launch", [*SLURM, "runs_dir=runs", "dry_run=true"], cwd=inside).wrong(())
    outcome.add(REFUSED, lost=wrong and f"a working folder whose name has a line end: {wrong}")
    return outcome


@fault(
    AREA,
    "files of job and run folders, written under umask 000: who may read them",
    small=100,
    full=1000,
)
def private_folders(count: int, folder: Path) -> Outcome:
    outcome, before = Outcome(), os.umask(0)
    try:
        stub = stub_python(folder / "stub", 'echo "{}" > "$3/manifest.json"')["STUB"]
        with (
            mock.patch.dict(os.environ, pretended_slurm(folder)),
            mock.patch.object(sys, "executable", stub),
        ):
            call(main, [*SLURM, f"runs_dir={folder}/runs", "run_name=slurm"])
            call(main, [f"runs_dir={folder}/runs", "run_name=here"])
        umasks = [path.read_text().strip() for path in (folder / "jobs").glob("*/umask")]
    finally:
        os.umask(before)
    written = sorted((folder / "runs").rglob("*"))
    assert {"log.txt", "manifest.json", "job.sbatch", "submitted.jsonl", "plan.json"} <= {
        path.name for path in written
    }
    for path in written[:count]:
        others = stat.S_IMODE(path.stat().st_mode) & 0o077
        outcome.add(
            "its owner alone", lost=f"{path.relative_to(folder)}: {others:o}" if others else None
        )
    outcome.add(
        "its owner alone",
        lost=None if umasks == ["0077"] else f"Slurm's job begins with umask {umasks}",
    )
    return outcome


class _Touch:
    """What leaves the file `owned` where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.place,)


def _code(place: Path) -> dict[str, bytes]:
    """Return files that run code in a reader that trusts them."""
    array, packed = io.BytesIO(), pickle.dumps(_Touch(place))
    np.save(array, np.array([_Touch(place)], dtype=object), allow_pickle=True)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", packed)  # as torch.save does
    return {
        "pickle": packed,
        "text pickle": pickle.dumps(_Touch(place), protocol=0),
        "numpy": array.getvalue(),
        "torch": zipped.getvalue(),
        "gzip": gzip.compress(packed),
        "YAML": (
            "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path"
            f" ['{place}']]".encode()
        ),
        "Python": f"__import__('pathlib').Path({str(place)!r}).touch()".encode(),
    }


@fault(
    AREA,
    "pickles, NumPy and torch archives, YAML tags and Python in place of a file of a run folder or"
    " a log: analysis, `launch.status`",
    small=14,
    full=280,
)
def code_in_place_of_data(count: int, folder: Path) -> Outcome:
    """Nothing in the files is run."""
    outcome, owned = Outcome(), folder / "owned"
    payloads, logs = (
        _code(owned),
        (
            "a.log",
            "a.log.gz",
            "a.csv",
            "events.out.tfevents.1",
            "a.wandb",
        ),
    )
    readers = (compare.main, report.main, throughput.main, full_depth_table.main, status.main)
    for n in range(count):
        draw, kind = random.Random(n), list(payloads)[n % len(payloads)]
        if n % 3:
            runs = [fresh(run, folder / run.name) for run in DEMO]
            path, main = draw.choice(sorted(runs[-1].iterdir())), readers[n % len(readers)]
            path.write_bytes(payloads[kind])
            options = ["--out", folder / "report.html"] if main is report.main else []
            ended = call(main, [*runs, *options])
        else:
            path = folder / logs[n // 3 % len(logs)]
            path.write_bytes(payloads[kind])
            asked = ["--set", "model=llama3_tiny", "precision=bf16", "gpu=cpu"]
            ended = call(import_logs.main, [path, "--out", folder / "imported", *asked])
        wrong = "the file's code was run" if owned.exists() else ended.wrong()
        outcome.add(what_came_out(ended), lost=wrong and f"{kind} as {path.name}: {wrong}")
    return outcome
