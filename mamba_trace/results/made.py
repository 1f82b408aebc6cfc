"""What a result was made by and of, so that its file says under which conditions its numbers hold."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from .._version import __version__

#: The libraries whose versions may change a number.
LIBRARIES = ("torch", "transformers", "nnsight")


def made_by(model: Any) -> dict[str, Any]:
    """The versions, and the model with its revision, dtype, device and kernels, as a result keeps them.

    Args:
        model: a `MambaTrace` whose weights are loaded.

    Returns:
        ``versions`` by library; ``model``, its hub id or folder; ``revision``, the commit that was loaded where it is
        known, or else the one that was asked for; ``architecture``, ``dtype``, ``device`` and ``kernels``.
    """
    config, module = model.config, model._module
    return {
        "versions": {"mamba_trace": __version__} | {library: version(library) for library in LIBRARIES},
        "model": str(getattr(module, "name_or_path", "") or getattr(config, "_name_or_path", "")),
        "revision": getattr(config, "_commit_hash", None) or model.revision,
        "architecture": model.architecture.name,
        "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        "device": str(model.device),
        "kernels": model.kernels,
    }
