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
SHARED = (
    "HookedMamba",
    "MambaCfg",
    "MambaInitCfg",
    "convert_hooked_mamba_config_to_original_config",
    "convert_hooked_state_dict_to_original_state_dict",
    "convert_original_config_to_hooked_mamba_config",
    "convert_original_state_dict_to_hooked_state_dict",
)
#: Why another name of MambaLens cannot be ported.
ABSENT = "mamba_trace.mamba_lens has no such name, so it stays, and its import"
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


def attributes(node: Any, script: Script) -> int:
    """How many attributes of attributes a name is the beginning of: 2 for ``a`` in ``a.b.c(d)``."""
    around = list(script.around(node))[1:]
    return next((n for n, one in enumerate(around) if not isinstance(one, cst.Attribute)), len(around))


def uses_of(one: Any, node: Any, script: Script) -> list[Any]:
    """Where a script uses a name that an import gives it."""
    bound = script.bound(script.code((one.asname or one).name), node)
    return [use.node for each in bound if node in script.around(each.node) for use in each.references]


def unused_names(node: Any, script: Script) -> list[str]:
    """The names of MambaLens that an import gives to a script, which are not here and which nothing uses."""
    ours = isinstance(node, cst.ImportFrom) and node.module and script.code(node.module).partition(".")[0] == OURS
    every = [] if not ours or isinstance(node.names, cst.ImportStar) else node.names
    names = [script.code(one.name) for one in every if not uses_of(one, node, script)]
    return [name for name in names if name not in SHARED]


def of_mamba_lens(node: Any, script: Script, report: PortReport) -> list[Any]:
    """The imports in the place of one from MambaLens, of which names that are not here stay as far as they are used."""
    here = {"module": cst.parse_expression("mamba_trace.mamba_lens")}
    if isinstance(node.names, cst.ImportStar) or {script.code(one.name) for one in node.names} <= {*SHARED}:
        return [node.with_changes(**here)]
    shared = [one for one in node.names if script.code(one.name) in SHARED]
    left = [one for one in node.names if one not in shared and uses_of(one, node, script)]
    for one in left:
        for use in uses_of(one, node, script):
            report.add(report.problems, Problem(script.start(use)[0], script.code(use), ABSENT))
    plain = {"comma": cst.MaybeSentinel.DEFAULT}
    made = [[one.with_changes(**plain) for one in some] for some in (shared, left) if some]
    lines = [node.with_changes(names=some, lpar=None, rpar=None) for some in made]
    return [lines[0].with_changes(**here), *lines[1:]] if shared else lines


def imported(node: Any, script: Script, report: PortReport) -> list[Any] | None:
    """The imports in the place of one; ``None`` where it stays as it is, and for any other statement."""
    module = script.code(node.module) if isinstance(node, cst.ImportFrom) and node.module else ""
    if module.partition(".")[0] == OURS:
        return of_mamba_lens(node, script, report)
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
        for use in [use.node for one in bound for use in one.references if root == OURS and not module]:
            parts = script.code(list(script.around(use))[attributes(use, script)]).split(".")
            if len(parts) > 1 and parts[1] not in SHARED:
                report.add(report.problems, Problem(script.start(use)[0], ".".join(parts), ABSENT))
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
