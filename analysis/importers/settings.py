"""What a log says of its own configuration: the layout, and whether FP8 was asked for.

Megatron-LM prints its arguments as `  name ....... value`, Megatron-Bridge its configuration as YAML, NeMo parts of it as
`name=value`.  Only whole names and plain values are taken, never the text around them: a log may hold secrets.
"""

from __future__ import annotations

import re

OVERRIDES = {
    "tensor_model_parallel_size": "mapping.tp",
    "pipeline_model_parallel_size": "mapping.pp",
    "context_parallel_size": "mapping.cp",
    "micro_batch_size": "mapping.micro_batch",
    "world_size": "num_gpus",
    "seq_length": "seq_length",
}
SETTING = re.compile(rf"^(?:.{{0,64}}[\]:]\s)?\s*({'|'.join(OVERRIDES)})(?: \.{{3,}}|:) (\d{{1,9}})\s*$")
FP8 = re.compile(
    r"\b(fp8|fp8_recipe|fp8_format)['\"]?(?:\s?[=:]\s?| \.{3,} )['\"]?(hybrid|e4m3|delayed|tensorwise|blockwise|mxfp8|none|null|false)\b",
    re.IGNORECASE,
)
MIXED = re.compile(r"\b(bf16_with_\w{0,40}fp8\w{0,40}_mixed)\b")
ON = ("hybrid", "e4m3")
WORDS = ("fp8", *OVERRIDES)  # a text without any of them says nothing here


class Settings:
    """Collects overrides and FP8 settings (`fp8=hybrid`, …) from the lines of a log."""

    def __init__(self) -> None:
        self.found = dict[str, set[str]]()
        self.fp8 = set[str]()

    def line(self, line: str) -> None:
        """Read a line that tells no training step."""
        setting = SETTING.match(line) if "_size" in line or "seq_length" in line else None
        if setting:
            self.found.setdefault(OVERRIDES[setting[1]], set()).add(setting[2])
        if "fp8" in line:
            self.fp8 |= fp8_said(line)

    def overrides(self) -> dict[str, str]:
        """Return what the log states once and for all; a value that changes within it is left out."""
        return {key: next(iter(values)) for key, values in self.found.items() if len(values) == 1}


def fp8_said(text: str) -> set[str]:
    """Return the FP8 settings in a text, as `name=value`."""
    named = {f"{name.lower()}={value.lower()}" for name, value in FP8.findall(text)}
    return named | {f"precision={name}" for name in MIXED.findall(text)}


def says_fp8(found: list[str]) -> bool | None:
    """Return whether settings switch FP8 on (True) or off (False); None where they do not say."""
    if any(line.startswith("precision=") or line.partition("=")[2] in ON for line in found):
        return True
    return False if any(line in ("fp8=none", "fp8=null", "fp8=false") for line in found) else None
