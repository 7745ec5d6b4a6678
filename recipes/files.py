"""Files that commands write and read where a user names the path: never a device replaced, a pipe
waited for, or half a file left.

`write_file` is what every `--out` goes through.  `read_file` is for files that others may have put
into a run folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from recipes.errors import InputError

MOST_BYTES = (
    1 << 28
)  # of a file that is read whole: 256 MiB; the largest that this project writes has 10 MB


def write_file(path: Path, content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to `path`, whose folder is made if need be, and return it.

    A file is replaced at once: a reader sees the old one or the new one.  A link is followed, and a
    character device or a pipe written to; none of them is replaced.  InputError where it cannot be
    written, or a pipe has no reader.
    """
    data = content if isinstance(content, bytes) else content.encode(errors="replace")
    try:
        if _is_stream(path):
            _write_through(path, data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
        nobody = getattr(error, "errno", None) == errno.ENXIO
        why = "nothing reads the pipe" if nobody else getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} cannot be written ({why}); choose another place or make room"
        ) from None
    return path


def _is_stream(path: Path) -> bool:
    """Return whether `path` is a pipe or a device, or an open file of a process, such as
    /dev/stdout.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.EINVAL, "it is a disk or a socket")
    return not stat.S_ISREG(mode) or _of_process(path)


def _of_process(path: Path) -> bool:
    """Return whether a path leads through /proc/<pid>/fd, as /dev/stdout and /dev/fd/N do."""
    for _ in range(40):  # as many links as Linux follows
        if path.parent.as_posix().startswith(("/proc/", "/dev/fd")):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / path.readlink()
    return False


def _write_through(path: Path, data: bytes) -> None:
    """Write to a pipe or a device that is there; ENXIO where nobody reads the pipe."""
    file = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_APPEND)
    with os.fdopen(file, "wb", closefd=True) as stream:
        os.set_blocking(file, True)
        stream.write(data)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
    file, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file to read bytes; OSError for anything else: a pipe would be waited for, a
    device has no end.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(file, "rb") as stream:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        yield stream


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file; OSError where it is none, cannot be read, or is larger
    than MOST_BYTES.
    """
    with open_file(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise OSError(errno.EFBIG, "it is too large", str(path))
    return data


def read_text(path: Path) -> str:
    """Return the text of a regular file in UTF-8; OSError as `read_file`, ValueError where it is
    none.
    """
    return read_file(path).decode("utf-8")
