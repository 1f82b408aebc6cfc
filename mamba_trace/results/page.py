"""One page for the results of an investigation: to send to a colleague, or to keep beside a paper.

A page for each figure would hold megabytes of the same drawing library each time. A `Report` holds it once,
needs no network, and gives every result a heading, its figure and its caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from ..errors import FileError
from .files import check_writable, optional, replacing
from .heatmap import Heatmap
from .notebook import mimebundle
from .result import Result

__all__ = ["Report"]

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --text: #222; --caption: #444; --link: #0b57d0; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #16181c; --text: #e4e6ea; --caption: #b6bac2; --link: #8ab4f8; }}
}}
body {{ font-family: system-ui, sans-serif; line-height: 1.5; color: var(--text); background: var(--paper);
  margin: 2rem auto; padding: 0 1.5rem; max-width: 1500px; }}
h1, h2 {{ line-height: 1.25; }}
a {{ color: var(--link); }}
section {{ margin-top: 3rem; }}
.figure {{ overflow-x: auto; }}
.caption {{ color: var(--caption); max-width: 60rem; overflow-wrap: anywhere; }}
</style>
<script>{library}</script>
</head>
<body>
<h1>{title}</h1>
<nav><ol>{links}</ol></nav>
{sections}
</body>
</html>
"""
LINK = '<li><a href="#section-{number}">{heading}</a></li>'
SECTION = """<section id="section-{number}">
<h2>{heading}</h2>
<div class="figure">{figure}</div>
<p class="caption">{caption}</p>
</section>"""


class Report(Mapping[str, Result]):
    """Results under headings, in order, for one page.

    Args:
        results: the results by their headings.
        title: the title of the page.

    Raises:
        TypeError: for a value that is not a `Result`.

    Example::

        Report({"The state": grid}, title="Who gets the apple?").save("report.html")
    """

    def __init__(self, results: Mapping[str, Result], title: str = "Report") -> None:
        for heading, result in results.items():
            if not isinstance(result, Result):
                raise TypeError(
                    f"{heading!r} is a {type(result).__name__}; a report holds results, such as patch_grid returns"
                )
        self.title = title
        self._results = dict(results)

    def __getitem__(self, heading: str) -> Result:
        return self._results[heading]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return f"Report({self.title!r}: {', '.join(map(repr, self)) or 'empty'})"

    def __str__(self) -> str:
        """The title, and every result's heading, numbers and caption."""
        return "\n\n".join([self.title, *(f"{heading}\n\n{result}" for heading, result in self.items())])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        # What a notebook shows and stores: the pictures of all results, one above the other.
        return mimebundle(self._heatmaps, str(self))

    def _heatmaps(self) -> list[Heatmap]:
        return [
            replace(heatmap, title=f"{heading}\n{heatmap.title}")
            for heading, result in self.items()
            for heatmap in result.heatmaps()
        ]

    def save(self, path: str | Path) -> Path:
        """Write the report as one self-contained page and return the path.

        Args:
            path: where to write, with the suffix ``.html``. An existing file is replaced at once.

        Raises:
            FileError: for another suffix, if the file cannot be written, or if there are no results.
            MissingExtraError: if plotly is not installed.

        Example::

            Report({"The state": grid}).save("report.html")
        """
        path = check_writable(path, (".html",))
        if not self:
            raise FileError(f"{path}: the report has no results; give it at least one")
        library = optional("plotly.offline", "an interactive figure").get_plotlyjs()
        links, sections = [], []
        for number, (heading, result) in enumerate(self.items(), 1):
            options = {"full_html": False, "include_plotlyjs": False, "div_id": f"figure-{number}"}
            figure = result.figure().to_html(default_width="auto", default_height="auto", **options)
            names = {"number": number, "heading": escape(heading), "caption": escape(result.caption())}
            links.append(LINK.format(**names))
            sections.append(SECTION.format(figure=figure, **names))
        parts = {"links": "\n".join(links), "sections": "\n".join(sections)}
        with replacing(path) as file:
            page = PAGE.format(title=escape(self.title), library=library, **parts)
            file.write_text(page, encoding="utf-8")
        return path
