"""The notebooks in tutorials/: each is what its script makes, and says what a fresh run says."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from tutorial import TUTORIALS, program

notebooks = program("notebooks")
SCRIPTS: list[Path] = notebooks.scripts()
#: Tutorials whose subject has no picture.
WITHOUT_PICTURES: set[str] = set()
#: How large a notebook may be, in bytes, so that every page that shows notebooks shows it.
LARGEST = 300_000
#: A path from the root of a file system, and not a tag that closes, a URL or two words with a slash between them.
ABSOLUTE = re.compile(r"(?<![\w.:/<])/[\w.-]+/[\w.-]|\b[A-Z]:\\")
#: The checkpoints that a reader may want to use instead of the small model that ships.
LARGE = re.compile(r"state-spaces/mamba2?-370m")

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def stored(script: Path) -> NotebookNode:
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(notebook: NotebookNode) -> list[list[str]]:
    """What each code cell says: the text of its streams and results."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs] for cell in code
    ]


def test_there_are_tutorials_and_no_notebook_without_a_script() -> None:
    assert SCRIPTS
    assert len({script.name[:2] for script in SCRIPTS}) == len(SCRIPTS)
    assert {path.stem for path in TUTORIALS.glob("*.ipynb")} == {script.stem for script in SCRIPTS}


@each
def test_the_notebook_is_made_of_its_script(script: Path) -> None:
    made, kept = notebooks.unexecuted(script), stored(script)
    assert [(cell.id, cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.id, cell.cell_type, cell.source) for cell in made.cells
    ]
    assert kept.metadata == notebooks.METADATA
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [cell.id for cell in code if cell.metadata]


@each
def test_the_outputs_can_be_shown_anywhere(script: Path) -> None:
    path = script.with_suffix(".ipynb")
    found = outputs(stored(script))
    assert not [output for output in found if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in found) or script.stem in WITHOUT_PICTURES
    shown = [text for output in found for kind, text in output.get("data", {}).items() if kind != "image/png"]
    shown += [output.text for output in found if output.output_type == "stream"]
    assert not [match.group() for text in shown for match in ABSOLUTE.finditer(str(text))]
    assert path.stat().st_size < LARGEST


@each
def test_the_text_says_how_to_use_a_large_model(script: Path) -> None:
    text = [cell.source for cell in stored(script).cells if cell.cell_type == "markdown"]
    paragraphs = [" ".join(part.split()) for source in text for part in source.split("\n\n")]
    assert [part for part in paragraphs if "cell" in part and LARGE.search(part)]


@each
def test_every_code_cell_stands_between_texts(script: Path) -> None:
    kinds = [cell.cell_type for cell in stored(script).cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert ("code", "code") not in list(pairwise(kinds))


@each
def test_a_fresh_run_says_what_is_stored(script: Path) -> None:
    fresh = notebooks.executed(script)
    assert not [output.text for output in outputs(fresh) if output.get("name") == "stderr"]
    assert texts(fresh) == texts(stored(script))


def test_a_cell_that_raises_is_not_stored(tmp_path: Path) -> None:
    script = tmp_path / "99_wrong.py"
    script.write_text("# %%\nraise KeyError('of the cell')\n", encoding="utf-8")
    with pytest.raises(Exception, match="of the cell"):
        notebooks.write(script)
    assert list(tmp_path.iterdir()) == [script]


def test_written_twice_it_is_the_same_file(tmp_path: Path) -> None:
    script = tmp_path / "99_twice.py"
    text = "# %% [markdown]\n# Text.\n\n# %%\nimport matplotlib.pyplot as plt\nprint('a', flush=True)\nprint('b')\n"
    script.write_text(text + "plt.plot([1, 2]);\n", encoding="utf-8")
    first = notebooks.write(script).read_bytes()
    assert notebooks.write(script).read_bytes() == first
    assert b'"a\\n"' in first
    assert b"image/png" in first
