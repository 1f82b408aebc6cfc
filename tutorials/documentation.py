"""What mkdocs.yml adds to a build of the documentation: pages of notebooks, and three reasons to fail.

A build with `--strict` fails at a warning. The warnings here are of a public name without a docstring, of a page that
would fetch something from the network, and of a notebook that `tutorials.md` does not name.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
log = logging.getLogger("mkdocs.hooks.documentation")
#: What the reference pages render.
RENDERED = re.compile(r"^::: (\S+)$", re.MULTILINE)
#: A page that loads one of these is no page for a machine without a network.
FETCHED = re.compile(r"""<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)="(https?:)?//[^"]+""")
#: A link of a page to a notebook, which in the documentation has a page of its own.
NOTEBOOK = re.compile(r"\[([^\]]*)\]\(\.\./(\w+)\.ipynb\)")
#: A link of a notebook to a file of the repository.
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")
#: The longest text of one output of a cell, in characters: a whole plotly belongs to the notebook alone.
LONGEST = 4000


def on_pre_build(config: MkDocsConfig) -> None:
    """Warn of every public name of the reference that has no docstring."""
    package = griffe.load("mamba_trace", search_paths=[HERE.parent], allow_inspection=False)
    for page in sorted(Path(config.docs_dir, "reference").glob("*.md")):
        for name in RENDERED.findall(page.read_text(encoding="utf-8")):
            for missing in without_docstring(package[name.removeprefix("mamba_trace.")]):
                log.warning("%s has no docstring", missing)


def without_docstring(item: Any) -> Iterator[str]:
    """The paths of public classes, functions, methods and properties at or below an object that say nothing.

    A method that overrides another says what that one says, if it says nothing itself.
    """
    item = item.final_target if item.is_alias else item
    above = [cls.members.get(item.name) for cls in item.parent.mro()] if item.parent and item.parent.is_class else []
    documented = any(one.has_docstring for one in (item, *above) if one is not None)
    if not documented and (not item.is_attribute or "property" in item.labels):
        yield item.path
    members = item.all_members if item.is_class else item.members
    for name, member in members.items() if item.is_module or item.is_class else ():
        here = not member.is_alias or member.target_path.startswith("mamba_trace")
        if here and member.is_public and not name.startswith("_") and not member.is_module:
            yield from without_docstring(member)


class Examples(griffe.Extension):
    """Examples in docstrings, which Sphinx and doctest mark in ways of their own, become blocks of code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = with_blocks(obj.docstring.value)


def with_blocks(text: str) -> str:
    """A docstring whose literal and doctest blocks are fenced.

    >>> print(with_blocks("Adds.\\n\\n>>> 1 + 1\\n2"))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    parts: list[str] = []
    for block in re.split(r"\n[ ]*\n(?=\S|[ ]*\S)", text):
        before = parts[-1] if parts else ""
        if block.lstrip().startswith(">>>"):
            parts.append(fenced(textwrap.dedent(block), "pycon"))
        elif before.endswith("::"):
            parts[-1] = "**Example**" if before == "Example::" else before.removesuffix(":")
            parts.append(fenced(textwrap.dedent(block), "python"))
        else:
            parts.append(block)
    return "\n\n".join(parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook of the tutorials, with the outputs that it was saved with."""
    named = set(NOTEBOOK.findall((Path(config.docs_dir) / "tutorials.md").read_text(encoding="utf-8")))
    for path in sorted(HERE.glob("[0-9]*.ipynb")):
        if path.stem not in {name for _, name in named}:
            log.warning("%s is not named in tutorials.md", path.name)
        pictures, text = page_of(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(
            File.generated(config, f"notebooks/{path.stem}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        )
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a notebook leads to its page; without a link if this copy of the repository lacks the notebook."""
    del config
    if "/" in page.file.src_uri:  # links of notebooks are made by `followed`, and a reference has none
        return markdown

    def link(match: re.Match[str]) -> str:
        there = f"notebooks/{match[2]}.md"
        return f"[{match[1]}]({there})" if files.get_file_from_path(there) else match[1]

    return NOTEBOOK.sub(link, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn of a page that would fetch a script, a style sheet or a picture."""
    del config
    for match in FETCHED.finditer(output):
        log.warning("%s fetches %s", page.file.src_uri, match[0])
    return output


def page_of(notebook: dict[str, Any], name: str) -> tuple[dict[str, bytes], str]:
    """The pictures and the text of a page with the cells of a notebook."""
    pictures: dict[str, bytes] = {}
    parts = [f"*This is `tutorials/{name}.ipynb`, as it was saved.*"]
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(followed, source))
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(fenced(source, "python"))
            for output in cell["outputs"]:
                parts += shown(output, name, pictures)
    title = next((i for i, part in enumerate(parts) if part.startswith("# ")), None)
    if title is not None:  # the title comes first
        parts.insert(0, parts.pop(title))
    return pictures, "\n\n".join(parts) + "\n"


def followed(link: re.Match[str]) -> str:
    """A link of a notebook to another, or to a page, as it is in the documentation; to other files there is none."""
    words, path = link[1], Path(link[2])
    if path.suffix == ".ipynb" and (HERE / path).exists():
        return f"[{words}]({path.stem}.md{link[3] or ''})"
    if path.parts[:1] == ("docs",):
        return f"[{words}](../{path.relative_to('docs').as_posix()}{link[3] or ''})"
    return words


def shown(output: dict[str, Any], name: str, pictures: dict[str, bytes]) -> list[str]:
    """One output of a cell: its picture if it has one, a short HTML, or its text."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = f"{name}_{len(pictures)}.png"
        pictures[picture] = base64.b64decode(data["image/png"])
        return [f"![output]({picture})"]
    page = "".join(data.get("text/html", ""))
    if page and len(page) < LONGEST and "<script" not in page:
        return [re.sub(r"\n\s*\n", "\n", page)]
    text = "".join(output.get("text") or data.get("text/plain", "") or output.get("traceback", ""))
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [fenced(text[:LONGEST], "text")] if text.strip() else []


def fenced(text: str, language: str) -> str:
    """A block of code in Markdown."""
    return f"```{language}\n{text.rstrip()}\n```"
