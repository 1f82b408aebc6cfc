"""One page for the results of an investigation: what is sent to a colleague, or kept beside a paper.

Each figure as a page of its own is megabytes of the same drawing library. A `Report` has it once, needs no
network, and gives every result a heading, its figure and its caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from ..errors import FileError
from .files import check_writable, optional, replacing
from .results import Result

STYLE = """
body { font-family: system-ui, sans-serif; line-height: 1.5; color: #222; margin: 2rem auto;
  padding: 0 1.5rem; max-width: 1500px; }
h1, h2 { line-height: 1.25; }
section { margin-top: 3rem; }
.figure { overflow-x: auto; }
.caption { color: #444; max-width: 60rem; overflow-wrap: anywhere; }
"""


class Report(Mapping[str, Result]):
    """Results under headings, in order, for one page.

    Args:
        results: the results by their headings.
        title: of the page.

    Raises:
        TypeError: for what is no `Result`.

    Example::

        Report({"The state": grid}, title="Who gets the apple?").save("report.html")
    """

    def __init__(self, results: Mapping[str, Result], title: str = "Report") -> None:
        for heading, result in results.items():
            if not isinstance(result, Result):
                raise TypeError(
                    f"{heading!r} is a {type(result).__name__}; a report holds results, "
                    f"such as patch_grid returns"
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

    def save(self, path: str | Path) -> Path:
        """Write the report as one self-contained page.

        Args:
            path: where to, with the suffix ``.html``. A file that is there is replaced at once.

        Returns:
            The path.

        Raises:
            FileError: for another suffix, where the file cannot be written, or if there are no results.
            MissingExtraError: if plotly is not installed.

        Example::

            Report({"The state": grid}).save("report.html")
        """
        path = check_writable(path, (".html",))
        if not self:
            raise FileError(f"{path}: the report has no results; give it at least one")
        page = self._page()
        with replacing(path) as file:
            file.write_text(page, encoding="utf-8")
        return path

    def _page(self) -> str:
        """The page's HTML."""
        library = optional("plotly.offline", "an interactive figure").get_plotlyjs()
        title = escape(self.title)
        links = "\n".join(
            f'<li><a href="#section-{number}">{escape(heading)}</a></li>'
            for number, heading in enumerate(self, 1)
        )
        sections = "\n".join(
            section(number, heading, result) for number, (heading, result) in enumerate(self.items(), 1)
        )
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f"<style>{STYLE}</style>\n<script>{library}</script>\n</head>\n<body>\n<h1>{title}</h1>\n"
            f"<nav>\n<ol>\n{links}\n</ol>\n</nav>\n{sections}\n</body>\n</html>\n"
        )


def section(number: int, heading: str, result: Result) -> str:
    """The HTML of one result."""
    figure = result.figure().to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{number}",
        default_width="auto",
        default_height="auto",
    )
    return (
        f'<section id="section-{number}">\n<h2>{escape(heading)}</h2>\n<div class="figure">{figure}</div>\n'
        f'<p class="caption">{escape(result.caption())}</p>\n</section>'
    )
