"""What scripts import from MambaLens and TransformerLens, as imports of this package."""

from __future__ import annotations

import re
from typing import Any

import libcst as cst

from .report import PortReport, Problem
from .runs import CLASSES, Script
from .values import called, text_of, written

OURS, THEIRS = "mamba_lens", "transformer_lens"
#: What `mamba_trace.mamba_lens` has of MambaLens.
SHARED = re.compile(r"HookedMamba|MambaCfg|MambaInitCfg|convert_(hooked|original)_\w+")
#: Where the names are that scripts import from transformer_lens.
MOVED = {
    **dict.fromkeys(CLASSES, "from mamba_trace.mamba_lens import HookedMamba"),
    "HookPoint": "from mamba_trace.hooked.hooks import Hook as HookPoint",
    "ActivationCache": "from mamba_trace.hooked.cache import ActivationCache",
}


def replacement(node: Any, script: Script, updated: Any = None) -> str:
    """What stands here for a class of transformer_lens or a call of its helpers; empty for anything else."""
    name = called(node) or script.qualified(node).rpartition(".")[2]
    library = script.qualified(getattr(node, "func", node)).startswith(THEIRS)
    if called(node) == "get_act_name":
        slots: dict[int, Any] = {}
        text = text_of(node, script, slots)
        return "" if text is None else written(text, {slot: script.code(one) for slot, one in slots.items()})
    if library and called(node) == "to_numpy" and len(node.args) == 1:
        return f"({script.code((updated or node).args[0].value)}).detach().cpu().numpy()"
    if not library or name not in CLASSES or isinstance(node, cst.Call):
        return ""
    return "HookedMamba" * (node.value == name) if isinstance(node, cst.Name) else "mamba_lens.HookedMamba"


def imported(node: Any, script: Script, report: PortReport) -> list[Any] | None:
    """The imports in the place of one; ``None`` where it stays as it is, and for any other statement."""
    module = script.code(node.module) if isinstance(node, cst.ImportFrom) and node.module else ""
    if module.partition(".")[0] == OURS:
        given = [] if isinstance(node.names, cst.ImportStar) else [script.code(one.name) for one in node.names]
        for name in [one for one in given if not SHARED.fullmatch(one)]:
            report.add(report.problems, Problem(script.start(node)[0], name, "mamba_trace.mamba_lens has no such name"))
        return [node.with_changes(module=cst.parse_expression("mamba_trace.mamba_lens"))]
    plain = isinstance(node, cst.Import | cst.ImportFrom) and not isinstance(node.names, cst.ImportStar)
    if not plain or re.search(rf"\b({OURS}|{THEIRS})\b", script.code(node)) is None:
        return None
    lines: list[str] = []
    for one in node.names:
        name, alias = script.code(one.name), script.code(one.asname.name) if one.asname else ""
        root = (module or name).partition(".")[0]
        bound = script.bound(alias or (name if module else root), node)
        uses = [use.node for one in bound for use in one.references if root == THEIRS]
        new = {use: [replacement(above, script) for above in script.around(use)] for use in uses}
        left = [use for use in uses if not any(new[use])]
        renamed = f" as {alias}" if alias else ""
        if root == OURS or any("mamba_lens.HookedMamba" in some for some in new.values()):
            lines.append(f"from mamba_trace import mamba_lens{renamed * (root == OURS)}")
        if module and name in MOVED:
            lines.append(MOVED[name].partition(" as ")[0] + renamed if alias else MOVED[name])
        elif root not in (OURS, THEIRS) or left:
            lines.append(f"from {module} import {name}{renamed}" if module else f"import {name}{renamed}")
            for use in left:
                reason = "it has no counterpart here, so it stays, and its import"
                report.add(report.problems, Problem(script.start(use)[0], script.code(use), reason))
    return [one.body[0] for one in cst.parse_module("\n".join(dict.fromkeys(lines))).body]  # type: ignore
