"""Every table of the README and of the documentation that is written from the code or from a recorded run.

    python tests/tables.py

writes them where they stand, between ``<!-- name -->`` and ``<!-- /name -->``; `test_documentation` says which are out
of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from comparison import comparison_table, evidence_list
from hybrid_models import PLAIN, make_hybrid
from readme_table import (
    analyses_table,
    architecture_speed,
    decode_table,
    first_use_table,
    forward_table,
    grids_table,
    hugging_face_ratios,
    linear_table,
    patching_table,
    recorded,
    scaling_table,
    speed_in_short,
)

from mamba_trace import MambaTrace
from mamba_trace.sites import FAMILIES, rows, site_of

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "tutorials" / "docs").glob("*.md")))
VERSIONS = ROOT / "tests" / "benchmarks" / "versions.json"
#: The three that have nothing but SSMs: their family.
PURE = {"Mamba-1": "selective", "Falcon-Mamba": "selective", "Mamba-2": "dual"}
#: What a layer is, and what is not served, by architecture.
LAYERS = {
    "Mamba-1": "an SSM",
    "Falcon-Mamba": "an SSM with norms on delta_1, B and C",
    "Mamba-2": "an SSM with heads",
    "Nemotron-H": "an SSM, attention, an MLP or experts",
    "Falcon-H1": "an SSM and attention side by side, then an MLP",
    "Granite 4": "an SSM or attention, then an MLP or experts",
    "Jamba": "an SSM or attention, then an MLP or experts",
    "Bamba": "an SSM or attention, then an MLP",
    "Zamba": "an SSM, to whose input a shared transformer adds in some",
    "Zamba2": "an SSM, to whose input a shared transformer adds in some",
}
LACKS = {
    "Mamba-1": "",
    "Falcon-Mamba": "speed was not measured",
    "Mamba-2": "what transformers has no class for: attention layers, `D_has_hdim`, `norm_before_gate`",
    "Nemotron-H": "cut before its first attention it generates with `use_cache=False` alone: "
    "transformers' cache counts no tokens then",
    "Falcon-H1": "",
    "Granite 4": "SSM sites in its models that have no SSM",
    "Jamba": "",
    "Bamba": "",
    "Zamba": "cells of `embeddings` are whole forwards; no `start_at_layer`",
    "Zamba2": "cells of `embeddings` are whole forwards; no `start_at_layer`",
}


def site_table() -> str:
    """The sites of the three that have nothing but SSMs, in execution order."""
    lines = ["| path under `model` | shape | in Mamba-2 | MambaLens name | meaning |", "|---|---|---|---|---|"]
    for row in rows():
        hook = f"`{row.hook}`" if row.hook else f"(`{site_of(row).hook_name('l')}`)"
        shapes = [row.shape(family) or "(none)" for family in FAMILIES]
        dual = "" if shapes[0] == shapes[1] else shapes[1]
        lines.append(f"| `{row.path}` | {shapes[0]} | {dual} | {hook} | {row.meaning} |")
    return "\n".join(lines)


def hybrid_table() -> str:
    """The sites that only hybrids have."""
    lines = ["| path under `model` | shape | hook name | meaning |", "|---|---|---|---|"]
    lines += [f"| `{row.path}` | {row.shape('dual')} | `{row.hook}` | {row.meaning} |" for row in rows(hybrid=True)]
    return "\n".join(lines)


@cache
def shapes() -> dict[str, dict[str, str]]:
    """The sites of every architecture with their shapes, as a tiny model of it has them."""
    found = {name: {row.path: row.shape(family) for row in rows(family)} for name, family in PURE.items()}
    for model_type in PLAIN:
        model = MambaTrace(make_hybrid(model_type))
        family = model.architecture.family
        found[model.architecture.name] = {row.path: row.shape(family) for row in rows(family, model._layout)}
    return {name: {path: shape for path, shape in found[name].items() if shape} for name in LAYERS}


def sites_by_architecture() -> str:
    """Which architecture has which site and in which shape, in three parts.

    The first names the sites that all have in one shape. The second is a table of the other sites of a Mamba, with one
    column for all architectures that agree in them. The third says which hybrids have the sites beside the SSM, whose
    shapes are the same in all.
    """
    sites = shapes()
    everywhere, differing = [], []
    for row in rows():
        found = {own.get(row.path) for own in sites.values()}
        (everywhere if len(found) == 1 else differing).append(row.path)
    shared = ", ".join(f"`{path}` {sites['Mamba-1'][path]}" for path in everywhere)
    columns: dict[tuple[str, ...], list[str]] = {}
    for name, own in sites.items():
        columns.setdefault(tuple(own.get(path, "") for path in differing), []).append(name)
    lines = [f"All ten have, in these shapes: {shared}.", ""]
    lines += ["| site | " + " | ".join(map(", ".join, columns.values())) + " |", "|---" * (len(columns) + 1) + "|"]
    for path, *cells in zip(differing, *columns, strict=True):
        lines.append(f"| `{path}` | " + " | ".join(cells) + " |")
    lines += ["", "| site | shape | hybrids that have it |", "|---|---|---|"]
    hybrids = [name for name in sites if name not in PURE]
    for row in rows(hybrid=True):
        there = [name for name in hybrids if row.path in sites[name]]
        (shape,) = {sites[name][row.path] for name in there}
        lines.append(f"| `{row.path}` | {shape} | {'all' if there == hybrids else ', '.join(there)} |")
    return "\n".join(lines)


def architecture_table() -> str:
    """What is served, a row for each architecture."""
    lines = ["| architecture | a layer is | sites | not served |", "|---|---|---|---|"]
    lines += [f"| {name} | {layer} | {len(shapes()[name])} | {LACKS[name]} |" for name, layer in LAYERS.items()]
    return "\n".join(lines)


def short_architecture_table() -> str:
    """The architectures in the README, with their speed."""
    speeds = architecture_speed(recorded)
    lines = ["| architecture | a layer is | forward / Hugging Face's |", "|---|---|---|"]
    for name, layer in LAYERS.items():
        lines.append(f"| {name} | {layer} | " + (f"{speeds[name][0]:.2f} |" if name in speeds else "|"))
    return "\n".join(lines)


def version_table() -> str:
    """What `versions.py` recorded."""
    if not VERSIONS.exists():
        return "No try is recorded yet."
    tries = recorded("versions")
    steps = ("install", "first command", "tests")
    names = list(next(row["versions"] for row in tries.values() if "versions" in row))
    lines = ["| | " + " | ".join((*names, "installs", "first command", "tests")) + " |"]
    lines.append("|---" * (len(names) + len(steps) + 1) + "|")
    for which, row in tries.items():
        versions = [row.get("versions", {}).get(name, "") for name in names]
        lines.append(f"| {which} | " + " | ".join([*versions, *(row.get(step, "") for step in steps)]) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "sites": site_table,
    "hybrid sites": hybrid_table,
    "sites by architecture": sites_by_architecture,
    "architectures": architecture_table,
    "architectures in short": short_architecture_table,
    "architecture speed": lambda: hugging_face_ratios(architecture_speed(recorded)),
    "forward": lambda: forward_table(recorded("forward")),
    "forward mamba2": lambda: forward_table(recorded("forward_mamba2")),
    "first use": lambda: first_use_table(recorded("first_use")),
    "forward intel": lambda: forward_table(recorded("forward_intel")),
    "forward mamba2 intel": lambda: forward_table(recorded("forward_mamba2_intel")),
    "linear": lambda: linear_table(recorded("linear")),
    "linear intel": lambda: linear_table(recorded("linear_intel")),
    "scaling": lambda: scaling_table(recorded("scaling")),
    "decode": lambda: decode_table(recorded("decode")),
    "decode intel": lambda: decode_table(recorded("decode_intel")),
    "analyses": lambda: analyses_table(recorded("analyses")),
    "patching": lambda: patching_table(recorded("patching")),
    "grids": lambda: grids_table(recorded),
    "speed in short": lambda: speed_in_short(recorded),
    "comparison": comparison_table,
    "versions": version_table,
    "evidence": evidence_list,
}


def written(page: str) -> str:
    """A page with every table in it as it should be."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- /{match[1]} -->"

    names = "|".join(map(re.escape, TABLES))
    return re.sub(rf"^<!-- ({names}) -->\n(?:.*?\n)?<!-- /\1 -->$", table, page, flags=re.MULTILINE | re.DOTALL)


def main() -> None:
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after: Any = written(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} was brought up to date")


if __name__ == "__main__":
    main()
