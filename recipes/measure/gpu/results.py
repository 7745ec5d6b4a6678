"""A folder of measurements: a file of JSON lines for each kind of row, and a manifest that says
what made them, and where.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from recipes.code import code
from recipes.measure.gpu import te_quantizers
from recipes.run_folder import write_json


def write(
    files: Mapping[str, Iterable[Mapping[str, Any]]],
    folder: Path,
    settings: Mapping[str, Any],
    labels: Mapping[str, str],
) -> None:
    """Write each of `files` that has rows as <name>.jsonl, and manifest.json; for measurements on
    the CUDA GPU that is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(lines))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    versions["transformer-engine"] = te_quantizers.version()
    facts = {
        "code": code(),
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "settings": dict(settings),
    }
    write_json(folder / "manifest.json", {**facts, "labels": dict(labels)})
