"""What does a manifest say of a run, and in which types?

`recipes.training.manifest` writes it inside the job, `analysis` reads it.  A key that a manifest
lacks was not recorded: by an earlier version of this project, or by the tool that wrote an imported
log.  A value of None was asked for, and there was none (a package that is not installed), except
where a field says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from recipes.errors import one_line
from recipes.gpu_record import GpuRecord

Line = Annotated[str, AfterValidator(one_line)]

# Variables that choose kernels, their number format, or the order of sums, or that change speed.
# Read at Transformer Engine
# 2.2 to 2.11, Megatron-Core 0.12 and 0.13, PyTorch, NCCL, cuBLAS, cuDNN, oneDNN and OpenMP.
ENVIRONMENT = (
    *("NVTE_*", "UB_*", "FLASH_ATTENTION_*", "NVIDIA_TF32_OVERRIDE", "NVIDIA_PYTORCH_VERSION"),
    *("CUDA_*", "CUBLAS*", "CUDNN_*", "NCCL_*", "UCC_*", "UCX_*", "NVSHMEM_*"),
    *("TORCH_*", "TORCHINDUCTOR_*", "TORCHDYNAMO_*", "PYTORCH_*", "ATEN_*", "TRITON_*"),
    *(
        "OMP_*",
        "KMP_*",
        "GOMP_*",
        "MKL_*",
        "OPENBLAS_*",
        "DNNL_*",
        "ONEDNN_*",
        "LD_PRELOAD",
        "PYTHONHASHSEED",
    ),
    *("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_RESTART_COUNT"),
)
# What earlier versions of this project looked at, whose manifests do not say so.
ENVIRONMENT_BEFORE = (
    "NCCL_*",
    "NVTE_*",
    "CUDA_*",
    "TORCH_NCCL_*",
    "OMP_*",
    "SLURM_JOB_ID",
    "SLURM_NNODES",
    "SLURM_RESTART_COUNT",
)


def is_looked_at(variable: str, patterns: Iterable[str]) -> bool:
    """Return whether a variable is one of those that the patterns name."""
    return any(fnmatchcase(variable, pattern) for pattern in patterns)


class Code(BaseModel, strict=True):
    """The code that ran: its commit, whether its files differ from it, and the SHA-256 of the files
    themselves; None: not known.
    """

    commit: Line | None = None
    dirty: bool | None = None
    sha256: Line | None = None


class DataFacts(BaseModel, strict=True):
    """The data that a run read.

    `sha256`: of whole files by name.  `sampled_sha256`: of a file's size and of blocks spread over
    it, by name. `tokenizer_sha256`: of the vocabulary and the rules by which it parts text.
    """

    source: Line | list[Line] | None = None
    asked: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    vocab_size: int | None = None
    sha256: dict[str, str] = {}
    sampled_sha256: dict[str, str] = {}
    tokenizer_sha256: Line | None = None
    unigram_entropy_nats: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Session(BaseModel, strict=True):
    """What one process of a run computed with; a run that was continued has several.

    `versions`: by package; None where it is not installed.  `environment`: the variables that
    `environment_looked_at` names by pattern and that were set.  `attention`: the class that
    computes it, and which backend Transformer Engine chose in training. `device`: the name of rank
    0's.  `cudnn`: versions loaded and built with, by who loaded it.
    """

    code: Code | None = None
    versions: dict[Line, Line | None] | None = None
    device: Line | None = None
    environment: dict[Line, Line] | None = None
    environment_looked_at: list[Line] = []
    attention: Line | None = None
    cudnn: dict[Line, Line] = {}


class Manifest(Session, strict=True):
    """A run's manifest: its last session, what all sessions have in common, and the earlier ones.

    `order_sha256`: of the index files that decide the order of batches; None where there are none
    (random tokens). `gpus`: one a rank, of the last session; `gpus_before`: the UUIDs of earlier
    ones.  `before`: earlier sessions. `imported`: what analysis.import_logs recorded.
    """

    data: DataFacts | None = None
    order_sha256: Line | None = None
    num_gpus: int | None = None
    labels: dict[str, Literal["measured", "emulated"]] = {}
    gpus: list[GpuRecord] = []
    gpus_before: list[Line] = []
    before: list[Session] = []
    imported: dict[str, Any] | None = None
