"""Ways to break a file: as bytes, and where it is JSON as values."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title><svg/onload=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "!!python/object/apply:os.system ['touch owned']",
    "&a [*a, *a]",
    "[bold red]markup[/][/nothing]",
    "a | b\n# heading\n<!-- end -->",
    "\x1b[2J\x1b]0;title\x07",
    "$(touch owned)`touch owned`",
    "$\\frac{$ \\alpha_{^",
    "]]> --> <!--",
    "${oc.env:HOME}",
    "\u202etxt.exe\u0000\ud800",
)
DEEP = "\0deep\0"  # stands for nesting that no recursive reader survives
HUGE = "\0huge\0"  # stands for a number of more digits than Python converts
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", " ", [], {}, [[]], [None], {"": 0}, {"a": {"b": [1]}}),
    *(
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        -(2**70),
        10**30,
        10**400,
        0.5,
        -0.0,
        1e-320,
        1e308,
        -1e308,
        1e300,
    ),
    *(float("nan"), float("inf"), float("-inf"), DEEP, HUGE),
    *HOSTILE,
)


def spelled(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON, with what no JSON writer would write put in where it stands for
    it.
    """
    text = json.dumps(value, indent=indent)
    text = text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return text.replace(json.dumps(HUGE), "9" * 10_000)


def paths_in(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON value, itself first."""
    found = [prefix]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        found += paths_in(inner, (*prefix, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return `value` with `new` at `path`."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """Return `value` without what lies at `path`."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(copy[path[0]], path[1:])
    return copy


def of_value(path: Path, draw: random.Random) -> str:
    """Change one value of a JSON file, or of one line or all lines of a .jsonl file; return what
    was done.
    """
    lines = path.suffix == ".jsonl"
    values = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if lines
        else [json.loads(path.read_text())]
    )
    at = draw.randrange(len(values))
    place, new = draw.choice(paths_in(values[at])[1:]), draw.choice(VALUES)
    delete, everywhere = draw.random() < 0.15, lines and draw.random() < 0.4
    for i, value in enumerate(values):
        if i == at or (everywhere and place in paths_in(value)):
            values[i] = without(value, place) if delete else put(value, place, new)
    path.write_text(
        "".join(spelled(value) + "\n" for value in values)
        if lines
        else spelled(values[0], indent=1)
    )
    where = ".".join(map(str, place))
    return (
        f"{path.name}{' (all lines)' if everywhere else ''}: {where}"
        f" {'deleted' if delete else f'= {new!r}'[:60]}"
    )


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 30))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _spliced(content: bytes, draw: random.Random) -> bytes:
    at, junk = (
        draw.randrange(len(content)),
        draw.choice(
            (b"\0" * 8, b"\xff\xfe", b"{", b"]", b'"', b"\n\n", b"[" * 50_000, b"9" * 5000)
        ),
    )
    return content[:at] + junk + content[at:]


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": _cut,
    "bytes flipped": _flipped,
    "bytes put in": _spliced,
    "empty": lambda content, draw: b"",
    "white space": lambda content, draw: b" \n\n",
    "twice": lambda content, draw: content + content,
    "as UTF-16": lambda content, draw: content.decode().encode("utf-16"),
    "byte order mark": lambda content, draw: b"\xef\xbb\xbf" + content,
    "CRLF": lambda content, draw: content.replace(b"\n", b"\r\n"),
    "zeros": lambda content, draw: b"\0" * len(content),
    "random bytes": lambda content, draw: draw.randbytes(200),
    "first half missing": lambda content, draw: content[len(content) // 2 :],
    "lines shuffled": lambda content, draw: b"\n".join(
        draw.sample(lines := content.split(b"\n"), len(lines))
    ),
}


def _deleted(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


FILES: dict[str, Callable[[Path], None]] = {
    "deleted": _deleted,
    "a folder": _folder,
    "a link to itself": _loop,
    "a link to nothing": _dangling,
}


def of_file(path: Path, draw: random.Random) -> str:
    """Break a file as bytes, or as a file; return what was done."""
    kind = draw.choice([*BYTES, *BYTES, *FILES])
    if kind in BYTES:
        path.write_bytes(BYTES[kind](path.read_bytes(), draw))
    else:
        FILES[kind](path)
    return f"{path.name}: {kind}"


def broken(folder: Path, draw: random.Random) -> str:
    """Break one file of a run folder, or two; return what was done."""
    done = []
    for path in draw.sample(
        sorted(p for p in folder.iterdir() if p.is_file()), draw.choice((1, 1, 1, 2))
    ):
        by_value = path.suffix in (".json", ".jsonl") and draw.random() < 0.6
        done.append(of_value(path, draw) if by_value else of_file(path, draw))
    return "; ".join(done)


def quoted(value: str | list[str]) -> str:
    """Return a value as Hydra's override grammar quotes it, with nothing to interpolate in it."""
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    text = re.sub(r"(\\+)(?='|$)", r"\1\1", value.replace("${", "\\${"))
    return "'" + text.replace("'", "\\'") + "'"


def fresh(source: Path, target: Path) -> Path:
    """Copy a run folder to `target`, replacing what is there."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)
