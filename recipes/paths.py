"""Where the project's own files lie: in a checkout, or beside the modules of an installed
package.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
_INSTALLED = _HERE / "conf"

CONF = _INSTALLED if _INSTALLED.is_dir() else _HERE.parent / "conf"
REFERENCE = _HERE / "reference"
