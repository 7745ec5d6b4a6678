"""What did a job die of, by its log: what is known of other people's logs, and what to do about
each cause.

A log holds the cause and what followed from it: a rank that runs out of memory is one line, the
broken connections of the others are a thousand.  So the first line counts that names a cause.  Only
where none does, the first exception counts, or a known consequence.  Lines of srun and slurmstepd
are read as those of ranks, with and without the label of `srun --label`.

The wordings are those of PyTorch, Transformer Engine (NVTE_CHECK_CUDA), cuBLAS, NCCL, Slurm, pyxis,
enroot, Open MPI and Hugging Face, as they stand in public issues of those projects.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

SQSH = "cluster.container_image=FILE.sqsh, a file made by `enroot import`"
GPU_MEMORY = (
    "out of GPU memory: more mapping.recompute_layers, tp or pp, or a smaller mapping.micro_batch"
)
IMAGE = "the container image cannot be imported or started: check cluster.container_image"
DISK = "the disk is full: make room, and the same launch command continues it"
DRIVER = (
    "the driver of a node does not serve the container's CUDA: update it, or use a container with"
    " an older CUDA"
)
MPI = (
    "MPI cannot start: set cluster.mpi to a plugin of `srun --mpi=list` that the container's Open"
    " MPI knows (pmix), or ask for PMIx"
)
REGISTRY = r"(?:pyxis|enroot|curl|\[error\]).{0,300}(?:error code|returned error): "

# In lower case, as the log is read.  Of a line that several match, the first listed is its cause.
ROOTS = (
    (
        r"\bcu(?:da|blas|dnn).{0,60}out of memory",
        GPU_MEMORY,
    ),
    (
        r"outofmemoryerror|cuda_error_out_of_memory|cu(?:blas|dnn)_status_alloc_failed|"
        r"cudaerrormemoryallocation",
        GPU_MEMORY,
    ),
    (
        r"failed to cuda (?:host )?[cm]alloc|nvte.{0,80}out of memory",
        GPU_MEMORY,
    ),
    (
        r"ibv_reg_mr.{0,60}cannot allocate memory",
        (
            "the nodes let no job lock the memory that InfiniBand needs (ulimit -l): ask your"
            " administrators"
        ),
    ),
    (
        r"/dev/shm.{0,120}no space left|insufficient shared memory|"
        r"shared memory segment.{0,80}(?:no space|failed)",
        "the nodes' /dev/shm is full: ask your administrators, or use other nodes",
    ),
    (
        r"oom[-_ ]kill|task[s ].{0,40}: out of memory|out of memory: killed|std::bad_alloc|"
        r"^(?:\S+: )*memoryerror",
        "out of host memory: more nodes, or all memory of each (cluster.exclusive=true)",
    ),
    (
        r"cannot allocate memory|not enough memory: you tried to allocate|"
        r"killed by signal: killed",
        "out of host memory: more nodes, or all memory of each (cluster.exclusive=true)",
    ),
    (
        r"found (?:nan|inf) in|non_finite|loss is nan|the loss of step \d+ is",
        "NaN or Inf in loss or gradients",
    ),
    (
        r"invalid mpi type|mpi plugin.{0,60}not found|"
        r"couldn't find the specified plugin name for mpi",
        "srun knows no such MPI plugin: set cluster.mpi (srun --mpi=list names them) or null",
    ),
    (
        r"opal_shmem|orte_session_dir|opal_init failed",
        (
            "Open MPI finds no folder to write to in the container: set cluster.environment.TMPDIR"
            " to one"
        ),
    ),
    (
        r"mpi_init|pmi2_init failed|pmix error|opal error|slurm's pmi support|orte_init failed"
        r"|mpi_errors_are_fatal",
        MPI,
    ),
    (
        r"option '?--(?:no-)?container-",
        (
            "this Slurm has no pyxis: set cluster.container_runtime=none where the stack is"
            " installed on the nodes, or ask your administrators for pyxis"
        ),
    ),
    (
        r"pyxis\.so: (?:dlopen|plugin|incompatible|failed to)",
        (
            "pyxis does not fit this Slurm: ask your administrators, or set"
            " cluster.container_runtime=none"
        ),
    ),
    (
        r"srun: (?:error: )?(?:unrecognized|invalid|ambiguous) option",
        "srun does not know a flag of the job: see its line in log.txt, and cluster.extra_srun",
    ),
    (
        REGISTRY + r"40[13]",
        (
            "the registry refuses the container image: put its credentials into"
            f" ~/.config/enroot/.credentials, or set {SQSH}"
        ),
    ),
    (
        REGISTRY + r"404|\[error\].{0,40}(?:no such image|manifest unknown)",
        "the registry has no such container image: check cluster.container_image",
    ),
    (
        REGISTRY + r"429|toomanyrequests",
        f"the registry limits how often an image is fetched, and each node fetches it: set {SQSH}",
    ),
    (
        r"curl: \((?:5|6|7|28|35|56|60)\)",
        f"a node does not reach the registry of the container image: set {SQSH}",
    ),
    (
        r"\[error\] (?:no such file or directory|not a (?:squashfs|regular file)).{0,300}",
        "the file of the container image is not there, or is none: check cluster.container_image",
    ),
    (
        r"(?:pyxis|enroot|squashfs).{0,200}(?:no space left|quota exceeded)",
        (
            "a node has no room for the container image: point ENROOT_CACHE_PATH and"
            " ENROOT_DATA_PATH to a larger disk (enroot.conf)"
        ),
    ),
    (
        r"(?:pyxis|enroot).{0,200}permission denied",
        (
            "enroot may not write its folders on a node: ask your administrators for"
            " ENROOT_RUNTIME_PATH and ENROOT_DATA_PATH"
        ),
    ),
    (
        r"numactl: .{0,40}not found",
        "numactl is missing in the container: set cluster.numa_binding=false",
    ),
    (
        r"libnuma: .{0,60}out of range|numactl: .{0,80}invalid|"
        r"sched_setaffinity: invalid argument",
        (
            "a node has other processors than gpu.gpus_per_numa_node says: set"
            " cluster.numa_binding=false"
        ),
    ),
    (
        r"no space left on device|errno 28\b",
        DISK,
    ),
    (
        r"disk quota exceeded|errno 122\b",
        "the disk quota is used up: make room, and the same launch command continues it",
    ),
    (
        r"read-only file system",
        (
            "the file system of the run folder cannot be written: choose another runs_dir, or mount"
            " it (cluster.mounts)"
        ),
    ),
    (
        r"stale file handle|input/output error",
        "the file system failed: the same launch command continues the run when it is back",
    ),
    (
        r"due to time limit",
        "the time limit: the same launch command continues it",
    ),
    (
        r"due to node failure|error: node failure on",
        "a node failed: the same launch command continues the run",
    ),
    (
        r"due to preemption",
        "preempted: the same launch command continues the run",
    ),
    (
        r"invalid account",
        "Slurm refuses the account: set cluster.account",
    ),
    (
        r"invalid partition",
        "Slurm knows no such partition: set cluster.partition (sinfo lists them)",
    ),
    (
        r"invalid qos",
        "Slurm refuses the quality of service: set cluster.qos",
    ),
    (
        r"node configuration is not available",
        (
            "the partition has no such nodes: check gpu, num_gpus, cluster.gpus_flag and"
            " cluster.partition"
        ),
    ),
    (
        r"^(?:\S+: )?cat: (?:\S+): (?:no such file|permission denied)",
        "a node cannot read a file of cluster.token_files: see log.txt for which",
    ),
    (
        r"driver version is insufficient|forward compatibility was attempted|"
        r"driver on your system is too old|unsupported display driver",
        DRIVER,
    ),
    (
        r"cuda_error_system_not_ready|system not yet initialized|cudaerrorsystemnotready",
        (
            "the GPUs of a node are not ready (NVSwitch's fabric manager): leave the node out with"
            " cluster.extra_sbatch=[--exclude=NODE]"
        ),
    ),
    (
        r"no kernel image is available|found no nvidia driver|no cuda-capable device|"
        r"cuda_error_no_device",
        (
            "a node lacks the GPU or the driver that the stack was built for: check gpu, stack and"
            " cluster.gpus_flag"
        ),
    ),
    (
        r"uncorrectable ecc|fallen off the bus|\bxid\b.{0,40}\d|"
        r"unable to determine the device handle",
        (
            "a GPU failed: leave its node out with cluster.extra_sbatch=[--exclude=NODE]; the same"
            " launch command continues the run"
        ),
    ),
    (
        r"device-side assert|indexselectlargeindex",
        (
            "an index is out of range on the GPU: token ids beyond model.vocab_size? check data and"
            " data.tokenizer"
        ),
    ),
    (
        r"illegal memory access|misaligned address|unspecified launch failure",
        (
            "a kernel failed on a GPU: CUDA_LAUNCH_BLOCKING=1 in cluster.environment shows which;"
            " on one node alone it is the GPU"
        ),
    ),
    (
        r"modulenotfounderror: no module named '?([\w.]+)",
        r"module \1 is missing: use the stack's container (cluster.container_image), or install "
        r"it where cluster.python is",
    ),
    (
        r"line \d+: (\S*python\S*): (?:command not found|no such file)|"
        r"execve\(\): (\S*python\S*): ",
        "cluster.python names no interpreter on the nodes",
    ),
    (
        r"gatedrepoerror|gated repo|40[13] client error.{0,60}huggingface",
        (
            "Hugging Face refuses the tokenizer: name a file with your token in cluster.token_files"
            " (HF_TOKEN)"
        ),
    ),
    (
        r"couldn't connect to 'https://huggingface|localentrynotfounderror|"
        r"offlinemodeisenabled",
        (
            "the nodes do not reach Hugging Face: set data.tokenizer to a folder that holds the"
            " tokenizer"
        ),
    ),
    (
        r"no socket interface found|no interface found",
        (
            "NCCL finds no network between the nodes: set cluster.environment.NCCL_SOCKET_IFNAME"
            " (`ip link` on a node lists them)"
        ),
    ),
)
CONSEQUENCES = (
    (
        r"pyxis: .{0,40}(?:failed to import|image import)|error: pyxis: ",
        IMAGE,
    ),
    (
        r"watchdog caught collective operation timeout|nccl.{0,40}timeout|nccl.{0,60}timed out",
        "a rank hung: NCCL timed out",
    ),
    (
        r"^(?:\d+: )?timeout \((\d+:\d\d:\d\d)\)!",
        r"no step for \1 hours (train.step_timeout_s): a rank hung, and log.txt shows where",
    ),
    (
        r"eaddrinuse|address already in use|of this node is taken by another process",
        "another process has the port at which the ranks meet: launch again",
    ),
    (
        r"wait timeout after|client socket has timed out|waiting for clients|"
        r"failed to connect to .{0,80}(?:master|store)|diststoreerror",
        "the ranks did not find each other: does each node reach the first one by its name?",
    ),
    (
        r"name or service not known|temporary failure in name resolution",
        "a node cannot resolve a host name: see its line in log.txt",
    ),
    (
        r"unhandled system error|ncclsystemerror|ncclremoteerror|ncclinternalerror|"
        r"remote process exited|connection closed by",
        (
            "NCCL lost the connection to another rank, which died or is not reached: see the first "
            "errors in log.txt, and cluster.environment.NCCL_SOCKET_IFNAME"
        ),
    ),
    (
        r"cannot open shared object file|undefined symbol",
        (
            "libraries of the nodes and of the stack do not fit together: use the stack's container"
            " (cluster.container_image)"
        ),
    ),
)


WHO = r"^(?:\d+: )?(?:\[(?:rank|default)\d+\]:? ?)?"  # who wrote a line: srun --label, torchrun
REFUSAL = re.compile(WHO + r"((?:(?:srun|slurmstepd[\w.-]*): )?error: .{0,300})", re.MULTILINE)
EXCEPTION = re.compile(WHO + r"((?:[\w]+\.)*[A-Z]\w*(?:Error|Exception): .{0,300})", re.MULTILINE)
ENDS = re.compile(r"exited with exit code|terminat|cancelled at|killed$|aborted$", re.IGNORECASE)
LOWER = str.maketrans(
    string.ascii_uppercase, string.ascii_lowercase
)  # keeps places, as lower() may not


def known_cause(log: str) -> str | None:
    """Return what the first line of a log that names a cause means, and what to do; None where no
    line is known.
    """
    text = log.translate(LOWER)
    return _first(text, ROOTS) or _first(text, CONSEQUENCES)


def cause_of(log: str, reason: str | None) -> str | None:
    """Return what a run died of, by its log and by the exception that ended rank 0, if any; None
    where nothing tells.

    A known cause goes before a line `error: …`, that before exceptions, and all before a known
    consequence of them.
    """
    text = log.translate(LOWER)
    if known := _first(text, ROOTS):
        return known
    refused = (match[1] for match in REFUSAL.finditer(log) if not ENDS.search(match[1]))
    raised = [*([reason] if reason else []), *(match[1] for match in EXCEPTION.finditer(log))]
    own = (w for w in (*refused, *raised) if not _first(w.translate(LOWER), CONSEQUENCES))
    return next(own, None) or _first(text, CONSEQUENCES) or reason


def _first(text: str, causes: Iterable[tuple[str, str]]) -> str | None:
    found = ((re.search(pattern, text, re.MULTILINE), meaning) for pattern, meaning in causes)
    matches = [(match, meaning) for match, meaning in found if match]
    if not matches:
        return None
    match, meaning = min(matches, key=lambda one: text.rfind("\n", 0, one[0].start()))
    return match.expand(meaning)
