"""`python -m tests.launch.slurm`: the test cluster, to try the launch commands on by hand.

Ctrl-C ends it.
"""

import signal
import sys
import tempfile
from pathlib import Path

from tests.launch.slurm import install
from tests.launch.slurm.cluster import Slurm


def main() -> int:
    """Install what is missing, start the cluster, say how to reach it, and wait."""
    install.install()
    if reason := install.missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory(prefix="slurm") as folder,
        Slurm(Path(folder) / "slurm") as cluster,
    ):
        print(
            f"export SLURM_CONF={cluster.env['SLURM_CONF']}   # in another shell; account"
            f" {cluster.account}, partition batch",
            flush=True,
        )
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
