"""tutorials/train_demo.py as a module: tutorials is not a package."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

TRAIN_DEMO = Path(__file__).resolve().parent.parent / "tutorials" / "train_demo.py"


@cache
def train_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", TRAIN_DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
