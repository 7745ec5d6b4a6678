"""A table for people and for programs: the cells that are read, the plain values behind them, and
the notes that a reader needs.

One table is printed on the terminal, written as Markdown, HTML or CSV (by the suffix of the file),
and stands in the README. Its notes say where the numbers come from and what was left out: they
stand below the table for people.  CSV and JSON hold the plain values alone; a command that writes
them prints the notes on the terminal, beside JSON on standard error.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape as html_escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from recipes.errors import InputError
from recipes.files import write_file

SUFFIXES = (".csv", ".md", ".html")
WIDTH = 170  # columns that a table takes where it is not printed on a terminal
FORMULA = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
)  # what a spreadsheet takes for the begin of a formula
MARKUP = re.compile(r"([\\|`\[\]])")  # what makes links, pictures, code and cells in Markdown
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }} table {{ border-collapse: collapse; font-size: .87rem; }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }} .text {{ text-align: left; }}</style></head>
<body>
{body}
</body></html>
"""  # noqa: E501
SECTION = """<h2>{title}</h2>
<table><thead>{head}</thead><tbody>
{body}
</tbody></table>
{notes}"""


@dataclass(frozen=True)
class Table:
    """A table: `shown` holds the cells by column, `rows` the plain values, a line each; `text`
    names the columns that are words.
    """

    title: str
    shown: Sequence[dict[str, str]]
    rows: Sequence[dict[str, Any]]
    notes: Sequence[str] = ()
    text: frozenset[str] = field(default=frozenset())

    @property
    def columns(self) -> list[str]:
        """The columns, in order."""
        return list(self.shown[0]) if self.shown else []

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown, its notes below."""
        rule = ["---" if column in self.text else "---:" for column in self.columns]
        lines = [
            _line(self.columns),
            _line(rule),
            *(_line(list(line.values())) for line in self.shown),
        ]
        return (
            "\n".join([*lines, "", *(f"- {_plain(note)}" for note in self.notes)]).rstrip() + "\n"
        )

    def html(self) -> str:
        """Return the table as a section of a page; every text is escaped."""
        head = self._tags("th", {column: column for column in self.columns})
        body = "\n".join(self._tags("td", line) for line in self.shown)
        notes = (
            "<ul>" + "".join(f"<li>{html_escape(note)}</li>" for note in self.notes) + "</ul>"
            if self.notes
            else ""
        )
        return SECTION.format(title=html_escape(self.title), head=head, body=body, notes=notes)

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        return self.html()

    def _tags(self, tag: str, line: dict[str, str]) -> str:
        kind = {True: ' class="text"', False: ""}
        return f"<tr>{''.join(f'<{tag}{kind[column in self.text]}>{html_escape(cell)}</{tag}>' for column, cell in line.items())}</tr>"  # noqa: E501

    def csv(self) -> str:
        """Return the plain values as CSV; what is unknown is empty."""
        file = io.StringIO()
        writer = csv.DictWriter(file, list(self.rows[0]) if self.rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _harmless(value) for key, value in row.items()} for row in self.rows)
        return file.getvalue()

    def print(self) -> None:
        """Print the table and its notes on the terminal."""
        console = wide_console()
        drawn = RichTable(
            title=self.title,
            title_justify="left",
            title_style="",
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for column in self.columns:
            drawn.add_column(column, justify="left" if column in self.text else "right")
        for line in self.shown:
            drawn.add_row(*(escape(cell) for cell in line.values()))
        console.print(drawn)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)


def wide_console() -> Console:
    """Return a console as wide as the terminal, or WIDTH columns in a pipe or a file."""
    console = Console()
    console.width = console.width if console.is_terminal else WIDTH
    return console


def print_json(values: Any, *tables: Table) -> None:
    """Print values as JSON, and the tables' notes on standard error, so that the output can be
    piped.
    """
    print(json.dumps(values, indent=1))
    for note in dict.fromkeys(note for table in tables for note in table.notes):
        print(note, file=sys.stderr)


def percent(value: float | None, signed: bool = True) -> str:
    """Return a share in per cent; a dash for none."""
    return "–" if value is None else f"{value:+.1%}" if signed else f"{value:.1%}"


def number(value: float | None, digits: int) -> str:
    """Return a number with its digits; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def write(path: Path, *tables: Table) -> None:
    """Write tables to `path` in the form that its suffix names; CSV takes the values of the first,
    of which the others are views.

    InputError for another suffix, or where the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: a table is written as {', '.join(SUFFIXES)}; give --out one of these suffixes"
        )
    if path.suffix == ".csv":
        text = tables[0].csv()
    elif path.suffix == ".md":
        text = "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in tables)
    else:
        text = PAGE.format(
            title=html_escape(tables[0].title), body="\n".join(table.html() for table in tables)
        )
    write_file(path, text)


def _plain(text: str) -> str:
    """Return text from outside so that it stays one line, ends no cell, and makes no tag, link or
    picture in Markdown.
    """
    return " ".join(MARKUP.sub(r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").split())


def _harmless(value: Any) -> Any:
    """Return a value of a CSV file so that no spreadsheet takes it for a formula (OWASP, CSV
    injection).
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"
