"""Mamba-2's scan on every backend: `reference` defines it, and the other modules compute the same faster."""

from __future__ import annotations

from types import ModuleType

from . import cpu, cuda, outline, reference, triton

#: The backends by name. On a GPU ours comes first: mamba-ssm's kernel multiplies float32 values as TF32, which
#: keeps 10 of their 23 bits.
BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton, "cuda": cuda}

__all__ = ["BACKENDS", "cpu", "cuda", "outline", "reference", "triton"]
