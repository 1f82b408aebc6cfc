"""Mamba-2's scan on every backend: `reference` defines it, and the other modules compute the same faster."""

from __future__ import annotations

from types import ModuleType

from . import cpu, outline, reference, triton

#: The backends by name.
BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton}

__all__ = ["BACKENDS", "cpu", "outline", "reference", "triton"]
