"""The sites: every place of a model where a value can be read or replaced.

One table says what each site is called, what it holds, what wanting it costs, and which Hugging Face module
(if any) already produces it. The hookable modules, the envoys, the name map, the error messages,
`print(model)` and the command line all read this table and nothing else, so a new site is one row here and
one line in the forward that offers it.

The rows are in execution order, which is also the order in which a trace must ask for them.

Symbols: B batch, L positions, D d_model, E d_inner, H heads, P channels of a head (E = H P), G groups of heads
that share B and C, N d_state, R dt_rank, V vocabulary; of attention Q query heads, U heads of keys and values,
W channels of a head, S positions that are attended to; X experts.

Which of the sites a layer has depends on what stands in it: see `layout`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Scope = Literal["model", "block", "mixer", "attn", "moe"]

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

#: What users call the part of a layer that the sites of a scope belong to.
PUBLIC_PART: dict[Scope, str] = {"mixer": "ssm", "attn": "attn", "moe": "moe"}

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
    "Q": "query heads",
    "U": "key heads",
    "W": "head width",
    "S": "attended positions",
    "X": "experts",
}


@dataclass(frozen=True)
class Site:
    """One row of the table.

    Attributes:
        name: what users write after ``layers[l].``, ``layers[l].ssm.`` or ``model.``.
        scope: whether the site belongs to the model, to a block, or to a block's mixer, attention or experts.
        axes: the axes of its value, as letters of `AXES`: in every family, or in all but ``dual``.
        hook: its name in MambaLens, or in TransformerLens 4 where MambaLens has none, without the
            ``blocks.l.`` prefix.
        meaning: one line for people.
        module: the Hugging Face module whose output *is* the site, as Mamba calls it; ``None`` where a module of
            this package offers the value.
        stage: the fused part of the forward that the value lies inside of. Wanting the site costs that
            fusion, in its own layer; ``None`` where the value is made in any case: wanting it costs nothing.
        alias: whether its value shares memory with an earlier site, with a cache, or with what autograd keeps
            for the backward pass. A user who asks for such a site gets a copy, so that no edit of it ever
            reaches another value.
        padding: what the value is on padding, whatever an edit puts there; ``None`` where the value at one
            position reaches no other position, so that an edit on padding is harmless.
        dual: the axes of its value in the family ``dual`` where they differ; ``None`` where they do not.
        families: the families whose mixers have the site.
        part: what a block must have for the site to be there, one of `Kind.parts`; empty if every block has it.
        place: the name of the module that offers the site, where it is not the site's.
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
    part: str = ""
    place: str = ""

    def axes_in(self, family: Family) -> str:
        """The axes of its value in a mixer of this family."""
        return self.axes if family == "selective" or self.dual is None else self.dual

    @property
    def index(self) -> int:
        """Where the site comes in the table, and so in execution order."""
        return _INDEX[self.name]

    @property
    def in_mamba_lens(self) -> bool:
        """Whether MambaLens has it: the others are named after TransformerLens 4's modules."""
        return "." not in self.hook and not self.part

    @property
    def module_name(self) -> str:
        """The name of the module that offers this site, as Mamba has it."""
        return self.place or self.module or self.name

    def path(self, layer: int | None = None) -> str:
        """The path users write, e.g. ``layers[3].ssm.conv``."""
        return prefix_of(self.scope, layer) + self.name

    def hook_name(self, layer: int | None = None) -> str:
        """The MambaLens name, e.g. ``blocks.3.hook_conv``."""
        return self.hook if self.scope == "model" else f"blocks.{layer}.{self.hook}"


def prefix_of(scope: Scope, layer: int | str | None = None) -> str:
    """What stands before a site's name in its path.

    >>> prefix_of("mixer", 3)
    'layers[3].ssm.'
    """
    part = PUBLIC_PART.get(scope)
    return "" if scope == "model" else f"layers[{layer}]." + (f"{part}." if part else "")


#: For the rows of Mamba-2's alone.
DUAL: tuple[Family, ...] = ("dual",)

SITES: tuple[Site, ...] = (
    Site("embeddings", "model", "BLD", "hook_embed", "token embeddings", module="embeddings"),
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
        "the whole trajectory, edits of h[p] included: a record of all states after the scan has made them; an edit of "
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
    Site(
        "ssm_out", "block", "BLD", "hook_ssm_out",
        "what the SSM adds to the residual stream, the model's factor included", alias=True, part="ssm_out",
    ),
    Site("q", "attn", "BLQW", "attn.hook_q", "queries, before any rotation", alias=True, part="attn"),
    Site("k", "attn", "BLUW", "attn.hook_k", "keys, before any factor and rotation", alias=True, part="attn"),
    Site("v", "attn", "BLUW", "attn.hook_v", "values", alias=True, part="attn"),
    Site(
        "pattern", "attn", "BQLS", "attn.hook_pattern",
        "how much each position reads of each; made only where it is wanted", part="attn",
    ),
    Site("z", "attn", "BLQW", "attn.hook_z", "what each head read: the input of o_proj", alias=True, part="attn"),
    Site(
        "attn_out", "block", "BLD", "hook_attn_out",
        "what attention adds to the residual stream, the model's factor included", alias=True, part="attn_out",
    ),
    Site(
        "shared_out", "block", "BLD", "hook_shared_out",
        "what the shared transformer adds to the SSM's input, and not to the residual stream", part="shared_out",
    ),
    Site("resid_mid", "block", "BLD", "hook_resid_mid", "residual stream in the middle of the block", part="mid"),
    Site(
        "mlp_input", "block", "BLD", "hook_mlp_in",
        "the MLP's own copy of resid_mid: an edit never reaches the residual stream", alias=True, part="mid",
    ),
    Site("norm_2", "block", "BLD", "ln2.hook_out", "mlp_input after RMSNorm", module="norm_2", part="mid"),
    Site(
        "router", "moe", "BLX", "moe.hook_router", "router logits, from which the experts are chosen",
        alias=True, part="moe", place="router_logits",
    ),
    Site(
        "mlp_out", "block", "BLD", "hook_mlp_out",
        "what the MLP or the experts add to the residual stream, the model's factor included",
        alias=True, part="mlp_out",
    ),
    Site("resid_post", "block", "BLD", "hook_resid_post", "residual stream out of the block"),
    Site("norm_f", "model", "BLD", "hook_norm", "final RMSNorm", module="norm_f"),
    Site("lm_head", "model", "BLV", "hook_logits", "logits", module="lm_head"),
    Site(
        "logits", "model", "BLV", "hook_logits",
        "logits as the model returns them; lm_head's output where it returns that", part="logits",
    ),
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
#: The hook name of `attn_out` in a model where TransformerLens's means another value.
ATTENTION_TERM = "hook_attn_term"
#: MambaLens's name of the logits is that of `lm_head`; where `logits` are a site of their own see `layout`.
BY_HOOK: dict[str, Site] = {site.hook: site for site in reversed(SITES)} | {ATTENTION_TERM: BY_NAME["attn_out"]}
#: What stands for any layer in the tables of sites.
ANY_LAYER = re.compile(r"^(layers\[l\]|layers\.l|blocks\.l)\.")
#: The sites of a mixer that its own modules produce under another name.
BY_MODULE = {s.module: s for s in SITES if s.scope == "mixer" and s.module and s.module != s.name}
_INDEX = {site.name: index for index, site in enumerate(SITES)}


def site_named(name: Any) -> Site | None:
    """The site of a name without its layer, if there is one.

    It may be written as ``"conv"`` or ``"hook_conv"``, with its part, ``"attn.z"`` or ``"attn.hook_z"``, and as in the
    tables of sites, ``"layers[l].ssm.conv"`` or ``"blocks.l.hook_conv"``.
    """
    if not isinstance(name, str):
        return None
    name = ANY_LAYER.sub("", name)
    if (site := BY_NAME.get(name) or BY_HOOK.get(name)) is not None:
        return site
    part, _, last = name.rpartition(".")
    if part and last in BY_NAME and PUBLIC_PART.get(BY_NAME[last].scope) == part:
        return BY_NAME[last]
    in_parts = [site for site in SITES if site.hook.endswith(f".{name}")]
    return in_parts[0] if len(in_parts) == 1 else None


def in_scope(scope: Scope, family: Family | None = None) -> tuple[Site, ...]:
    """The sites of one scope in execution order: those of a family, or of all."""
    return tuple(site for site in SITES if site.scope == scope and (family is None or family in site.families))


def describe_axes(axes: str) -> str:
    """``"BEN"`` -> ``"[B batch, E d_inner, N d_state]"``."""
    return "[" + ", ".join(f"{axis} {AXES[axis]}" for axis in axes) + "]"
