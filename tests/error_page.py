"""The page on errors: its examples, and what each of them raises.

    python tests/error_page.py

writes the messages that are raised today where they stand on the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parent.parent / "tutorials" / "docs" / "errors.md"
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n\n(?:```text\n(?P<said>.*?)\n```$)?|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


class Example(NamedTuple):
    """Lines of the page, what they should raise (nothing, if they only prepare), and what they raise."""

    code: str
    said: str | None
    raised: str | None


def examples(page: str, folder: Path) -> Iterator[Example]:
    """Run every block of a page in order, from files in a folder: nnsight reads the source of a trace."""
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCK.finditer(page)):
        code, said = block["code"] or block["setup"], block["said"]
        path = folder / f"block_{number}.py"
        path.write_text(code, encoding="utf-8")
        raised = None
        try:
            exec(compile(code, str(path), "exec"), names)
        except Exception as error:
            if said is None:
                raise
            raised = f"{kind_of(error)}: {message_of(error)}"
        yield Example(code, said, raised)


def kind_of(error: Exception) -> str:
    """The name of the class; nnsight raises one that is made of the user's error and its own."""
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ != "NNsightException")


def message_of(error: Exception) -> str:
    """The message alone, without the traceback of the trace that nnsight puts before it."""
    words = str(error).strip()
    _, found, last = words.rpartition(f"{kind_of(error)}: ")
    return (last if found else words).replace(str(Path.cwd()), "/home/you")


def agree(said: str, raised: str) -> bool:
    """Whether a message is quoted: the class, and most of the words of four letters or more."""
    if said.partition(":")[0] != raised.partition(":")[0]:
        return False
    words = set(re.findall(r"\w{4,}", said.partition(":")[2]))
    return bool(words) and len(words & set(re.findall(r"\w{4,}", raised))) >= 0.6 * len(words)


def main() -> None:
    import tempfile

    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for example in examples(page, Path(folder)):
            if example.said is not None:
                assert example.raised, f"nothing was raised by\n{example.code}"
                quoted = f"```python\n{example.code}```\n\n```text\n"
                page = page.replace(f"{quoted}{example.said}\n```", f"{quoted}{example.raised}\n```")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
