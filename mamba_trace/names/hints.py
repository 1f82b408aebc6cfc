"""What an error about a name adds to it: the nearest names there are, and which models have the place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from ..sites import BY_NAME, FAMILIES, FAMILY_MODELS, LACKED_MODULES, Family

#: Parts of the names of a transformer's places that no name of a Mamba's place has.
OF_A_TRANSFORMER = re.compile(
    r"(^|\.)(attn|mlp|ln1|ln2)\.|hook_(attn|mlp|pattern|result|resid_mid|rot_|[qkvz](_|$))|hook_pos_embed"
)
#: Why a Mamba lacks them.
OF_A_MAMBA = ": a Mamba has no attention, no MLP and one norm in each block; MambaTrace.demo('hybrid') has"

#: The site nearest to such a place, by how its name in a block begins or ends; only hybrids have the first ones.
NEAREST_PLACE = {
    "attn.pattern": r"hook_(pattern|attn_scores)$",
    r"attn.\1": r"hook_(?:rot_)?([qkv])$",
    "attn.z": r"hook_(z|result)$",
    "layer_input": r"hook_(attn_in|[qkv]_input)$",
    "attn_out": r"attn\.|hook_attn",
    "mlp_out": r"mlp\.|hook_mlp",
    "norm_2": r"ln2\.",
    "norm": r"ln1\.",
}


def nearest(name: str, known: list[str]) -> str:
    """``"; did you mean a or b"`` for the known names closest to ``name``, or nothing.

    It has no mark of its own at the end, since what follows it in a message begins with one.
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}" if close else ""


def lacked(name: str) -> str:
    """``": ..."``, why a Mamba lacks a place whose name only a transformer has, or nothing.

    >>> lacked("blocks.0.attn.hook_pattern")
    ": a Mamba has no attention, no MLP and one norm in each block; MambaTrace.demo('hybrid') has"
    """
    if OF_A_TRANSFORMER.search(name) is None:
        return ""
    return OF_A_MAMBA


def nowhere(name: str) -> str:
    """``": ..."``, that no model has a place whose name only a transformer has, and which site is nearest; or nothing.

    >>> nowhere("blocks.3.attn.hook_result")
    ': no architecture has this site; layers[3].attn.z is nearest, in hybrids'
    """
    if OF_A_TRANSFORMER.search(name) is None:
        return ""
    layer = re.match(r"blocks\.(\d+)\.", name)
    found = [(site, re.search(pattern, name)) for site, pattern in NEAREST_PLACE.items()]
    site = next((match.expand(site) for site, match in found if match), "")
    if not site or layer is None:
        return ": no architecture has this site"
    of_all = site in BY_NAME and not BY_NAME[site].part
    return f": no architecture has this site; layers[{layer[1]}].{site} is nearest{'' if of_all else ', in hybrids'}"


def families_of(name: str) -> tuple[Family, ...]:
    """The families whose mixers have the site or the inner module of this name; all for any other name.

    >>> families_of("x_proj")
    ('selective',)
    """
    site = BY_NAME.get(name)
    return tuple(f for f in FAMILIES if name not in LACKED_MODULES[f] and (site is None or f in site.families))


def of_another_family(name: str) -> str:
    """``": ..."``, which models have a site or an inner module that others lack, or nothing.

    >>> of_another_family("B_conv")
    ': it is a site of Mamba-2'
    """
    families = families_of(name)
    if len(families) == len(FAMILIES):
        return ""
    what = "a site" if name in BY_NAME else "a module"
    return f": it is {what} of {models_of(families)}"


def models_of(families: Iterable[Family]) -> str:
    """Families in words, by the models that have them.

    >>> models_of(["selective"])
    'Mamba-1 and Falcon-Mamba'
    """
    return " and ".join(name for family in families for name in FAMILY_MODELS[family])
