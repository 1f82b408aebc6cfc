"""TransformerLens 4's bridge names: those that mean the same place as one of the package's, by family.

The bridge has a class of mixer for each architecture, so what a name means depends on the model:
``mixer.out_proj.hook_in`` is after_skip in Mamba-1, and in Mamba-2, where a norm stands between the two,
inner_norm. Its ``mixer.hook_ssm_write`` and ``mixer.hook_ssm_state`` are sites of their own, in the table of
`sites`. Both have other axes than here in Mamba-1, [B,E,L,N] where ours are [B,L,E,N]; in Mamba-2 both have
[B,L,H,P,N]. The second is read behind the scan, so it is never ``h[p]``, which is carried on.

Some names mean another value in a Falcon-H1 than elsewhere, because of its factors and the place of its norm:
``hook_attn_out``, ``mixer.in_proj.hook_in`` and ``mixer.out_proj.hook_in``. They are refused there: see `layouts`.

Source: TransformerLens 4.3, ``model_bridge/generalized_components``: ``ssm_block``, ``ssm_mixer``, ``ssm2_mixer``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..sites import FAMILIES, Family

#: The names of the model's places, by path. The first of several is preferred, here and below.
OF_MODEL = {
    "embeddings": "embed.hook_out",
    "norm_f": "ln_final.hook_out unembed.hook_in",
    "lm_head": "unembed.hook_out",
}
#: Those of a block, relative to ``blocks.l.`` and ``layers[l].``, that mean the same in all families ...
_OF_EVERY_BLOCK = {
    "resid_pre": "hook_in",
    "layer_input": "norm.hook_in",
    "norm": "norm.hook_out hook_mixer_in mixer.hook_in mixer.in_proj.hook_in",
    "ssm.in_proj": "mixer.in_proj.hook_out mixer.hook_in_proj",
    "ssm.conv1d": "mixer.conv1d.hook_out mixer.hook_conv",
    "ssm.out_proj": "mixer.out_proj.hook_out mixer.hook_out mixer.hook_ssm_out hook_mixer_out",
    "resid_post": "hook_out",
}
#: ... and all of them, by family.
OF_BLOCK: dict[Family, dict[str, str]] = {
    "selective": _OF_EVERY_BLOCK
    | {
        "ssm.ssm_input": "mixer.x_proj.hook_in",
        "ssm.x_proj": "mixer.x_proj.hook_out mixer.hook_x_proj",
        "ssm.delta_1": "mixer.dt_proj.hook_in",
        "ssm.delta_2": "mixer.dt_proj.hook_out mixer.hook_dt_proj mixer.hook_ssm_dt",
        "ssm.after_skip": "mixer.out_proj.hook_in",
    },
    "dual": _OF_EVERY_BLOCK
    | {
        "ssm.skip": "mixer.inner_norm.hook_gate",
        "ssm.ssm_output": "mixer.inner_norm.hook_in",
        "ssm.inner_norm": "mixer.inner_norm.hook_out mixer.hook_inner_norm mixer.out_proj.hook_in",
    },
}


#: Those of a hybrid's blocks, which has more parts: TransformerLens names its own parts of a transformer's block so.
OF_HYBRID_BLOCK = {
    "layer_input": "ln1.hook_in",
    "norm": "ln1.hook_out",
    "resid_mid": "ln2.hook_in",
    "norm_2": "mlp.hook_in",
}


def _paths(names: Mapping[str, str]) -> dict[str, str]:
    return {name: path for path, several in names.items() for name in several.split()}


#: Bridge name -> path, for the model's and, by family, for a block's.
BRIDGE_MODEL = _paths(OF_MODEL)
BRIDGE_HYBRID = _paths(OF_HYBRID_BLOCK)
BRIDGE_BLOCK: dict[Family, dict[str, str]] = {family: _paths(names) for family, names in OF_BLOCK.items()}


def tried(family: Family | None) -> tuple[Family, ...]:
    """The families whose names count, in the order in which they are tried: one, or where none is known all."""
    return FAMILIES if family is None else (family,)


def paths_in_block(name: str, family: Family | None) -> Iterator[str]:
    """The paths under ``layers[l].`` that a name under ``blocks.l.`` means, one for each family that has it.

    >>> list(paths_in_block("mixer.out_proj.hook_in", None))
    ['ssm.after_skip', 'ssm.inner_norm']
    """
    if name.startswith("mamba."):  # what Falcon-H1's bridge calls the mixer
        name = f"mixer.{name.removeprefix('mamba.')}"
    yield from (BRIDGE_BLOCK[each][name] for each in tried(family) if name in BRIDGE_BLOCK[each])
    if name in BRIDGE_HYBRID:
        yield BRIDGE_HYBRID[name]


def families_of_name(name: str) -> tuple[Family, ...]:
    """The families in which a name under ``blocks.l.`` means a place.

    >>> families_of_name("mixer.x_proj.hook_in")
    ('selective',)
    """
    return tuple(family for family in FAMILIES if name in BRIDGE_BLOCK[family])


def name_of(path: str, in_layer: bool, family: Family | None) -> str | None:
    """The preferred name of a path, which is relative to its layer where it is ``in_layer``; if there is one.

    >>> name_of("ssm.inner_norm", True, "dual")
    'mixer.inner_norm.hook_out'
    """
    tables = [OF_BLOCK[each] for each in tried(family)] if in_layer else [OF_MODEL]
    return next((table[path].split()[0] for table in tables if path in table), None)
