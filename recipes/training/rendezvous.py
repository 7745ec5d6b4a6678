"""Where do the ranks of a run meet?  At a port of rank 0's node, which rank 0 binds before it does
anything else.

torch.distributed binds MASTER_PORT after NeMo was imported, a minute after the port was chosen, and
the run ends where another process has taken it by then.  Here rank 0 binds it at once, so that a
port that is taken costs no more than a new start of the step: the job's script
(launch/templates/job.sbatch.j2) chooses another port.
"""

from __future__ import annotations

import os

from torch.distributed import TCPStore

TAKEN = ("eaddrinuse", "address already in use")


class PortTakenError(Exception):
    """Another process has the port at which the ranks were to meet."""


_held: list[TCPStore] = []  # until this process ends


def bind() -> None:
    """Bind the port in rank 0 and hold it, unless torchrun's agent holds one; a process alone takes
    any free port.

    `init_process_group` uses the server that its process has at MASTER_PORT (multi-tenant; PyTorch
    2.6, torch/csrc/distributed/c10d/TCPStore.cpp, TCPServer::start).  Raises PortTakenError where
    another process has the port.
    """
    rank, world = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = int(os.environ.get("MASTER_PORT", 0)) if world > 1 else 0
    try:
        _held.append(
            TCPStore("localhost", port, is_master=True, wait_for_workers=False, multi_tenant=True)
        )
    except RuntimeError as error:
        if any(words in str(error).lower() for words in TAKEN):
            raise PortTakenError(f"port {port} of this node is taken by another process") from None
        raise
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ["MASTER_PORT"] = str(_held[-1].port)
