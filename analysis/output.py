"""Files that analysis writes: the whole content or the old file, and one line where neither the path nor the disk serves."""

from __future__ import annotations

import contextlib
from pathlib import Path

from recipes.errors import InputError


def write_file(path: Path, content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to `path`, whose folder is made if need be, and return it; InputError where it cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
        part.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
        with contextlib.suppress(OSError, ValueError):
            part.unlink()
        raise InputError(f"{path} cannot be written ({getattr(error, 'strerror', error)}); choose another place or make room") from None
    return path
