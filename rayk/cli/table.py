"""Tables that commands print."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.table import Table


def make_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] = (), **options: Any
) -> Table:
    """Rows of texts, ragged to the left but for the columns named in `left`; no cell is broken over lines."""
    table = Table(title=title, title_justify="left", **options)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
