"""The tutorials as notebooks: each script ``NN_name.py`` becomes ``NN_name.ipynb``, executed, with its outputs.

The scripts are the source. They are in jupytext's percent format: ``# %% [markdown]`` begins a cell of text and
``# %%`` a cell of code. Edit a script, never a notebook, and then write its notebook anew::

    python tutorials/notebooks.py        # all of them
    python tutorials/notebooks.py 02 05  # two of them

It takes what the ``dev`` extra installs. The notebooks run on the models that ship with the package, without a
network. Nothing in a written notebook depends on the machine or the time, so writing it twice gives the same file,
except for pictures of measured times.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).resolve().parent
#: Seconds that a cell may take.
TIMEOUT = 300
#: A progress bar shows how long something takes, which is another number in each run.
ENVIRONMENT = {"TQDM_DISABLE": "1"}
#: All that a notebook says of the program that runs it.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
#: Colours and other commands to a terminal.
TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
#: What bitsandbytes, where it is installed, says on processors with bfloat16 instructions.
PROCESSOR = re.compile(r"Failed to load CPU gemm_4bit_forward .*\n")


def scripts() -> list[Path]:
    """The scripts of all tutorials, in their order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def unexecuted(script: Path) -> NotebookNode:
    """The notebook of a script, without outputs."""
    notebook = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    cells = []
    for number, cell in enumerate(notebook.cells):
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        cells.append(make(cell.source, id=f"cell-{number:02}"))
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def executed(script: Path) -> NotebookNode:
    """The notebook of a script, with the outputs of a fresh run.

    It runs in an empty folder of its own, so that the files it writes stay nowhere.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = unexecuted(script)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        client.execute(env=os.environ | ENVIRONMENT)
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.metadata.clear()  # when and how long it ran
        cell.execution_count = number
        outputs = [plain(output, number) for output in cell.outputs]
        cell.outputs = joined([output for output in outputs if output.get("text") != ""])
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.validate(notebook)
    return notebook


def plain(output: NotebookNode, number: int) -> NotebookNode:
    """An output as it is stored: a picture if it can be one, since pages that show a notebook run no scripts.

    A picture keeps only the first line of its text, the title: a table of the same numbers would differ in a last digit
    from one processor to the next.
    """
    if output.output_type == "stream":
        output.text = PROCESSOR.sub("", TERMINAL.sub("", output.text))
    if output.output_type in ("display_data", "execute_result"):
        output.metadata.clear()
        if "image/png" in output.data:
            title = output.data.get("text/plain", "picture").splitlines()[0]
            image = smaller(output.data["image/png"])
            output.data = nbformat.from_dict({"image/png": image, "text/plain": title})
    if output.output_type == "execute_result":
        output.execution_count = number
    return output


def smaller(image: str) -> str:
    """A PNG file in base64 with at most 256 colours, which takes about a third of the space."""
    content = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(image))) as picture:
        picture.convert("RGB").quantize(256).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode("ascii") + "\n"


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs, with the pieces of a stream in one: where it is cut depends on the time."""
    kept: list[NotebookNode] = []
    for output in outputs:
        last = kept[-1] if kept else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            kept.append(output)
    return kept


def write(script: Path) -> Path:
    """Execute the notebook of a script and store it beside the script."""
    notebook = executed(script)
    path = script.with_suffix(".ipynb")
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return path


def main(numbers: list[str]) -> None:
    """Write the notebooks whose names begin with these numbers, or all of them."""
    chosen = [script for script in scripts() if not numbers or script.name[:2] in numbers]
    missing = set(numbers) - {script.name[:2] for script in chosen}
    if missing:
        sys.exit(f"no tutorial has the number {', '.join(sorted(missing))}; there are {[s.name for s in scripts()]}")
    for script in chosen:
        path = write(script)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
