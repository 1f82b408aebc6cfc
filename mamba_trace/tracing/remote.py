"""A trace that runs on a server is a request to a model that somebody else built, in another process.

Three things go wrong on the way, each with an error about something else. The server finds the model by a
key, and nnsight asks the hub for it, which knows no folders. nnsight takes a package that is installed from a
checkout for the caller's own code, and sends it along, classes and all. And another release of this package
on the server may have other sites. Besides, a value cut out of a larger tensor comes back with the memory of
the larger one.

So `Remote` gives hub ids and folders alike a key; this package is looked up on the server and never sent; a
request names the release it was written for, and a server with another release refuses it with both names;
what comes back has the size of what was saved. Everything else is nnsight's: ``remote=True``, a URL or
``"local"``. What is otherwise in NDIF's sandbox is in `sandbox`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.cache import CacheView
from nnsight.ndif import pull_env
from nnsight.tracing.tracer import Tracer
from torch import Tensor

from .._version import __version__
from ..errors import CheckpointError, VersionError
from .frames import UsersErrors
from .saving import ForgettingTracer, is_saved
from .served import nnsight_mark

PACKAGE = __name__.split(".")[0]
TASK = "text-generation"
#: Names in the environment of a request.
VERSION, KERNELS = PACKAGE, f"{PACKAGE}.kernels"


class Remote:
    """The half of a `MambaTrace` that a server needs: its key, its environment and its results."""

    _kernels: str
    repo_id: str | None
    revision: str | None
    kwargs: dict[str, Any]

    def session(self, *args: Any, **kwargs: Any) -> Tracer:
        """Several traces that share values; with ``remote=`` a single request, of which only saves come back.

        Args:
            *args, **kwargs: as for nnsight's ``session``; ``remote`` is ``True``, the URL of an NDIF server,
                or ``"local"`` for the round trip without a server.

        Raises:
            CheckpointError: if ``remote`` is a server and this model is not a checkpoint that it could load.

        Example::

            with model.session(remote="local"):
                with model.trace(source):
                    state = model.layers[1].ssm.h[5].output  # [B,E,N]
                with model.trace(prompt):
                    model.layers[1].ssm.h[5].output = state
                    logits = model.lm_head.output[:, -1].save()  # [B,V]
        """
        kwargs.setdefault("tracer_cls", SessionTracer)
        return super().session(*args, **kwargs)  # type: ignore[misc]

    def _remote_backend(self, remote: bool | str, blocking: bool, job_id: str | None, verbose: bool) -> Any:
        if remote == "local":
            return LocalBackend(self, verbose=verbose)
        host = remote if isinstance(remote, str) else None
        return ServerBackend(self, host=host, blocking=blocking, job_id=job_id, verbose=verbose)

    # -- the key ---------------------------------------------------------------------------------------

    def _remoteable_model_key(self) -> str:
        if not self.repo_id:
            raise CheckpointError(
                "a server cannot load this model: it was made from a loaded module, a configuration or a "
                "state dict and has no name. Save it in a folder that the server has too, with "
                "model._module.save_pretrained(folder), and load it from there: MambaTrace(folder)"
            )
        folder = Path(self.repo_id).expanduser()
        if folder.is_dir():
            return self._key(str(folder.resolve()))
        try:
            return super()._remoteable_model_key()  # type: ignore[misc]
        except (OSError, OfflineModeIsEnabled):  # no hub to ask for the id's canonical spelling
            return self._key(self.repo_id)

    def _key(self, name: str) -> str:
        # Servers compare keys as strings, so this is spelled as nnsight spells a key.
        trusted = {"trust_remote_code": True} if self.kwargs.get("trust_remote_code") else {}
        return json.dumps({"repo_id": name, "revision": self.revision, **trusted, "task": TASK})

    # -- the environment of a request ------------------------------------------------------------------

    def _remoteable_get_env(self) -> dict[str, Any]:
        env: dict[str, Any] = super()._remoteable_get_env()  # type: ignore[misc]
        return {**env, VERSION: __version__, KERNELS: self._kernels}

    def _remoteable_set_env(self, env: dict[str, Any] | None) -> None:
        env = dict(env or {})
        check_version(env.pop(VERSION, __version__))
        # The model is shared, so a request that names no kernels must not get those of the last request.
        kernels = env.pop(KERNELS, "auto")
        if kernels != self._kernels:
            self.kernels = kernels
        super()._remoteable_set_env(env)  # type: ignore[misc]


def check_task(task: str) -> str:
    """The task in a server's model key, which must be the only one that there is.

    Raises:
        CheckpointError: for any other task.
    """
    if task != TASK:
        raise CheckpointError(f"a Mamba language model is there for task={TASK!r}, not {task!r}")
    return task


def check_version(theirs: str) -> None:
    """Refuse a request that was written for another release.

    Raises:
        VersionError: naming both releases and what to install.
    """
    if theirs != __version__:
        raise VersionError(
            f"this request was written with {PACKAGE} {theirs}, and the server has "
            f"{PACKAGE} {__version__}: their sites may differ. Install the server's: "
            f"pip install {PACKAGE}=={__version__}"
        )


def never_by_value() -> None:
    """Keep nnsight from sending this package along: servers have it.

    nnsight sends every module that it finds outside of site-packages, a checkout of this package included.
    """
    from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES

    pull_env()  # which registers them, once in a process; nnsight calls it again before each request
    _PICKLE_BY_VALUE_MODULES.discard(PACKAGE)


class ServerBackend(RemoteBackend):
    """A request to a server; what comes back belongs to the caller's model.

    Args:
        model: a `MambaTrace`.
        **kwargs: as for nnsight's ``RemoteBackend``.
    """

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model.to_model_key(), env=model._remoteable_get_env(), **kwargs)
        self.model = model

    def _serialize(self, tracer: Any) -> bytes:
        never_by_value()
        return super()._serialize(tracer)

    def finalize(self, content: bytes) -> dict[str, Any]:
        """The saved values; a cache among them can be navigated like that of a local run."""
        result: dict[str, Any] = super().finalize(content)
        for value in result.values():
            if isinstance(value, CacheView):
                value._cache.model = self.model
        return result


class LocalBackend(LocalSimulationBackend):
    """``remote="local"``: nnsight hides what no server has and runs the request here.

    This package stays importable, as on a server: imported anew it would register its kernels twice. Unlike
    nnsight, this also restores the order of ``sys.path``.
    """

    def __call__(self, tracer: Any) -> None:
        never_by_value()
        super().__call__(tracer)

    def _hide_local_modules(self) -> dict[str, Any]:
        path = list(sys.path)
        hidden = super()._hide_local_modules()
        for name in [name for name in hidden["modules"] if name.split(".")[0] == PACKAGE]:
            sys.modules[name] = hidden["modules"].pop(name)
        return {**hidden, "path": path}

    def _restore(self, hidden: dict[str, Any]) -> None:
        super()._restore(hidden)
        sys.path[:] = hidden["path"]


class SmallResults(Tracer):
    """A tracer whose saved values take no more memory than they show, when a server sends them back.

    A saved tensor that is part of a larger one is written with all of the larger one's memory:
    ``lm_head.output[:, -1].save()`` would send the logits of every position.
    """

    def execute(self, code: CodeType) -> None:
        """Run the block as nnsight does."""
        super().execute(code)
        if self.node is None and self.info is not None and self.info.frame is not None:  # came as a request
            scope = self.info.frame.f_locals
            saved = {name: value for name, value in scope.items() if is_saved(value)}
            scope.update({name: nnsight_mark(compact(value)) for name, value in saved.items()})


class SessionTracer(UsersErrors, SmallResults, ForgettingTracer):
    """What ``with model.session(...)`` binds."""


def compact(value: Any) -> Any:
    """A value with copies of those of its tensors that do not fill their memory.

    Args:
        value: a tensor, or lists, tuples and dictionaries of tensors; anything else is returned as it is.
    """
    if type(value) in (list, tuple):
        return type(value)(compact(part) for part in value)
    if type(value) is dict:
        return {key: compact(part) for key, part in value.items()}
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return value
    filled = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if filled else value.clone(memory_format=torch.contiguous_format)
