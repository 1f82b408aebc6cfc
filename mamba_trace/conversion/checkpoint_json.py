"""A JSON file of a checkpoint may hold anything, and the parser's words do not say which file that was.

Contract: `read_json` gives the object in a file, or raises a `CheckpointError` that names the file, what is
wrong with it, and what to do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: if it cannot be read, is empty, is not JSON, or holds something else than an object.
    """
    again = "Download the file again, or write it anew"
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of UTF-8, of JSON, and of whole numbers of thousands of digits
        if not isinstance(error, UnicodeDecodeError) and not text.strip():
            raise CheckpointError(f"{file} is not JSON: it is empty. {again}") from error
        raise CheckpointError(f"{file} is not JSON: {error}. {again}") from error
    except RecursionError as error:
        raise CheckpointError(
            f"{file} is not JSON that can be read: it is nested too deeply. {again}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found a {type(content).__name__}. {again}")
    return content
