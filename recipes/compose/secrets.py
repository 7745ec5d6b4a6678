"""Secrets that would be written down: known by their form or by the name they are given, and
refused without being repeated.

A plan stands in run folders, scripts, logs and reports, and a job folder holds a copy of conf/.
Known forms: tokens of Hugging Face, W&B, GitHub, GitLab, NVIDIA NGC, AWS, Google and OpenAI,
private keys, and passwords within URLs, as in a proxy's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from recipes.errors import InputError

FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}|\bwandb_v\d_\w{20,}"
    r"|\b(?:gh[pousr]_|github_pat_|glpat-|nvapi-|sk-|AIza)[\w-]{20,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^\s/@:]*:[^\s/@]+@"
)
# The form of a git commit as well: looked for only where no commit is named.
WANDB_KEY = re.compile(r"(?<![\w/.-])[0-9a-f]{40}(?![\w/.-])")
NAMES = r"(?:TOKEN|SECRET|PASSW(?:OR)?D|PASSPHRASE|CREDENTIALS?|(?:API|ACCESS|ACCOUNT|STORAGE|PRIVATE)_?KEY)"  # noqa: E501
# A value that is no path, or a path's look with the padding of base64.
VALUE = r"(?:[\w+=-][\w+/=.%!@#-]{11,}|/[A-Za-z0-9+/]{20,}={1,2})"
NAMED = re.compile(rf"{NAMES}['\"]?\s*[=:]\s*['\"]?{VALUE}", re.IGNORECASE)
VARIABLE = re.compile(rf"^cluster\.environment\.(?:.*_)?{NAMES}$", re.IGNORECASE)
SECRET_NAME = re.compile(
    rf"(?:^|_)(?:{NAMES}|KEY)$", re.IGNORECASE
)  # of the launching environment: its values are secrets
# Files that are made to hold secrets: environments, keys, certificates with keys, credentials of
# tools.
SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", "*.tfvars"),
    *(
        "id_*",
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "*.jks",
        "*.keystore",
        "*.kdbx",
        "*.ppk",
        "*.gpg",
        "*.asc",
    ),
    *(
        ".netrc",
        "_netrc",
        ".npmrc",
        ".pypirc",
        ".pgpass",
        ".htpasswd",
        ".git-credentials",
        ".credentials",
        "credentials*",
        "secrets*",
    ),
)
REMEDY = (
    "it would be written to files; export it before you launch, or name a file that holds it, by"
    " its path from /, in cluster.token_files"
)


def refuse_secrets(tree: dict[str, Any]) -> None:
    """Raise InputError, with the key and not the value, where a value of a plan, or a variable's
    name, is that of a secret.

    So is what holds the value of a variable of this process that is named as one, as
    `${oc.env:HF_TOKEN}` does.
    """
    known = _known()
    for key, text in _texts(tree):
        no_file = key.startswith("cluster.token_files.") and not text.startswith("/")
        of_site = key.startswith("cluster.") and WANDB_KEY.search(text)
        if (
            no_file
            or of_site
            or has_secret(text)
            or VARIABLE.match(key)
            or any(value in text for value in known)
        ):
            raise InputError(f"{key} looks like a secret: {REMEDY}")


def holds_secret(text: str) -> bool:
    """Return whether a file's text holds a secret: by its form or name, or the value of a secret
    variable of this process.

    A value that is a plain word, such as "password", stands in code for other reasons.
    """
    return has_secret(text) or any(value in text for value in _known() if not value.isalpha())


def is_secret_file(name: str) -> bool:
    """Return whether files of this name hold secrets, whatever stands in them."""
    return not name.endswith(".py") and any(
        fnmatch(name.lower(), pattern) for pattern in SECRET_FILES
    )


def _known() -> list[str]:
    """Return the values of this process's variables that are named as secrets; paths are none."""
    return [
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= 8 and value[0] not in "/~"
    ]


def has_secret(text: str) -> bool:
    """Return whether there is a text of a secret's form, or named as one, in `text`."""
    return bool(FORMS.search(text) or NAMED.search(text))


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value
