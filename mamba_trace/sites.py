"""The sites: every place of a Mamba where a value can be read or replaced.

One table says what each site is called, what it holds, what wanting it costs, and which Hugging Face module
(if any) already produces it. The hookable modules, the envoys, the name map, the error messages,
`print(model)` and the command line all read this table and nothing else, so a new site is one row here and
one line in the forward that offers it.

The rows are in execution order, which is also the order in which a trace must ask for them.

Symbols: B batch, L positions, D d_model, E d_inner, N d_state, R dt_rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Scope = Literal["model", "block", "mixer"]

#: The parts of a mixer's forward that a fast kernel computes without ever making the values inside:
#: ``conv`` is the convolution with its SiLU, ``scan`` the scan with softplus, D term and gate, and ``states``
#: (inside ``scan``) the recurrence itself, whose states are never all in memory.
Stage = Literal["conv", "scan", "states"]

#: Where each scope's modules live: under the user's names, and under Hugging Face's.
PUBLIC_PREFIX: dict[Scope, str] = {"model": "", "block": "layers[{layer}].", "mixer": "layers[{layer}].ssm."}
MODULE_PREFIX: dict[Scope, str] = {
    "model": "",
    "block": "backbone.layers.{layer}.",
    "mixer": "backbone.layers.{layer}.mixer.",
}

#: What each axis of a site counts, for messages.
AXES = {
    "B": "batch",
    "L": "positions",
    "D": "d_model",
    "E": "d_inner",
    "N": "d_state",
    "R": "dt_rank",
    "V": "vocabulary",
}


@dataclass(frozen=True)
class Row:
    """One line of the table as people are shown it; see `rows`.

    Attributes:
        path: what users write under ``model``, e.g. ``layers[l].ssm.h[p]``.
        axes: as `Site.axes`.
        hook: the MambaLens name, or ``None`` where MambaLens has none.
        meaning: one line for people.
    """

    path: str
    axes: str
    hook: str | None
    meaning: str

    @property
    def shape(self) -> str:
        """The axes, spaced: ``"B L E N"``."""
        return " ".join(self.axes)


@dataclass(frozen=True)
class Site:
    """One row of the table.

    Attributes:
        name: what users write after ``layers[l].``, ``layers[l].ssm.`` or ``model.``.
        scope: whether the site belongs to the model, to a block, or to a block's mixer.
        axes: the axes of its value, as letters of `AXES`.
        hook: its name in MambaLens, or in TransformerLens 4 where MambaLens has none, without the
            ``blocks.l.`` prefix.
        meaning: one line for people.
        module: the Hugging Face module whose output *is* the site, relative to `MODULE_PREFIX`;
            ``None`` where a module of this package offers the value.
        stage: the fused part of the forward that the value lies inside of. Wanting the site costs that
            fusion, in its own layer; ``None`` where the value is made in any case: wanting it costs nothing.
        alias: whether its value shares memory with an earlier site, with a cache, or with what autograd keeps
            for the backward pass. A user who asks for such a site gets a copy, so that no edit of it ever
            reaches another value.
        padding: what the value is on padding, whatever an edit puts there; ``None`` where the value at one
            position reaches no other position, so that an edit on padding is harmless.
    """

    name: str
    scope: Scope
    axes: str
    hook: str
    meaning: str
    module: str | None = None
    stage: Stage | None = None
    alias: bool = False
    padding: float | None = None

    @property
    def index(self) -> int:
        """Where the site comes in the table, and so in execution order."""
        return _INDEX[self.name]

    @property
    def in_mamba_lens(self) -> bool:
        """Whether MambaLens has it: the others are named after TransformerLens 4's mixers."""
        return not self.hook.startswith("mixer.")

    @property
    def module_name(self) -> str:
        """The name of the module that offers this site, relative to `MODULE_PREFIX`."""
        return self.module or self.name

    def path(self, layer: int | None = None) -> str:
        """The path users write, e.g. ``layers[3].ssm.conv``."""
        return PUBLIC_PREFIX[self.scope].format(layer=layer) + self.name

    def module_path(self, layer: int | None = None) -> str:
        """The path in the Hugging Face module tree, e.g. ``backbone.layers.3.mixer.conv``."""
        return MODULE_PREFIX[self.scope].format(layer=layer) + self.module_name

    def hook_name(self, layer: int | None = None) -> str:
        """The MambaLens name, e.g. ``blocks.3.hook_conv``."""
        return self.hook if self.scope == "model" else f"blocks.{layer}.{self.hook}"


SITES: tuple[Site, ...] = (
    Site("embeddings", "model", "BLD", "hook_embed", "token embeddings", module="backbone.embeddings"),
    Site("resid_pre", "block", "BLD", "hook_resid_pre", "residual stream into the block", alias=True),
    Site(
        "layer_input", "block", "BLD", "hook_layer_input",
        "the block's own copy of resid_pre: an edit never reaches the residual stream", alias=True,
    ),
    Site("norm", "block", "BLD", "hook_normalized_input", "layer_input after RMSNorm", module="norm"),
    Site("skip", "mixer", "BLE", "hook_skip", "gate half of in_proj", alias=True),
    Site("x_in", "mixer", "BLE", "hook_in_proj", "x half of in_proj", alias=True, padding=0.0),
    Site(
        "conv", "mixer", "BLE", "hook_conv",
        "causal convolution of x_in, before SiLU", stage="conv", alias=True,
    ),
    Site("ssm_input", "mixer", "BLE", "hook_ssm_input", "x of the SSM: SiLU of conv", padding=0.0),
    Site(
        "h_start", "mixer", "BEN", "hook_h_start",
        "state before the first token of this call: zeros, or the cached state", alias=True,
    ),
    Site("delta_1", "mixer", "BLR", "hook_delta_1", "dt part of x_proj", alias=True),
    Site("delta_2", "mixer", "BLE", "hook_delta_2", "delta_1 after dt_proj, with its bias", alias=True),
    Site(
        "delta", "mixer", "BLE", "hook_delta",
        "step size: softplus of delta_2, 0 on padding", stage="scan", padding=0.0,
    ),
    Site("A", "mixer", "EN", "hook_A", "-exp(A_log)"),
    Site("A_bar", "mixer", "BLEN", "hook_A_bar", "discretised A: exp(delta A)", stage="scan", padding=1.0),
    Site("B", "mixer", "BLN", "hook_B", "input matrix of each token", alias=True, padding=0.0),
    Site("B_bar", "mixer", "BLEN", "hook_B_bar", "discretised B: delta B", stage="scan", padding=0.0),
    Site("C", "mixer", "BLN", "hook_C", "output matrix of each token", alias=True, padding=0.0),
    Site(
        "write", "mixer", "BLEN", "mixer.hook_ssm_write",
        "what each token adds to the decayed state: delta B x", stage="scan", padding=0.0,
    ),
    Site(
        "h", "mixer", "BLEN", "hook_h",
        "the whole trajectory, edits of h[p] included; writing it means writing every h[p], so an edit of "
        "h[:, p] changes y at p alone and is not carried on", stage="states",
    ),
    Site(
        "h_read", "mixer", "BLEN", "mixer.hook_ssm_state",
        "the states as y reads them: an edit changes y at its position alone and is never carried on",
        stage="states", alias=True,
    ),
    Site("y", "mixer", "BLE", "hook_y", "C h, before the D term", stage="scan"),
    Site("ssm_output", "mixer", "BLE", "hook_ssm_output", "y + D x", stage="scan"),
    Site("after_skip", "mixer", "BLE", "hook_after_skip", "ssm_output times SiLU(skip)"),
    Site("out_proj", "mixer", "BLD", "hook_out_proj", "the mixer's output", module="out_proj"),
    Site("resid_post", "block", "BLD", "hook_resid_post", "residual stream out of the block"),
    Site("norm_f", "model", "BLD", "hook_norm", "final RMSNorm", module="backbone.norm_f"),
    Site("lm_head", "model", "BLV", "hook_logits", "logits", module="lm_head"),
)  # fmt: skip

#: The site with a place of its own for each position.
STATE = "h"
#: What that place holds, where the site's own row says what all of them together do.
STATE_MEANING = "the state carried after token p: an edit changes y at p and everything after"
#: Inner modules of a mixer whose output is not a site but has a place of its own; the site after each.
NATIVE_MODULES = {"in_proj": "skip", "conv1d": "conv", "x_proj": "delta_1", "dt_proj": "delta_2"}

BY_NAME: dict[str, Site] = {site.name: site for site in SITES}
BY_HOOK: dict[str, Site] = {site.hook: site for site in SITES}
_INDEX = {site.name: index for index, site in enumerate(SITES)}


def site_named(name: Any) -> Site | None:
    """The site of a name or a hook name without its layer, ``"conv"`` or ``"hook_conv"``, if there is one."""
    return (BY_NAME.get(name) or BY_HOOK.get(name)) if isinstance(name, str) else None


def in_scope(scope: Scope) -> tuple[Site, ...]:
    """The sites of one scope, in execution order."""
    return tuple(site for site in SITES if site.scope == scope)


def offered(scope: Scope) -> tuple[Site, ...]:
    """The sites of one scope that a module of this package offers, in execution order."""
    return tuple(site for site in in_scope(scope) if site.module is None)


def walk(n_layers: int) -> Iterator[tuple[Site, int | None]]:
    """Every (site, layer) of a model of ``n_layers`` in execution order; layer is None for the model's own.

    >>> [(site.name, layer) for site, layer in walk(1)][:2]
    [('embeddings', None), ('resid_pre', 0)]
    """
    inner = [site.index for site in SITES if site.scope != "model"]
    first, stop = inner[0], inner[-1] + 1
    yield from ((site, None) for site in SITES[:first])
    for layer in range(n_layers):
        yield from ((site, layer) for site in SITES[first:stop])
    yield from ((site, None) for site in SITES[stop:])


def rows() -> Iterator[Row]:
    """The table as people are shown it, in execution order: the command line and the README print these.

    The state has two rows, as ``h[p]`` and the whole ``h`` are two things: an edit of the first is carried on
    to later positions, an edit of the second is not.

    >>> [(row.path, row.shape, row.hook) for row in rows() if "ssm.h" in row.path and "start" not in row.path]
    [('layers[l].ssm.h[p]', 'B E N', 'blocks.l.hook_h.p'), ('layers[l].ssm.h', 'B L E N', None)]
    """
    for site in SITES:
        path = PUBLIC_PREFIX[site.scope].format(layer="l") + site.name
        hook = site.hook if site.scope == "model" else f"blocks.l.{site.hook}"
        if site.name == STATE:
            yield Row(f"{path}[p]", site.axes.replace("L", ""), f"{hook}.p", STATE_MEANING)
        nameless = site.name == STATE or not site.in_mamba_lens
        yield Row(path, site.axes, None if nameless else hook, site.meaning)


def describe_axes(axes: str) -> str:
    """``"BEN"`` -> ``"[B batch, E d_inner, N d_state]"``."""
    return "[" + ", ".join(f"{axis} {AXES[axis]}" for axis in axes) + "]"
