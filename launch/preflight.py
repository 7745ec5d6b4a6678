"""`python -m launch.preflight RUN`: the first line of a job: is this what the plan was checked
against?

A container drifts, a node has another GPU, or sees other files.  The plan's rules hold for the
versions and the device that it names, and for data that are whole.  Every node looks at the sizes
of the data's files, the first one at their tokens too.  Runs once a node, in seconds, before
anything heavy is imported.  Exit code 2 with what differs, and the run's status says so too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from recipes.cli import command
from recipes.compose.rules import capability, min_cuda
from recipes.data.files import check_data
from recipes.errors import InputError
from recipes.estimate.possible import names_device
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.plan import Plan
from recipes.run_folder import event, read_plan, set_status

PACKAGES = {
    "nemo": "nemo-toolkit",
    "megatron_core": "megatron-core",
    "transformer_engine": "transformer-engine",
}


def wrong_versions(plan: Plan) -> Iterator[str]:
    """Yield a sentence for each package whose version is not the stack's; the CPU has no
    Transformer Engine.
    """
    for name, wanted in plan.stack.versions.items():
        if plan.on_cpu and name == "transformer_engine":
            continue
        package = PACKAGES.get(name, name)
        try:
            found = version(package)
        except PackageNotFoundError:
            yield f"{package} is not installed, {plan.stack.name} has {wanted}"
            continue
        if not (found + ".").startswith(wanted + "."):
            yield f"{package} is {found}, {plan.stack.name} has {wanted}"


def wrong_devices(plan: Plan) -> Iterator[str]:
    """Yield a sentence where this node's GPUs are fewer than the plan needs, or of another compute
    capability.
    """
    if plan.on_cpu:
        return
    found = _devices()
    needed = min(plan.num_gpus, plan.gpu.devices_per_node)
    if len(found) < needed:
        yield f"{len(found)} GPU(s) are visible, the plan needs {needed} on each node"
    other = sorted({c for c, _ in found if c != plan.gpu.compute_capability})
    if other:
        yield (
            f"the GPUs have compute capability {', '.join(other)}, {plan.gpu.name} has"
            f" {plan.gpu.compute_capability}"
        )
    names = sorted({name for _, name in found if name and not names_device(plan.gpu, name)})
    if names:
        yield (
            f"the GPUs are {', '.join(names)}, the plan is for {plan.gpu.name}"
            f" ({plan.gpu.device_name})"
        )


def wrong_cuda(plan: Plan) -> Iterator[str]:
    """Yield a sentence where PyTorch was built with an older CUDA than the plan's precision or GPU
    needs.

    Transformer Engine asks for the same one (pytorch/fp8.py, check_fp8_block_scaling_support:
    torch.version.cuda).
    """
    needed = None if plan.on_cpu else min_cuda(plan)
    if needed is None:
        return
    found, what = _cuda(), plan.gpu.name if needed == plan.gpu.min_cuda else plan.precision.name
    if found is None:
        yield f"torch was built without CUDA, {what} needs {needed} or newer"
    elif capability(found) < capability(needed):
        yield f"torch was built with CUDA {found}, {what} needs {needed} or newer"


def _cuda() -> str | None:
    """Return the CUDA of the installed PyTorch, such as "12.8", without importing it; None where it
    has none.
    """
    spec = find_spec("torch")
    places = list(spec.submodule_search_locations or []) if spec else []
    text = "".join(
        path.read_text() for place in places if (path := Path(place) / "version.py").exists()
    )
    found = re.search(r"^cuda\b[^=]*= *['\"](\d+\.\d+)", text, re.MULTILINE)
    return found[1] if found else None


def _devices() -> list[tuple[str, str]]:
    """Return compute capability and name of each visible GPU; none where nvidia-smi is missing or
    fails.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    parts = [line.partition(",") for line in done.stdout.splitlines() if line.strip()]
    return [(computes.strip(), name.strip()) for computes, _, name in parts]


def main(folder: Path) -> int:
    """Check this node against the plan of a run folder."""
    try:
        plan = read_plan(folder)
        wrong = [*wrong_versions(plan), *wrong_cuda(plan), *wrong_devices(plan)]
        if wrong:
            raise InputError(
                f"{os.environ.get('SLURMD_NODENAME', 'this machine')}: {'; '.join(wrong)}; use the"
                " stack's container or another stack and gpu"
            )
        check_data(plan, in_job=True, contents=os.environ.get("SLURM_NODEID", "0") == "0")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        if (folder / "plan.json").exists():
            set_status(folder, "failed", str(error))
            event(folder, "failed", reason=str(error))
        return EXIT_WRONG_INPUT
    return 0


if __name__ == "__main__":
    command(lambda: main(Path(sys.argv[1])))
