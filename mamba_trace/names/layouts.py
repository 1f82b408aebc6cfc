"""Which of the places that a name may mean are there in a given model, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnknownSiteError
from ..sites import ATTENTION_TERM, BY_NAME, PUBLIC_PART, Kind, Layout, Site
from .hints import OF_A_MAMBA

#: Sites that some models have no value of their own for, and the site whose value it is there.
SAME_AS = {"ssm_out": "out_proj", "logits": "lm_head"}


def site_in(layout: Layout, site: Site, layer: int | None) -> Site | None:
    """The site that a layer has under the name of ``site``, or the model; ``None`` if it has none.

    In a layer that adds the mixer's output to the stream as it is, `ssm_out` is `out_proj`.
    """
    if layout.has(site, layer):
        return layout.own(site)
    same = BY_NAME.get(SAME_AS.get(site.name, ""))
    return same if same is not None and layout.has(same, layer) else None


def check_meaning(layout: Layout, layer: int | None, name: str) -> None:
    """Refuse a hook name that means another value in TransformerLens than here, in a model with factors of its own.

    Raises:
        UnknownSiteError: saying what the values are called here.
    """
    if layer is None:
        return
    kind, here = layout.layers[layer], f"layers[{layer}]"
    why = ""
    if kind.parallel and name.endswith(".hook_attn_out"):
        why = (
            f"what attention returns, before the model's factor: that is {here}.attn.output. What is added to the "
            f"residual stream is {here}.attn_out, 'blocks.{layer}.{ATTENTION_TERM}'"
        )
    elif kind.parallel and name.endswith(".in_proj.hook_in"):
        why = f"{here}.norm times a factor of the model: that is {here}.ssm.in_proj.input"
    elif name.endswith(".out_proj.hook_in") and (kind.norm_first or "inner_norm" in kind.lacks):
        why = f"the input of out_proj, which no norm stands before: that is {here}.ssm.after_skip"
    if why:
        raise UnknownSiteError(f"{name!r} is in TransformerLens, in this model, {why}")


def part_of(site: Site | None) -> str:
    """The part of a layer, in a user's words, that it must have for a site to be there.

    >>> part_of(BY_NAME["h"]), part_of(BY_NAME["resid_mid"])
    ('ssm', 'resid_mid')
    """
    return "ssm" if site is None else PUBLIC_PART.get(site.scope, site.name)


def absent(layout: Layout, site: Site | None, layer: int | None, asked: str) -> UnknownSiteError:
    """The error for a site that a layer, or the model, lacks.

    Args:
        layout: of the model.
        site: what was asked for, or ``None`` for an inner module of a mixer.
        layer: where, or ``None`` for a site of the model.
        asked: what the user wrote.
    """
    if not layout.hybrid:
        return UnknownSiteError(f"{asked}{OF_A_MAMBA}")
    if layer is None:
        return UnknownSiteError(f"{asked}: this model has none; print(model) lists the sites that it has")
    kind, part = layout.layers[layer], part_of(site)
    kinds = enumerate(layout.layers)
    there = [n for n, other in kinds if _has_part(other, site) or (site and site_in(layout, site, n))]
    if layer in there:
        part, there = str(site and site.name), [n for n in there if site and layout.layers[n].has(site)]
    has = f"these have one: {spans(there)}" if there else "no layer of this model has one"
    lists = {"ssm": ". model.ssm_layers lists them", "attn": ". model.attention_layers lists them"}
    return UnknownSiteError(
        f"{asked}: layers[{layer}] is {kind.name} and has no {part}; {has}{lists.get(part, '') if there else ''}"
    )


def _has_part(kind: Kind, site: Site | None) -> bool:
    scope = "mixer" if site is None else site.scope
    if scope == "mixer":
        return kind.family is not None
    return site is not None and kind.has(site)


def spans(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, in words.

    >>> spans([0, 1, 2, 5, 7, 8])
    '0 to 2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts: list[Any] = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
    return ", ".join(map(str, parts))
