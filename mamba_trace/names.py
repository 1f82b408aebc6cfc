"""One place, three spellings: the path users write, MambaLens's hook name, the Hugging Face module path.

Analysis code comes with names from elsewhere: ``blocks.3.hook_h.5`` (MambaLens), ``blocks.3.mixer.hook_out``
(TransformerLens 4's bridge), ``model.backbone.layers.3.mixer.h.5`` (what nnsight's caches key on). This
module translates all of them, from the site table alone, and never maps a name to a place that means
something else.

    >>> to_path("blocks.3.hook_h.5")
    'layers[3].ssm.h[5]'
    >>> to_hook_name("layers[3].ssm.h[5]")
    'blocks.3.hook_h.5'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import PositionError, UnknownSiteError
from .sites import BY_HOOK, BY_NAME, MODULE_PREFIX, STATE, Site, walk

#: TransformerLens 4 bridge names that mean the same place. Of the model:
BRIDGE_MODEL = {
    "embed.hook_out": "embeddings",
    "ln_final.hook_out": "norm_f",
    "unembed.hook_in": "norm_f",
    "unembed.hook_out": "lm_head",
}
#: ... and of a block, relative to ``blocks.l.``. Values are paths relative to ``layers[l].``.
BRIDGE_BLOCK = {
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "norm.hook_in": "layer_input",
    "norm.hook_out": "norm",
    "hook_mixer_in": "norm",
    "mixer.hook_in": "norm",
    "mixer.in_proj.hook_in": "norm",
    "mixer.in_proj.hook_out": "ssm.in_proj",
    "mixer.hook_in_proj": "ssm.in_proj",
    "mixer.conv1d.hook_out": "ssm.conv1d",
    "mixer.hook_conv": "ssm.conv1d",
    "mixer.x_proj.hook_in": "ssm.ssm_input",
    "mixer.x_proj.hook_out": "ssm.x_proj",
    "mixer.hook_x_proj": "ssm.x_proj",
    "mixer.dt_proj.hook_in": "ssm.delta_1",
    "mixer.dt_proj.hook_out": "ssm.delta_2",
    "mixer.hook_dt_proj": "ssm.delta_2",
    "mixer.hook_ssm_dt": "ssm.delta_2",
    "mixer.out_proj.hook_in": "ssm.after_skip",
    "mixer.out_proj.hook_out": "ssm.out_proj",
    "mixer.hook_out": "ssm.out_proj",
    "mixer.hook_ssm_out": "ssm.out_proj",
    "hook_mixer_out": "ssm.out_proj",
}
#: Inner modules of the mixer whose output is no site of the table but has a place of its own.
NATIVE_MODULES = ("in_proj", "conv1d", "x_proj", "dt_proj")
#: What names of a transformer's places have in them, and no name of a Mamba's.
OF_A_TRANSFORMER = re.compile(
    r"(^|\.)(attn|mlp|ln1|ln2)\.|hook_(attn|mlp|pattern|result|resid_mid|rot_|[qkvz](_|$))|hook_pos_embed"
)

_PATH = re.compile(r"layers(?:\[(?P<layer>\d+)\]|\.(?P<dotted>\d+))\.(?P<rest>.+)")
_CONTAINER = re.compile(r"backbone\.layers\.(?P<layer>\d+)(?P<mixer>\.mixer)?(\.output)?")
_POSITION = re.compile(rf"{STATE}(?:\[(?P<index>-?\d+)\]|\.(?P<dotted>-?\d+))")
_BLOCK_HOOK = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<rest>.+)")
_STATE_HOOK = re.compile(r"hook_h\.(?P<position>-?\d+)")


@dataclass(frozen=True)
class Place:
    """A site of a particular layer, and for the state of a particular position.

    Attributes:
        site: the row of the table, or ``None`` for one of `NATIVE_MODULES`.
        layer: the layer, or ``None`` for the model's own sites.
        position: the position for ``h[p]``, or ``None``.
        native: the inner module's name where ``site`` is ``None``.
    """

    site: Site | None
    layer: int | None = None
    position: int | None = None
    native: str | None = None

    @property
    def path(self) -> str:
        """The path users write."""
        if self.site is None:
            return f"layers[{self.layer}].ssm.{self.native}"
        suffix = "" if self.position is None else f"[{self.position}]"
        return self.site.path(self.layer) + suffix

    @property
    def module_path(self) -> str:
        """The path in the Hugging Face module tree, which nnsight's locations and caches are named by."""
        if self.site is None:
            return f"{MODULE_PREFIX['mixer'].format(layer=self.layer)}{self.native}"
        suffix = "" if self.position is None else f".{self.position}"
        return self.site.module_path(self.layer) + suffix

    @property
    def hook_name(self) -> str:
        """The MambaLens name, or TransformerLens 4's. Raises `UnknownSiteError` where neither has one."""
        if self.site is None:
            raise UnknownSiteError(
                f"{self.path} has no MambaLens hook: {self.native} is a module, not a site"
            )
        if self.site.name == STATE and self.position is None:
            raise UnknownSiteError(
                f"{self.path} (the whole trajectory) has no hook name: MambaLens has one hook for each "
                f"position, blocks.{self.layer}.hook_h.p, which is {self.path}[p] here"
            )
        suffix = "" if self.position is None else f".{self.position}"
        return self.site.hook_name(self.layer) + suffix


def hook_names(n_layers: int, n_positions: int) -> list[str]:
    """Every MambaLens hook name of a model, in execution order.

    >>> hook_names(1, 2)[:2]
    ['hook_embed', 'blocks.0.hook_resid_pre']

    Raises:
        PositionError: if there are no positions, or what is given is no number of them.
    """
    if isinstance(n_positions, bool) or not isinstance(n_positions, int) or n_positions < 1:
        raise PositionError(
            f"hook names are those of a prompt of so many tokens, an integer of at least one position, not "
            f"{n_positions!r}"
        )
    names: list[str] = []
    for site, layer in walk(n_layers):
        if not site.in_mamba_lens:
            continue
        positions: Iterator[int | None] = iter(range(n_positions)) if site.name == STATE else iter((None,))
        names += [Place(site, layer, position).hook_name for position in positions]
    return names


def to_path(name: str) -> str:
    """The path of a hook name: MambaLens's, TransformerLens 4's where it means the same place, or a path.

    Args:
        name: e.g. ``"blocks.3.hook_h.5"``, ``"blocks.3.mixer.hook_out"``, ``"layers.3.ssm.h.5"``.

    Returns:
        The path under the model, e.g. ``"layers[3].ssm.h[5]"``.

    Raises:
        UnknownSiteError: if no place has this name.

    Example::

        to_path("blocks.3.hook_h.5")  # "layers[3].ssm.h[5]"
    """
    return parse(name).path


def to_hook_name(path: str) -> str:
    """The hook name of a path, MambaLens's if it has one; the inverse of `to_path`.

    Args:
        path: e.g. ``"layers[3].ssm.h[5]"``, also as ``"model.layers.3.ssm.h.5.output"``.

    Returns:
        The hook name, e.g. ``"blocks.3.hook_h.5"``.

    Raises:
        UnknownSiteError: if there is no such site, or neither MambaLens nor TransformerLens has a hook there.

    Example::

        to_hook_name("layers[3].ssm.h[5]")  # "blocks.3.hook_h.5"
    """
    return parse(path).hook_name


def to_bridge_name(path: str) -> str:
    """TransformerLens 4's name of a place, where its Mamba bridge has one that means the same.

    Args:
        path: a path or a hook name, e.g. ``"layers[3].ssm.delta_2"``.

    Returns:
        The bridge's name; where it has several, that of a module's output. `to_path` maps it back.

    Raises:
        UnknownSiteError: if there is no such place, or the bridge has none that means the same.

    >>> to_bridge_name("layers[3].ssm.delta_2")
    'blocks.3.mixer.dt_proj.hook_out'
    """
    place = parse(path)
    if place.site is not None and not place.site.in_mamba_lens:
        return place.hook_name
    bridge = BRIDGE_MODEL if place.layer is None else BRIDGE_BLOCK
    relative = place.path.removeprefix(f"layers[{place.layer}].")
    same = sorted(
        (name for name, there in bridge.items() if there == relative),
        key=lambda name: not name.endswith(".hook_out"),
    )
    if not same:
        raise UnknownSiteError(f"{place.path} has no name in TransformerLens 4's Mamba bridge")
    return same[0] if place.layer is None else f"blocks.{place.layer}.{same[0]}"


def parse(name: str) -> Place:
    """The place that a hook name or a path names. Raises `UnknownSiteError`."""
    if not isinstance(name, str):
        raise UnknownSiteError(
            f"a place is named by a string, 'blocks.3.hook_h.5' or 'layers[3].ssm.h[5]', not by the "
            f"{type(name).__name__} {name!r}"
        )
    stripped = name.removeprefix("model.").removesuffix(".output")
    place = _parse_hook(stripped) or _parse_path(stripped)
    if place is None:
        raise UnknownSiteError(f"no site is called {name!r}{_suggest(stripped)}")
    return place


def _parse_hook(name: str) -> Place | None:
    if name in BY_HOOK and BY_HOOK[name].scope == "model":
        return Place(BY_HOOK[name])
    if name == "ln_final.hook_in":
        raise UnknownSiteError(
            "ln_final.hook_in is the residual stream out of the last layer: use its blocks.l.hook_resid_post"
        )
    if name in BRIDGE_MODEL:
        return Place(BY_NAME[BRIDGE_MODEL[name]])
    match = _BLOCK_HOOK.fullmatch(name)
    if match is None:
        return None
    layer, rest = int(match["layer"]), match["rest"]
    if rest in BRIDGE_BLOCK:
        return _parse_path(f"layers[{layer}].{BRIDGE_BLOCK[rest]}")
    state = _STATE_HOOK.fullmatch(rest)
    if state is not None:
        return Place(BY_NAME[STATE], layer, int(state["position"]))
    site = BY_HOOK.get(rest)
    if site is None or site.scope == "model":
        return None
    return Place(site, layer)


def _parse_path(path: str) -> Place | None:
    path = path.removeprefix("backbone.")
    match = _PATH.fullmatch(path)
    if match is None:
        site = BY_NAME.get(path)
        return Place(site) if site is not None and site.scope == "model" else None
    layer, rest = int(match["layer"] or match["dotted"]), match["rest"]
    for prefix in ("ssm.", "mixer."):
        if rest.startswith(prefix):
            return _parse_mixer(layer, rest.removeprefix(prefix))
    site = BY_NAME.get(rest)
    return Place(site, layer) if site is not None and site.scope == "block" else None


def _parse_mixer(layer: int, rest: str) -> Place | None:
    position = _POSITION.fullmatch(rest)
    if position is not None:
        return Place(BY_NAME[STATE], layer, int(position["index"] or position["dotted"]))
    site = BY_NAME.get(rest)
    if site is not None and site.scope == "mixer":
        return Place(site, layer)
    return Place(None, layer, native=rest) if rest in NATIVE_MODULES else None


def public_path(location: str) -> str:
    """The path users write for one of nnsight's locations; the location itself where it is no site's.

    >>> public_path("model.backbone.layers.3.mixer.h.5.output")
    'layers[3].ssm.h[5]'
    """
    inner = location[location.find("backbone.") :] if "backbone." in location else location
    container = _CONTAINER.fullmatch(inner)
    if container is not None:
        return f"layers[{container['layer']}]" + (".ssm" if container["mixer"] else "")
    try:
        return parse(inner).path
    except UnknownSiteError:
        return location


def nearest(name: str, known: list[str]) -> str:
    """``"; did you mean ...?"`` for the known names closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def lacked(name: str) -> str:
    """``": ..."``, why a Mamba has no place of a name that only a transformer has, or nothing.

    >>> lacked("blocks.0.attn.hook_pattern")
    ': a Mamba has no attention, no MLP and one norm in each block'
    """
    if OF_A_TRANSFORMER.search(name) is None:
        return ""
    return ": a Mamba has no attention, no MLP and one norm in each block"


def _suggest(name: str) -> str:
    match = _BLOCK_HOOK.fullmatch(name) or _PATH.fullmatch(name)
    layer = int(match.groupdict().get("layer") or match.groupdict().get("dotted") or 0) if match else 0
    # There is a hook of each position and none of the whole h, so one of them is suggested.
    digits = re.search(r"\d+$", name)
    hooks = [
        Place(site, layer, int(digits[0]) if digits else 0).hook_name
        if site.name == STATE
        else site.hook_name(layer)
        for site in BY_NAME.values()
    ]
    paths = [site.path(layer) for site in BY_NAME.values()]
    hint = lacked(name) or nearest(name, hooks if "hook" in name else paths)
    return hint or "; `mamba-trace sites` lists them all"
