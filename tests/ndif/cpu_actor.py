"""An NDIF model actor that runs on the CPU, so that the real server can be tested without a GPU.

NDIF places models on CUDA devices and checks that they are there. This actor keeps everything of the
sandboxed one, which also runs trusted requests, and loads the model where it is.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel


@ray.remote(num_cpus=1, max_restarts=-1)
class CpuModelActor(SandboxModelDeployment):
    """One replica of a model, on the CPU."""

    CACHEABLE = False

    def load_from_disk(self) -> Any:
        """The model of this actor's key."""
        torch.cuda.synchronize = lambda *args, **kwargs: None  # what NDIF waits for after each request
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model
