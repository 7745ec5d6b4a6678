"""The text of a job: one readable bash script, for Slurm or for this machine, made from the plan
and nothing else.

Every value that comes from a plan is quoted for the shell here, so that no name or path can become
a command.  The templates beside this file hold what is the same for all jobs.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipes.environment import Variable, variables
from recipes.errors import InputError, one_line
from recipes.plan import Plan
from recipes.run_folder import PORT_TAKEN, SESSION, folder_of

TEMPLATES = Path(__file__).parent / "templates"
UNWRITABLE = re.compile(
    "[\x00-\x1f\x7f\ud800-\udfff]"
)  # control characters, and bytes of a path that are no text
RACK_NODES = (
    18  # nodes of a GB200 NVL72 rack, the largest block that sbatch --segment keeps together
)


def run_folder(plan: Plan) -> Path:
    """Return the plan's run folder as the job sees it; InputError where its path has control
    characters, which end an #SBATCH line.
    """
    path = folder_of(plan).absolute()
    if UNWRITABLE.search(str(path)):
        raise InputError(
            f"{path}: a path with control characters, or none that is text, cannot stand in a job's"
            " script; launch in another folder"
        )
    return path


def job_folder(plan: Plan) -> Path:
    """Return the folder of the job's script and code, inside the run folder."""
    return run_folder(plan) / "job"


def nodes(plan: Plan) -> int:
    """Return the number of nodes."""
    return -(-plan.num_gpus // plan.gpu.devices_per_node)


def tasks_per_node(plan: Plan) -> int:
    """Return the processes a node runs: one a device."""
    return min(plan.num_gpus, plan.gpu.devices_per_node)


def segment(plan: Plan) -> int | None:
    """Return the nodes of a block inside one NVLink domain, the largest divisor that fits a rack;
    None where it has no meaning.

    NeMo v2.3.2 scripts/performance/utils.py:104-110.
    """
    count = nodes(plan)
    if plan.cluster.segment is None or plan.gpu.nvlink_domain is None or count <= RACK_NODES:
        return None
    return max(size for size in range(1, RACK_NODES + 1) if count % size == 0)


def directives(plan: Plan) -> list[tuple[str, str]]:
    """Return the #SBATCH flags, each with its reason or an empty string."""
    c, e = plan.cluster, plan.executor
    named = [
        ("account", c.account),
        ("partition", c.partition),
        ("qos", c.qos),
        ("reservation", c.reservation),
    ]
    per_node = tasks_per_node(plan)
    return [
        (f"--job-name={shlex.quote(plan.run_name)}", ""),
        *((f"--{flag}={shlex.quote(value)}", "") for flag, value in named if value),
        (f"--nodes={nodes(plan)}", ""),
        (f"--ntasks-per-node={per_node}", "one process a GPU"),
        *_gpus(plan, per_node),
        *(
            (f"--segment={size}", "nodes that share an NVLink domain")
            for size in [segment(plan)]
            if size
        ),
        *((("--exclusive", ""), ("--mem=0", "all memory of the node")) if c.exclusive else ()),
        (f"--time={e.time_limit}", ""),
        (f"--signal=B:USR1@{e.stop_before_limit_s}", "warns this script before the limit"),
        (
            "--requeue" if e.max_restarts else "--no-requeue",
            "a failed node queues the job again" if e.max_restarts else "",
        ),
        ("--open-mode=append", "one log, also after a requeue"),
        (f"--output={shlex.quote(str(run_folder(plan) / 'log.txt').replace('%', '%%'))}", ""),
        *((shlex.quote(flag), "cluster.extra_sbatch") for flag in c.extra_sbatch),
    ]


def _gpus(plan: Plan, per_node: int) -> list[tuple[str, str]]:
    if plan.on_cpu or plan.cluster.gpus_flag == "none":
        return []
    return [
        (
            (
                f"--gpus-per-node={per_node}"
                if plan.cluster.gpus_flag == "gpus-per-node"
                else f"--gres=gpu:{per_node}"
            ),
            "",
        )
    ]


def image(plan: Plan) -> str:
    """Return the container image as pyxis takes it: a registry's path has # after the host."""
    chosen = plan.cluster.container_image or plan.stack.container or ""
    host, slash, path = chosen.partition("/")
    is_registry = (
        bool(slash) and "." in host and not chosen.startswith((".", "/")) and "#" not in chosen
    )
    return f"{host}#{path}" if is_registry else chosen


def mounts(plan: Plan) -> list[str]:
    """Return the container's mounts: the working folder and the run folder where they lie, and the
    site's own.
    """
    here, runs = Path.cwd(), run_folder(plan).parent
    own = [here]
    for path in (runs, runs.resolve()):  # a link to another file system must find its target inside
        own += [] if any(path.is_relative_to(mounted) for mounted in own) else [path]
    return [*(f"{path}:{path}" for path in own), *plan.cluster.mounts]


def srun_flags(plan: Plan) -> list[str]:
    """Return the flags of every srun of the job."""
    c = plan.cluster
    flags = [f"--mpi={c.mpi}"] if c.mpi else []
    if c.container_runtime == "pyxis":
        names = [*(variable.name for variable in variables(plan)), *c.token_files]
        flags += [
            f"--container-image={image(plan)}",
            f"--container-mounts={','.join(mounts(plan))}",
            f"--container-workdir={Path.cwd()}",
        ]
        flags += [
            "--no-container-mount-home",
            *([f"--container-env={','.join(names)}"] if names else []),
        ]
    return [*flags, *c.extra_srun]


def boosts(plan: Plan) -> bool:
    """Return whether the job steers power to the tensor cores of its GPUs."""
    return plan.cluster.vboost and plan.executor.kind == "slurm" and not plan.on_cpu


def task(plan: Plan) -> str:
    """Return what bash runs in each process ($1 the interpreter, $2 the run folder, $3 the code):
    check the node, name the rank, train.

    The code goes before whatever the container's own PYTHONPATH names, which is set only in there.
    """
    bind, per_numa = "", plan.gpu.gpus_per_numa_node
    if (
        plan.cluster.numa_binding
        and per_numa
        and not plan.on_cpu
        and tasks_per_node(plan) > per_numa
    ):
        node = f"$((SLURM_LOCALID / {per_numa}))"
        bind = f"numactl --cpunodebind={node} --membind={node} "
    code = 'export PYTHONPATH="$3${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1'
    ranks = "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
    first = '((SLURM_LOCALID)) || "$1" -m launch.preflight "$2" || exit'
    return f'{code}; {first}; {ranks}; exec {bind}"$1" -m recipes.training.run "$2"'


def described(plan: Plan) -> str:
    """Return the layout in one line."""
    m = plan.mapping
    extra = [name for name in ("cuda_graphs", "fsdp") if getattr(m, name)]
    extra += [
        f"{name}={getattr(m, name)}"
        for name in ("recompute_layers", "offload_layers")
        if getattr(m, name)
    ]
    sizes = f"TP {m.tp}, PP {m.pp}, CP {m.cp}, VP {m.vp}, DP {plan.data_parallel}"
    batch = f"micro-batch {m.micro_batch}, global batch {m.global_batch} x {plan.seq_length} tokens"
    return "; ".join([sizes, batch, *extra, m.source])


def quoted(value: object) -> str:
    """Return `value` as one word of bash; one with a comma is always put in quotes, which is easier
    to read in a list.
    """
    text = str(value)
    return f"'{text}'" if "," in text and "'" not in text else shlex.quote(text)


def render(plan: Plan) -> str:
    """Return the job's script: for sbatch, or for bash where it runs on this machine."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"q": quoted, "line": one_line}  # a comment ends with its line
    template = "job.sbatch.j2" if plan.executor.kind == "slurm" else "local.sh.j2"
    return environment.get_template(template).render(_values(plan)) + "\n"


def _values(plan: Plan) -> dict[str, Any]:
    return {
        "plan": plan,
        "mapping": described(plan),
        "run_folder": str(run_folder(plan)),
        "job_folder": str(job_folder(plan)),
        "directives": directives(plan),
        "variables": [*_process(plan), *variables(plan)],
        "srun_flags": srun_flags(plan),
        "task": task(plan),
        "requeue": plan.executor.max_restarts > 0,
        "vboost": boosts(plan),
        "python": sys.executable,
        "session": SESSION,
        "port_taken": PORT_TAKEN,
    }


def _process(plan: Plan) -> list[Variable]:
    """What each process needs beside: its share of the cores, where W&B sends to, and on the CPU
    nothing from the network.
    """
    share = threads(plan)
    offline = [
        Variable("HF_HUB_OFFLINE", "1", "nothing is fetched"),
        Variable("TOKENIZERS_PARALLELISM", "false", "no warnings from forks"),
    ]
    return [
        *([Variable("OMP_NUM_THREADS", str(share), "its share of the cores")] if share else []),
        Variable("WANDB_MODE", plan.logger.wandb, "logger"),
        *(offline if plan.on_cpu else []),
    ]


def threads(plan: Plan) -> int | None:
    """Return the CPU threads of a process: the plan's, or on this machine its cores shared by all
    that run at once.
    """
    if plan.executor.threads or plan.executor.kind == "slurm":
        return plan.executor.threads
    return max(1, len(os.sched_getaffinity(0)) // (plan.num_gpus * plan.executor.max_parallel))
