"""The tracer of a `MambaTrace`: nnsight's, which knows the sites by all their names."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.cache import CacheView

from .demand import GuardedTracer
from .demand.edits import let_edits_go
from .remote import SmallResults


class SiteTracer(SmallResults, GuardedTracer):
    """What ``with model.trace(...) as tracer`` binds."""

    def cache(self, modules: list[Any] | None = None, *args: Any, **kwargs: Any) -> CacheView:
        """Record many places at once, as nnsight does; places may be given as strings.

        Args:
            modules: envoys, paths (``"layers[3].ssm.y"``, ``"layers.3.ssm.h.5"``) or hook names
                (``"blocks.3.hook_h.5"``); ``None`` for every module and site of the model.
            *args, **kwargs: as for nnsight's ``tracer.cache``.

        Raises:
            UnknownSiteError: for a string that names no place.

        Example::

            with model.trace(prompt) as tracer:
                cache = tracer.cache(modules=["blocks.1.hook_resid_post"])
            cache.model.layers[1].resid_post.output
        """
        if modules is not None:
            modules = [self._envoy_path(module) for module in modules]
        return super().cache(modules, *args, **kwargs)

    def stop(self) -> None:
        """End the run here, as nnsight's ``tracer.stop`` does; lasting edits of what lies behind are let go.

        Example::

            with model.trace(prompt) as tracer:
                stream = model.layers[1].resid_post.output.save()
                tracer.stop()
        """
        let_edits_go(self.envoy)
        super().stop()

    def _envoy_path(self, module: Any) -> Any:
        if not isinstance(module, str) or module in {path for path, _ in self.envoy.named_modules()}:
            return module
        return self.envoy.hook(module).path
