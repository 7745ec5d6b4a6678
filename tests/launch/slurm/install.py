"""Whether this machine can run the test cluster, and what it takes to make it so.

The tests of submission want a real Slurm, not a pretence of one.  Debian packages it, with
everything that it needs (munge, MariaDB), so on Debian and as root `install()` fetches what is
absent; anywhere else `missing()` says in one line why there can be no cluster, and the tests skip
with that reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "gcc": "gcc",
    "setpriv": "util-linux",
    "/usr/include/slurm/spank.h": "libslurm-dev",
    "/usr/include/stdio.h": "libc6-dev",
    "/usr/lib/*/slurm-wlm/select_cons_tres.so": "slurm-wlm-basic-plugins",
    "/usr/lib/*/slurm-wlm/accounting_storage_mysql.so": "slurm-wlm-mysql-plugin",
}
"""What the cluster uses (a program or a file) and the Debian package that brings it."""

POLICY = Path("/usr/sbin/policy-rc.d")
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def absent() -> list[str]:
    """The packages that are not there yet."""
    return sorted({package for thing, package in PACKAGES.items() if not _there(thing)})


def missing() -> str | None:
    """Why there can be no cluster on this machine, or None when all is there."""
    if impossible := _impossible():
        return impossible
    if packages := absent():
        return f"a Slurm for tests needs the packages {' '.join(packages)}"
    return None


def install() -> None:
    """Install the absent packages where that is possible; raises with what apt-get said when it
    failed.
    """
    packages = absent()
    if not packages or _impossible():
        return
    with _no_service_starts():
        _apt("update")
        _apt("install", "-y", "--no-install-recommends", *packages)


def _impossible() -> str | None:
    if not Path("/etc/debian_version").exists() or not shutil.which("apt-get"):
        return "a Slurm for tests needs Debian"
    if os.geteuid() != 0:
        return "a Slurm for tests needs root (packages, /etc/hosts)"
    return None


def _there(thing: str) -> bool:
    if thing.startswith("/"):
        return any(Path("/").glob(thing[1:]))
    return shutil.which(thing, path=PATH) is not None


def _apt(*arguments: str) -> None:
    command = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise subprocess.SubprocessError(
            f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """Keep the packages from starting their own Slurm, munge and MariaDB: the tests bring up
    private ones.
    """
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
