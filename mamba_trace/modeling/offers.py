"""Offering values at sites: what a hookable forward calls, and the module it calls.

A forward is written once, with every site in it. Where nothing inside its module is wanted, offering costs
an attribute test, and the visits are counted all at once when the call is over; otherwise each site's
`SiteModule` is called, so that nnsight serves it and PyTorch hooks on it fire.

A value is *wanted* if a worker of the running trace waits for it, or a cache or a PyTorch hook takes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..sites import BY_NAME, SITES, Family, Site, Stage
from ..tracing import HOOKS, Visit, forward_of, hooks_of, is_itself
from .past import masked


class SiteModule(nn.Module):
    """A place where a value can be read or replaced: returns its input.

    Attributes:
        site: its row of the table.
        axes: the axes of its value here, as letters of `sites.AXES`.
        shape: the same in numbers, where they are known.
    """

    def __init__(self, site: Site, axes: str, sizes: dict[str, int]) -> None:
        super().__init__()
        self.site, self.axes = site, axes
        self.shape = ", ".join(str(sizes.get(axis, axis)) for axis in axes)

    def forward(self, value: Tensor) -> Tensor:
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # People take all hooks off by a new dictionary. They stay where `add_sites` has noted that they are.
        if name in HOOKS and name in self.__dict__:
            own = self.__dict__[name]
            own.clear()
            own.update(value)
        else:
            super().__setattr__(name, value)

    def _get_name(self) -> str:
        return "Site"

    def extra_repr(self) -> str:
        return f"[{self.shape}], {self.site.hook}"


@functools.cache
def names_inside(family: Family, *stages: Stage) -> tuple[str, ...]:
    """The names of the sites inside of fused stages of a mixer, in execution order."""
    return tuple(site.name for site in SITES if site.stage in stages and family in site.families)


#: Under this name a hookable module keeps the names of the modules that offer its sites, in execution order.
SITE_NAMES = "_mamba_trace_sites"
#: And under this one where PyTorch keeps the hooks on them.
SITE_HOOKS = "_mamba_trace_hooks"


def add_sites(module: nn.Module, sites: Iterable[Site], sizes: dict[str, int]) -> None:
    """Give a hookable module a `SiteModule` for each of ``sites`` that no module of Hugging Face's produces.

    Args:
        module: a block, a mixer or another part of a model.
        sites: those that it has, in execution order.
        sizes: of the axes, as far as they are known.
    """
    own: list[Site] = [site for site in sites if site.module is None]
    family: Any = getattr(module, "family", "selective")
    own_axes: dict[str, str] = getattr(module, "own_axes", {})
    for site in own:
        axes = own_axes.get(site.name) or site.axes_in(family)
        module.add_module(site.module_name, SiteModule(site, axes, sizes))
    module.__dict__[SITE_NAMES] = names = tuple(site.module_name for site in own)
    module.__dict__[SITE_HOOKS] = tuple(chain.from_iterable(hooks_of(module.get_submodule(name)) for name in names))


class Offers:
    """The sites of one module during one call of its forward.

    Args:
        module: a hookable module, which `add_sites` gave its sites.
        mask: which columns of this call are tokens [B,L]; ``None`` where none is padding.
    """

    def __init__(self, module: nn.Module, mask: Tensor | None = None) -> None:
        self.module, self.mask, self.family = module, mask, getattr(module, "family", None)
        self.names: tuple[str, ...] = module.__dict__[SITE_NAMES]
        self.visit = Visit(module)
        #: Whether anything inside is wanted. If not, sites are only counted, when the call is over.
        self.open = self.visit.inside(module.__dict__[SITE_HOOKS])
        #: The sites that were offered or passed over in this call.
        self.done: set[str] = set()
        #: Of each stage, the first site that was offered in this call because it was wanted.
        self.served: dict[Stage, str] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Offer ``value`` at site ``name``; return it, edited or not. Padding is as the table says again."""
        if not self.open:
            return value
        site: Any = self.module._modules[name]
        padding = site.site.padding if self.mask is not None and self.wants(name) else None
        served = self._serve(name, value)
        return served if padding is None else masked(served, self.mask, padding)

    def optional(self, name: str, make: Callable[[], Tensor]) -> tuple[Tensor | None, bool]:
        """Offer a value that is made only if wanted: ``(value or None, whether it was edited)``."""
        if not self.wants(name):
            self.pass_over(name)
            return None, False
        value = make()
        # Compared by its contents: PyTorch does not count an edit by way of ``.data`` or ``.numpy()``.
        before = value.clone() if self.visit.may_edit(name) else value
        served = self._serve(name, value)
        if served is before or same_contents(before, served):
            return served, False
        padding = BY_NAME[name].padding
        return (served if padding is None else masked(served, self.mask, padding)), True

    def _serve(self, name: str, value: Tensor) -> Tensor:
        module: Any = self.module._modules[name]
        site: Site = module.site
        self.done.add(name)
        if self.wants(name):
            if site.stage is not None:
                self.served.setdefault(site.stage, name)
            layout = torch.contiguous_format
            value = value.clone(memory_format=layout) if site.alias else value.contiguous()
        if site.axes.startswith("B"):
            return self.visit.pass_on(module(value))
        return self.visit.serve_whole(module, value)

    def into(self, name: str, value: Tensor) -> Tensor:
        """The input for the inner module ``name``. If somebody watches that module it gets a copy, so that an
        in-place edit of its input does not also change the site whose value this is."""
        return value.clone(memory_format=torch.contiguous_format) if self.wants(name) else value

    def through(self, name: str, value: Tensor) -> Tensor:
        """What the inner module ``name`` returns for ``value``."""
        returned: Tensor = self.called(self.module._modules[name], name, value)
        return returned

    def called(self, inner: Any, name: str, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What ``inner``, the inner module ``name``, returns for ``value`` and other arguments.

        Where nothing is wanted its forward is run at once, if a call would do no more.
        """
        if not self.open and (forward := forward_of(inner, type(inner))) is not None:
            self.visit.pass_over((name,))
            return forward(inner, value, *args, **kwargs)
        return inner(self.into(name, value), *args, **kwargs)

    def result(self, value: Tensor) -> Tensor:
        """What the module returns: ``value``, or a copy where the output of the module itself is wanted."""
        return value.clone() if self.visit.wants_output() else value

    # -- what is wanted --------------------------------------------------------------------------------

    def wants(self, name: str) -> bool:
        """Whether the value of a site, or the call of an inner module, is wanted now."""
        return self.open and self.visit.wants(name)

    def first_wanted(self, *names: str) -> str | None:
        """The first of ``names`` that is wanted now, positions of a site and parts of a module included.

        Where somebody looks at ``.source`` of this module it is the first of all: the forward must then do
        everything that it says.
        """
        if not self.open:
            return None
        if names and self.visit.wants_within("source"):
            return names[0]
        return next((name for name in names if self.visit.wants_within(name)), None)

    def left(self, *stages: Stage) -> tuple[str, ...]:
        """The sites inside of ``stages`` that this call has not come to yet."""
        return tuple(name for name in names_inside(self.family, *stages) if name not in self.done)

    def inside(self, *stages: Stage) -> str | None:
        """A site inside of fused ``stages`` that was wanted in this call or is wanted now, ``None`` if none.

        Only if there is none may a kernel compute past them; say so with `leave_out`.
        """
        if not self.open:
            return None
        served = next((self.served[stage] for stage in stages if stage in self.served), None)
        return served or self.first_wanted(*self.left(*stages))

    # -- what is not offered ---------------------------------------------------------------------------

    def leave_out(self, *stages: Stage) -> None:
        """Count a visit of the sites that are left inside of ``stages``, whose values are not made."""
        if self.open:
            self.pass_over(*self.left(*stages))

    def pass_over(self, *names: str) -> None:
        """Count a visit of sites whose values nobody wants and the computation does not need."""
        if self.open:
            self.visit.pass_over(names)
            self.done.update(names)

    def bypass(self, name: str, plain: type[nn.Module]) -> Any:
        """Inner module ``name`` if its weights may be used without calling it, else ``None``.

        They may if it is a ``plain`` one that nobody has changed, hooked or wants to look into. nnsight then counts a
        visit of it all the same.
        """
        module = self.module._modules[name]
        assert module is not None
        if not is_itself(module, plain) or self.first_wanted(name) is not None:
            return None
        self.visit.pass_over((name,))
        return module

    def close(self) -> None:
        """Count a visit of every site that the call did not come to."""
        self.visit.pass_over(name for name in self.names if name not in self.done)


def same_contents(before: Tensor, after: Tensor) -> bool:
    """Whether two tensors of one shape are equal; where their numbers cannot be compared, ``False``."""
    return not isinstance(after, FakeTensor) and not after.is_meta and torch.equal(before, after)
