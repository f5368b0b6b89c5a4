"""What an inspector found, on the terminal and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.inspection.base import Finding


def show(finding: Finding) -> None:
    """The sentence, the table, how sure it is."""
    console = Console(highlight=False)
    console.print(finding.says + "\n", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in finding.columns:
        table.add_column(column, overflow="fold")
    for row in finding.rows:
        table.add_row(*(Text(finding.shown(value)) for value in row))
    console.print(table)
    if finding.sure:
        console.print(f"\nHow sure: {finding.sure}.", markup=False)


def as_dict(finding: Finding) -> dict[str, Any]:
    """Plain values, without the picture."""
    rows = [list(row) for row in finding.rows]
    return {"says": finding.says, "columns": list(finding.columns), "rows": rows, "sure": finding.sure}
