"""The programs in tutorials/ as modules: tutorials is not a package."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
TRAIN_DEMO = TUTORIALS / "train_demo.py"


@cache
def program(name: str) -> ModuleType:
    """The program ``tutorials/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, TUTORIALS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_demo() -> ModuleType:
    return program("train_demo")
