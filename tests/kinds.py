"""The kinds of models that analyses are tested on: each architecture, and Mamba-2 with one group and with two."""

from __future__ import annotations

import functools
from typing import Any

import torch
from conftest import make_hf

from mamba_trace import MambaTrace

#: The arguments of `conftest.make_hf` by kind. The limits of delta cut some of its values at either end.
KINDS: dict[str, dict[str, Any]] = {
    "mamba": {},
    "falcon_mamba": {"model_type": "falcon_mamba"},
    "mamba2, one group": {"model_type": "mamba2", "n_groups": 1, "time_step_limit": (0.1, 0.3)},
    "mamba2, two groups": {"model_type": "mamba2", "time_step_limit": (0.1, 0.3)},
}
DUAL = [kind for kind in KINDS if kind.startswith("mamba2")]
#: The kinds on the backends, for the fixture `each_backend`: that of a GPU once for each family of scans. Triton's is
#: interpreted here, which is slow: the tests of scans run each scan on it, and test_dispatch.py whole models.
BACKENDS = [(kind, backend) for kind in KINDS for backend in ("reference", "cpu")]
BACKENDS += [(kind, "cuda") for kind in ("mamba", "mamba2, two groups")]


def make(kind: str, kernels: str = "auto", **changes: Any) -> MambaTrace:
    """A new model of a kind, in float64 unless ``changes`` say otherwise."""
    return MambaTrace(make_hf(**{"dtype": torch.float64, **KINDS[kind], **changes}), kernels=kernels)


@functools.cache
def made(kind: str) -> MambaTrace:
    """The model of a kind in float64, made once for all tests, none of which may change it."""
    return make(kind)
