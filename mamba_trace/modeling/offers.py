"""Offering values at sites: what a hookable forward calls, and the module it calls.

A forward is written once, with every site in it. Where nothing inside its module is wanted, offering costs
an attribute test, and the visits are counted in one go at the end; otherwise each site's `SiteModule` is
called, so that nnsight serves it and PyTorch hooks on it fire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..sites import BY_NAME, Scope, Site, offered
from ..tracing import Visit, is_itself


class SiteModule(nn.Module):
    """A place where a value can be read or replaced: returns its input."""

    def __init__(self, site: Site, sizes: dict[str, int]) -> None:
        super().__init__()
        self.site = site
        self.shape = ", ".join(str(sizes.get(axis, axis)) for axis in site.axes)

    def forward(self, value: Tensor) -> Tensor:
        return value

    def _get_name(self) -> str:
        return "Site"

    def extra_repr(self) -> str:
        return f"[{self.shape}], {self.site.hook}"


class Offers:
    """The sites of one module during one call of its forward.

    Args:
        module: a hookable block or mixer.
        scope: which sites it has.
    """

    def __init__(self, module: nn.Module, scope: Scope) -> None:
        self.module = module
        self.names = tuple(site.name for site in offered(scope))
        self.visit = Visit(module)
        #: Whether the sites are offered; if not, they are only counted, when the call is over.
        self.open = self.visit.inside(self.names)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Offer ``value`` at site ``name``; return it, edited or not."""
        if not self.open:
            return value
        site, module = BY_NAME[name], self.module._modules[name]
        assert module is not None
        if self.wants(name):
            layout = torch.contiguous_format
            value = value.clone(memory_format=layout) if site.aliases_earlier else value.contiguous()
        if site.axes.startswith("B"):
            return self.visit.pass_on(module(value))
        return self.visit.serve_whole(module, value)

    def into(self, name: str, value: Tensor) -> Tensor:
        """``value`` as the input of inner module ``name``: a copy where that is wanted, since an edit of it
        in place must not reach the site that the value is as well."""
        return value.clone(memory_format=torch.contiguous_format) if self.wants(name) else value

    def result(self, value: Tensor) -> Tensor:
        """What the module returns: ``value``, or a copy where somebody wants it under that name too."""
        return value.clone() if self.visit.wants_output() else value

    def wants(self, name: str) -> bool:
        """Whether the value of site ``name`` is wanted now, so that one made for it alone is worth making."""
        return self.open and self.visit.wants(name)

    def first_wanted(self, *names: str) -> str | None:
        """The first of ``names`` that is wanted now, positions of a site and inner modules included.

        With ``.source`` of the module wanted the first of them is: its forward must do all that it says.
        """
        if not self.open:
            return None
        if self.visit.wants_within("source"):
            return names[0]
        return next((name for name in names if self.visit.wants_within(name)), None)

    def pass_over(self, *names: str) -> None:
        """Leave out sites whose values nobody wants and the computation does not need."""
        if self.open:
            self.visit.pass_over(names)

    def bypass(self, name: str, plain: type[nn.Module]) -> Any:
        """Inner module ``name``, if its weights may be used without calling it; else ``None``.

        It may where it is a ``plain`` one that nobody has changed, hooked or wants to look into. nnsight then
        counts a visit of it all the same.
        """
        module = self.module._modules[name]
        assert module is not None
        if not is_itself(module, plain) or self.first_wanted(name) is not None:
            return None
        self.visit.pass_over((name,))
        return module

    def optional(self, name: str, make: Callable[[], Tensor]) -> tuple[Tensor | None, bool]:
        """Offer a value that is made only if wanted: ``(value or None, whether it was edited)``."""
        if not self.wants(name):
            self.pass_over(name)
            return None, False
        value = make()
        # Compared by its contents: an edit by way of ``.data`` or ``.numpy()`` is counted nowhere.
        before = value.clone() if self.visit.may_edit(name) else value
        served = self(name, value)
        return served, not same_contents(before, served)

    def close(self) -> None:
        """Count the sites of a call that offered none."""
        if not self.open:
            self.visit.pass_over(self.names)


def same_contents(before: Tensor, after: Tensor) -> bool:
    """Whether two tensors of one shape are equal. What cannot be told from an edit is taken for one."""
    return not isinstance(after, FakeTensor) and not after.is_meta and torch.equal(before, after)
