"""What a failed run died of: logs as ranks, srun, slurmstepd, pyxis and enroot write them, read by
`launch.status`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import status
from launch.job import write_job
from recipes.compose.tree import compose_plan
from recipes.run_folder import SESSION, append_line, event, set_status

GPU, HOST, IMAGE = "out of GPU memory", "out of host memory", "cluster.container_image"
# One rank's or one command's words -> what status is to name.  Each is read bare and with the
# labels of srun and torchrun.
LINES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has", GPU),
    ("RuntimeError: CUDA error: out of memory", GPU),
    (
        (
            "RuntimeError: /opt/te/common/util/cuda_driver.h:71 in function call: CUDA Error: out"
            " of memory"
        ),
        GPU,
    ),
    ("RuntimeError: CUDA driver error: out of memory", GPU),
    ("n7:411:902 [3] include/alloc.h:228 NCCL WARN Cuda failure 2 'out of memory'", GPU),
    ("n7:411:902 [3] enqueue.cc:43 NCCL WARN Cuda failure 'out of memory'", GPU),
    ("n7:411:902 [3] include/alloc.h:246 NCCL WARN Failed to CUDA calloc async 8388608 bytes", GPU),
    (
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        GPU,
    ),
    ("RuntimeError: cuBLAS Error: CUBLAS_STATUS_ALLOC_FAILED", GPU),
    ("RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED", GPU),
    ("cudaErrorMemoryAllocation: out of memory", GPU),
    ("[E] CUDA_ERROR_OUT_OF_MEMORY in cuMemCreate", GPU),
    (
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=77.0. Some of the step tasks"
            " have been OOM Killed."
        ),
        HOST,
    ),
    ("slurmstepd-n3: error: Detected 2 oom-kill event(s) in StepId=77.batch cgroup.", HOST),
    ("srun: error: n3: task 5: Out Of Memory", HOST),
    ("srun: error: n3: tasks 5-7: Out Of Memory", HOST),
    ("OSError: [Errno 12] Cannot allocate memory", HOST),
    ("RuntimeError: DataLoader worker (pid 5) is killed by signal: Killed. ", HOST),
    (
        (
            "n7:1:2 [0] misc/ibvwrap.cc:201 NCCL WARN Call to ibv_reg_mr_iova2 failed with error"
            " Cannot allocate memory"
        ),
        "ulimit -l",
    ),
    (
        (
            "n7:1:2 [0] NCCL WARN Error while creating shared memory segment /dev/shm/nccl-iKGzDC"
            " (size 9637888)... no space left"
        ),
        "/dev/shm",
    ),
    (
        "srun: unrecognized option '--container-image=nvcr.io#nvidia/nemo:25.04'",
        "cluster.container_runtime=none",
    ),
    ("srun: unrecognized option '--no-container-mount-home'", "cluster.container_runtime=none"),
    (
        (
            "srun: error: spank: /usr/lib/slurm/spank_pyxis.so: dlopen failed: undefined symbol:"
            " slurm_debug"
        ),
        "pyxis does not fit",
    ),
    ("srun: unrecognized option '--segment=16'", "cluster.extra_srun"),
    ("slurmstepd: error: pyxis: failed to import docker image", IMAGE),
    (
        (
            "slurmstepd: error: pyxis:     enroot-switchroot: failed to execute: /bin/bash:"
            " Permission denied"
        ),
        "enroot",
    ),
    ("slurmstepd: error: pyxis: container start failed with error code: 1", IMAGE),
    ("slurmstepd: error: pyxis: couldn't start container", IMAGE),
    (
        (
            "slurmstepd: error: pyxis:     [ERROR] URL https://nvcr.io/proxy_auth returned error"
            " code: 401 Unauthorized"
        ),
        ".credentials",
    ),
    (
        (
            "slurmstepd: error: pyxis:     [ERROR] URL https://nvcr.io/v2/x/manifests/1 returned"
            " error code: 403 Forbidden"
        ),
        ".credentials",
    ),
    (
        (
            "slurmstepd: error: pyxis:     curl: (22) The requested URL returned error: 401"
            " Unauthorized"
        ),
        ".credentials",
    ),
    (
        (
            "slurmstepd: error: pyxis:     [ERROR] URL https://nvcr.io/v2/x returned error code:"
            " 404 Not Found"
        ),
        "no such container image",
    ),
    (
        (
            "slurmstepd: error: pyxis:     [ERROR] URL https://docker.io/v2/x returned error code:"
            " 429 Too Many Requests"
        ),
        ".sqsh",
    ),
    ("slurmstepd: error: pyxis:     curl: (6) Could not resolve host: nvcr.io", ".sqsh"),
    (
        "slurmstepd: error: pyxis:     [ERROR] No such file or directory: /images/nemo.sqsh",
        "not there",
    ),
    ("slurmstepd: error: pyxis:     write error: No space left on device", "ENROOT_CACHE_PATH"),
    (
        (
            "slurmstepd: error: pyxis:     mkdir: cannot create directory '/run/enroot': Permission"
            " denied"
        ),
        "ENROOT_RUNTIME_PATH",
    ),
    (
        "srun: error: Couldn't find the specified plugin name for mpi/pmix looking at all files",
        "cluster.mpi",
    ),
    ("srun: error: Invalid MPI type 'pmix', --mpi=list for acceptable types", "cluster.mpi"),
    ("*** An error occurred in MPI_Init_thread", "cluster.mpi"),
    ("[n7:94018] PMIX ERROR: NOT-FOUND in file ptl_usock.c at line 175", "cluster.mpi"),
    ("[n7:94018] OPAL ERROR: Unreachable in file pmix3x_client.c at line 112", "cluster.mpi"),
    ("PMI2_Init failed to intialize.  Return code: 1", "cluster.mpi"),
    ("  opal_shmem_base_select failed", "TMPDIR"),
    ("OSError: [Errno 28] No space left on device: '/runs/a/checkpoints'", "disk is full"),
    ("OSError: [Errno 122] Disk quota exceeded", "quota"),
    ("OSError: [Errno 116] Stale file handle", "file system"),
    (
        (
            "slurmstepd: error: *** JOB 77 ON n0 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME"
            " LIMIT ***"
        ),
        "time limit",
    ),
    (
        (
            "slurmstepd: error: *** STEP 77.0 ON n0 CANCELLED AT 2026-01-01T00:00:00 DUE TO NODE"
            " FAILURE, SEE SLURMCTLD LOG ***"
        ),
        "node failed",
    ),
    ("srun: error: Node failure on n3", "node failed"),
    (
        (
            "slurmstepd: error: *** JOB 77 ON n0 CANCELLED AT 2026-01-01T00:00:00 DUE TO"
            " PREEMPTION ***"
        ),
        "preempted",
    ),
    (
        (
            "srun: error: Unable to allocate resources: Invalid account or account/partition"
            " combination specified"
        ),
        "cluster.account",
    ),
    ("srun: error: invalid partition specified: h100", "cluster.partition"),
    (
        "RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version",
        "driver",
    ),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 12020).", "driver"),
    (
        (
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet"
            " initialized"
        ),
        "fabric manager",
    ),
    (
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "check gpu",
    ),
    ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "--exclude"),
    ("RuntimeError: CUDA error: device-side assert triggered", "vocab_size"),
    ("RuntimeError: CUDA error: an illegal memory access was encountered", "CUDA_LAUNCH_BLOCKING"),
    ("ModuleNotFoundError: No module named 'megatron.core'", "module megatron.core is missing"),
    ("task: line 1: python: command not found", "cluster.python"),
    ("cat: /home/me/.hf: No such file or directory", "token_files"),
    (
        "OSError: 401 Client Error: Unauthorized for url: https://huggingface.co/meta-llama/x",
        "HF_TOKEN",
    ),
    (
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files",
        "data.tokenizer",
    ),
    (
        "n7:1:2 [0] bootstrap.cc:45 NCCL WARN Bootstrap : no socket interface found",
        "NCCL_SOCKET_IFNAME",
    ),
    ("libnuma: Warning: node argument 1 is out of range", "numa_binding=false"),
    (
        (
            "[rank3]:[E] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5,"
            " OpType=ALLREDUCE)"
        ),
        "a rank hung",
    ),
    (
        (
            "torch.distributed.DistNetworkError: port: 20017, code: -98, name: EADDRINUSE, message:"
            " address already in use"
        ),
        "launch again",
    ),
    (
        (
            "torch.distributed.DistStoreError: wait timeout after 600000ms, keys:"
            " /default_pg/0//cuda/0"
        ),
        "did not find each other",
    ),
    (
        (
            "torch.distributed.DistBackendError: NCCL error: unhandled system error (run with"
            " NCCL_DEBUG=INFO)"
        ),
        "connection to another rank",
    ),
    (
        (
            "ncclRemoteError: A call failed possibly due to a network error or a remote process"
            " exiting prematurely."
        ),
        "connection to another rank",
    ),
    (
        "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory",
        "do not fit together",
    ),
    ("KeyError: 'an error that nobody knows'", "KeyError: 'an error that nobody knows'"),
    ("error: n3: megatron-core is 0.13, nemo_25_04 has 0.12", "megatron-core is 0.13"),
    ("slurmstepd: error: something of this site's own", "something of this site's own"),
]
REMOTE = (
    "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network"
    " error"
)
ENDED = "srun: error: n3: task 29: Exited with exit code 1\nsrun: Terminating StepId=77.0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose job failed."""
    root = tmp_path_factory.mktemp("runs")
    write_job(compose_plan([f"runs_dir={root}", "run_name=one"]))
    set_status(root / "one", "failed")
    return root / "one"


def why(run: Path, log: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `launch.status` says of a run with this log."""
    (run / "log.txt").write_text(log)
    assert status.main([str(run), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert "\n" not in row["why"]
    return str(row["why"])


@pytest.mark.parametrize("words", [line for line, _ in LINES], ids=lambda line: line[:40])
def test_a_line_that_is_known_is_named(
    words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = dict(LINES)[words]
    for label in ("", "29: ", *(("29: [rank29]: ",) if "Error: " in words else ())):
        assert expected in why(
            run, f"Training epoch 0, iteration 3/9 | lr: 0.1\n{label}{words}\n{ENDED}\n", capsys
        )


IN_ORDER = [
    ("CUDA out of memory", "slurmstepd: error: Detected 1 oom_kill event in StepId=77.0.", GPU),
    (
        REMOTE,
        "slurmstepd: error: Detected 1 oom_kill event in StepId=77.0.",
        HOST,
    ),  # slurmstepd reports it last
    (
        "OSError: [Errno 28] No space left on device",
        "RuntimeError: CUDA error: out of memory",
        "disk is full",
    ),
    (
        "pyxis: failed to import docker image",
        "pyxis:     [ERROR] URL x returned error code: 401 Unauthorized",
        ".credentials",
    ),
    (REMOTE, "ValueError: of one rank", "ValueError: of one rank"),
    ("ValueError: of one rank", REMOTE, "ValueError: of one rank"),
    (REMOTE, "Watchdog caught collective operation timeout", "connection to another rank"),
    ("Watchdog caught collective operation timeout", REMOTE, "a rank hung"),
    (
        "ModuleNotFoundError: No module named 'a'",
        "ModuleNotFoundError: No module named 'b'",
        "module a is missing",
    ),
    ("CUDA out of memory\n" + SESSION, "KeyError: 'of the newest session'", "KeyError"),
    ("port 20017 of this node is taken by another process\n" + SESSION, "CUDA out of memory", GPU),
]


@pytest.mark.parametrize(("first", "then", "expected"), IN_ORDER)
def test_the_first_cause_counts_and_causes_before_what_follows_from_them(
    first: str, then: str, expected: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in why(
        run, f"4: {first}\n1: Traceback (most recent call last):\n1: {then}\n{ENDED}\n", capsys
    )


def test_the_first_cause_is_found_before_what_a_thousand_ranks_write(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = [
        f'{{rank}}: [rank{{rank}}]:   File "/opt/megatron/core/module{n}.py", line 1, in call'
        for n in range(15)
    ]
    others = "\n".join(
        line.format(rank=rank) for rank in range(1024) for line in (*trace, f"{{rank}}: {REMOTE}")
    )
    assert GPU in why(run, f"17: RuntimeError: CUDA Error: out of memory\n{others}\n", capsys)


def test_a_failure_of_an_earlier_session_is_not_the_newest_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event(run, "start")
    event(run, "failed", reason="RuntimeError('of the first')")
    assert "of the first" in why(run, "", capsys)
    event(run, "submitted", job_id=5)
    assert why(run, "", capsys) == f"see {run / 'log.txt'}"
    append_line(
        run / "events.jsonl", {"event": "failed", "reason": "RuntimeError('of the second')"}
    )
    assert "of the second" in why(run, "", capsys)
