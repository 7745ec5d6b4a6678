"""HTML pages from `templates/`: every value is escaped unless a template says that it was made
here, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parents[1] / "templates"


def render(template: str, **values: Any) -> str:
    """Return the page that a template makes of `values`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
