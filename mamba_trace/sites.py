"""The sites: every place of a Mamba where a value can be read or replaced.

One table says what each site is called, what it holds, what wanting it costs, and which Hugging Face module
(if any) already produces it. The hookable modules, the envoys, the name map, the error messages,
`print(model)` and the command line all read this table and nothing else, so a new site is one row here and
one line in the forward that offers it.

The rows are in execution order, which is also the order in which a trace must ask for them.

Symbols: B batch, L positions, D d_model, E d_inner, H heads, P channels of a head (E = H P), G groups of heads
that share B and C, N d_state, R dt_rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Scope = Literal["model", "block", "mixer"]

#: How a mixer's state moves: ``selective`` with a decay for each channel and state number, as in Mamba-1 and
#: Falcon-Mamba, or ``dual`` with one decay for each head, as in Mamba-2 (state space duality).
Family = Literal["selective", "dual"]
FAMILIES: tuple[Family, ...] = ("selective", "dual")
#: The names of the architectures of each family, as `modeling.architectures` has them.
FAMILY_MODELS: dict[Family, tuple[str, ...]] = {"selective": ("Mamba-1", "Falcon-Mamba"), "dual": ("Mamba-2",)}

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
    "H": "heads",
    "P": "head_dim",
    "G": "groups",
    "N": "d_state",
    "R": "dt_rank",
    "V": "vocabulary",
}


@dataclass(frozen=True)
class Row:
    """One line of the table as people are shown it; see `rows`.

    Attributes:
        path: what users write under ``model``, e.g. ``layers[l].ssm.h[p]``.
        axes: the axes of the value in each family that has it, as letters of `AXES`.
        hook: the MambaLens name, or ``None`` where MambaLens has none.
        meaning: one line for people.
    """

    path: str
    axes: dict[Family, str]
    hook: str | None
    meaning: str

    def shape(self, family: Family) -> str | None:
        """The axes in a family, spaced: ``"B L E N"``; ``None`` where the family lacks the site."""
        return " ".join(self.axes[family]) if family in self.axes else None


@dataclass(frozen=True)
class Site:
    """One row of the table.

    Attributes:
        name: what users write after ``layers[l].``, ``layers[l].ssm.`` or ``model.``.
        scope: whether the site belongs to the model, to a block, or to a block's mixer.
        axes: the axes of its value, as letters of `AXES`: in every family, or in all but ``dual``.
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
        dual: the axes of its value in the family ``dual`` where they differ; ``None`` where they do not.
        families: the families whose mixers have the site.
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
    dual: str | None = None
    families: tuple[Family, ...] = FAMILIES

    def axes_in(self, family: Family) -> str:
        """The axes of its value in a mixer of this family."""
        return self.axes if family == "selective" or self.dual is None else self.dual

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


#: For the rows of Mamba-2's alone.
DUAL: tuple[Family, ...] = ("dual",)

SITES: tuple[Site, ...] = (
    Site("embeddings", "model", "BLD", "hook_embed", "token embeddings", module="backbone.embeddings"),
    Site("resid_pre", "block", "BLD", "hook_resid_pre", "residual stream into the block", alias=True),
    Site(
        "layer_input", "block", "BLD", "hook_layer_input",
        "the block's own copy of resid_pre: an edit never reaches the residual stream", alias=True,
    ),
    Site("norm", "block", "BLD", "hook_normalized_input", "layer_input after RMSNorm", module="norm"),
    Site("skip", "mixer", "BLE", "hook_skip", "gate part of in_proj", alias=True),
    Site("x_in", "mixer", "BLE", "hook_in_proj", "x part of in_proj", alias=True, padding=0.0),
    Site("B_in", "mixer", "BLGN", "hook_B_in", "B part of in_proj", alias=True, padding=0.0, families=DUAL),
    Site("C_in", "mixer", "BLGN", "hook_C_in", "C part of in_proj", alias=True, padding=0.0, families=DUAL),
    Site(
        "conv", "mixer", "BLE", "hook_conv",
        "causal convolution of x_in, before SiLU", stage="conv", alias=True,
    ),
    Site(
        "B_conv", "mixer", "BLGN", "hook_B_conv",
        "causal convolution of B_in, before SiLU", stage="conv", alias=True, families=DUAL,
    ),
    Site(
        "C_conv", "mixer", "BLGN", "hook_C_conv",
        "causal convolution of C_in, before SiLU", stage="conv", alias=True, families=DUAL,
    ),
    Site(
        "ssm_input", "mixer", "BLE", "hook_ssm_input",
        "x of the SSM: SiLU of conv; an edit changes delta, B and C too in Mamba-1, and x alone in Mamba-2",
        alias=True, padding=0.0,
    ),
    Site(
        "h_start", "mixer", "BEN", "hook_h_start",
        "state before the first token of this call: zeros, or the cached state", alias=True, dual="BHPN",
    ),
    Site("delta_1", "mixer", "BLR", "hook_delta_1", "dt part of x_proj, in Mamba-2 of in_proj", alias=True, dual="BLH"),
    Site(
        "delta_2", "mixer", "BLE", "hook_delta_2",
        "delta_1 after dt_proj, with its bias; in Mamba-2 delta_1 + dt_bias", alias=True, dual="BLH",
    ),
    Site(
        "delta", "mixer", "BLE", "hook_delta",
        "step size: softplus of delta_2, in Mamba-2 within time_step_limit; 0 on padding",
        stage="scan", padding=0.0, dual="BLH",
    ),
    Site("A", "mixer", "EN", "hook_A", "-exp(A_log)", dual="H"),
    Site(
        "A_bar", "mixer", "BLEN", "hook_A_bar", "discretised A: exp(delta A)", stage="scan", padding=1.0, dual="BLH",
    ),
    Site("B", "mixer", "BLN", "hook_B", "input matrix of each token", alias=True, padding=0.0, dual="BLGN"),
    Site(
        "B_bar", "mixer", "BLEN", "hook_B_bar", "discretised B: delta B", stage="scan", padding=0.0, dual="BLHN",
    ),
    Site("C", "mixer", "BLN", "hook_C", "output matrix of each token", alias=True, padding=0.0, dual="BLGN"),
    Site(
        "write", "mixer", "BLEN", "mixer.hook_ssm_write",
        "what each token adds to the decayed state: delta B x", stage="scan", padding=0.0, dual="BLHPN",
    ),
    Site(
        "h", "mixer", "BLEN", "hook_h",
        "the whole trajectory, edits of h[p] included; writing it means writing every h[p], so an edit of "
        "h[:, p] changes y at p alone and is not carried on", stage="states", dual="BLHPN",
    ),
    Site(
        "h_read", "mixer", "BLEN", "mixer.hook_ssm_state",
        "the states as y reads them: an edit changes y at its position alone and is never carried on",
        stage="states", alias=True, dual="BLHPN",
    ),
    Site("y", "mixer", "BLE", "hook_y", "C h, before the D term", stage="scan"),
    Site("ssm_output", "mixer", "BLE", "hook_ssm_output", "y + D x", stage="scan"),
    Site("after_skip", "mixer", "BLE", "hook_after_skip", "ssm_output times SiLU(skip)"),
    Site(
        "inner_norm", "mixer", "BLE", "hook_inner_norm",
        "after_skip after the mixer's own RMSNorm, with its weight", module="norm", families=DUAL,
    ),
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
#: The inner modules that the mixers of a family lack.
LACKED_MODULES: dict[Family, tuple[str, ...]] = {"selective": (), "dual": ("x_proj", "dt_proj")}

BY_NAME: dict[str, Site] = {site.name: site for site in SITES}
BY_HOOK: dict[str, Site] = {site.hook: site for site in SITES}
#: The sites of a mixer that its own modules produce under another name.
BY_MODULE = {s.module: s for s in SITES if s.scope == "mixer" and s.module and s.module != s.name}
_INDEX = {site.name: index for index, site in enumerate(SITES)}


def site_named(name: Any) -> Site | None:
    """The site of a name or a hook name without its layer, ``"conv"`` or ``"hook_conv"``, if there is one."""
    return (BY_NAME.get(name) or BY_HOOK.get(name)) if isinstance(name, str) else None


def in_scope(scope: Scope, family: Family | None = None) -> tuple[Site, ...]:
    """The sites of one scope in execution order: those of a family, or of all."""
    return tuple(site for site in SITES if site.scope == scope and (family is None or family in site.families))


def offered(scope: Scope, family: Family | None = None) -> tuple[Site, ...]:
    """The sites of one scope that a module of this package offers, in execution order."""
    return tuple(site for site in in_scope(scope, family) if site.module is None)


def walk(n_layers: int, family: Family = "selective") -> Iterator[tuple[Site, int | None]]:
    """Every (site, layer) of a model of ``n_layers`` in execution order; layer is None for the model's own.

    >>> [(site.name, layer) for site, layer in walk(1)][:2]
    [('embeddings', None), ('resid_pre', 0)]
    """
    inner = [site.index for site in SITES if site.scope != "model"]
    first, stop = inner[0], inner[-1] + 1
    of_layer = [site for site in SITES[first:stop] if family in site.families]
    yield from ((site, None) for site in SITES[:first])
    for layer in range(n_layers):
        yield from ((site, layer) for site in of_layer)
    yield from ((site, None) for site in SITES[stop:])


def rows(family: Family | None = None) -> Iterator[Row]:
    """The table as people are shown it, in execution order: the command line and the README print these.

    The state has two rows, as ``h[p]`` and the whole ``h`` are two things: an edit of the first is carried on
    to later positions, an edit of the second is not.

    Args:
        family: leave out the rows that this family lacks.

    >>> states = [row for row in rows() if row.path.endswith((".h", ".h[p]"))]
    >>> [(row.path, row.shape("selective"), row.hook) for row in states]
    [('layers[l].ssm.h[p]', 'B E N', 'blocks.l.hook_h.p'), ('layers[l].ssm.h', 'B L E N', None)]
    """
    for site in SITES:
        if family is not None and family not in site.families:
            continue
        path = PUBLIC_PREFIX[site.scope].format(layer="l") + site.name
        hook = site.hook if site.scope == "model" else f"blocks.l.{site.hook}"
        axes = {each: site.axes_in(each) for each in site.families}
        if site.name == STATE:
            at_one = {each: letters.replace("L", "") for each, letters in axes.items()}
            yield Row(f"{path}[p]", at_one, f"{hook}.p", STATE_MEANING)
        nameless = site.name == STATE or not site.in_mamba_lens
        yield Row(path, axes, None if nameless else hook, site.meaning)


def describe_axes(axes: str) -> str:
    """``"BEN"`` -> ``"[B batch, E d_inner, N d_state]"``."""
    return "[" + ", ".join(f"{axis} {AXES[axis]}" for axis in axes) + "]"
