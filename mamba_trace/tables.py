"""Tables as HTML: how an object that is the last expression of a notebook's cell shows what it lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_table"]


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as a notebook shows it, in the notebook's own style and colours.

    Args:
        caption: what the table shows, in one line.
        head: a heading for each column.
        rows: a text for each column. Markup in them is shown as it is.

    Example::

        html_table("Two layers", ["layer", "kernels"], [["0", "scan"], ["1", "scan"]])
    """
    left = ' style="text-align: left"'
    headings = "".join(f"<th{left}>{escape(text)}</th>" for text in head)
    body = "\n".join("<tr>" + "".join(f"<td{left}>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<p>{escape(caption)}</p>\n<table>\n<thead><tr>{headings}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
