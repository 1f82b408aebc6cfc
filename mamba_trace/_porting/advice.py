"""What the author of a script should know besides the trace."""

from __future__ import annotations

import ast

from ..sites import STATE
from .findings import Findings
from .runs import BY_HAND, DROPPED, KNOWN, Run
from .scope import Scopes
from .traces import Edit

#: What a plain dict has as ActivationCache does.
OF_A_DICT = ("items", "keys", "values", "cache_dict", "get")


def report_arguments(run: Run, findings: Findings) -> None:
    """What becomes of each argument of a run."""
    for keyword in run.node.keywords:
        name = keyword.arg or "**"
        if name in DROPPED:
            findings.dropped(keyword.value, f"{name}={ast.unparse(keyword.value)}", DROPPED[name])
        elif name not in KNOWN:
            reason = BY_HAND.get(name, "an argument with no counterpart here")
            findings.problem(keyword.value, reason, f"{name}={ast.unparse(keyword.value)}")
    if not run.input and not any(keyword.arg is None for keyword in run.node.keywords):
        findings.problem(run.node, "no input is given to the model")


def report_use(use: ast.AST, cache: str, findings: Findings) -> None:
    """A use of a cache that does not say which name is read."""
    if isinstance(use, ast.Attribute) and use.attr not in OF_A_DICT:
        findings.problem(
            use,
            "a method of ActivationCache, and the trace keeps a plain dict: model.run_with_cache takes "
            "the same arguments here and returns a cache with such methods",
        )
        return
    findings.note(
        use,
        f"which names are read from {cache} is not known before the run, so the trace saves every site "
        f"under its whole name, in a plain dict; tracer.cache(modules=[...]) records those that you name",
    )


def report_whole_states(edits: list[Edit], findings: Findings) -> None:
    """Edits of a whole trajectory, which no hook of MambaLens is."""
    for edit in edits:
        place = edit.name.place if edit.name is not None else None
        if place is None or place.site is None or (place.site.name, place.position) != (STATE, None):
            continue
        findings.note(
            edit.at,
            "an edit of the whole h changes y at each position alone; MambaLens hooks h[p] one by one, and "
            "an edit of h[p] is carried on",
        )


def report_changed(held: list[Edit], run: Run, scopes: Scopes, findings: Findings) -> None:
    """Hooks whose arguments may have other values by the time the model runs."""
    for edit in held:
        slots = edit.name.slots.values() if edit.name is not None else ()
        values = [one for value in (*edit.fn.bound.values(), *slots) for one in ast.walk(value)]
        own = {target for target, _ in edit.loops}
        for name in sorted({one.id for one in values if isinstance(one, ast.Name)} - own):
            if scopes.binding(name, edit.at) != scopes.binding(name, run.node):
                findings.problem(
                    edit.at,
                    f"the trace at line {run.node.lineno} reads {name} anew; it may have changed",
                )


def suggest_grid(
    run: Run, edits: list[Edit], caches: dict[str, str], scopes: Scopes, findings: Findings
) -> None:
    """Where two loops patch a site at every layer and position, say which call does all of it."""
    above = [one for one in scopes.ancestors(run.node) if isinstance(one, ast.For)]
    variables = {ast.unparse(one.target) for one in above}
    place = edits[0].name.place if len(edits) == 1 and edits[0].name is not None else None
    if len(above) < 2 or place is None or place.site is None or "L" not in place.site.axes:
        return
    name, function = edits[0].name, edits[0].fn.function
    assert name is not None
    given = {ast.unparse(one) for one in edits[0].fn.bound.values()}
    at_position = name.position in variables if name.position else bool(given & variables - {name.layer})
    body = [] if function is None else list(ast.walk(function))
    patched = [
        one.value.id for one in body if isinstance(one, ast.Subscript) and isinstance(one.value, ast.Name)
    ]
    sources = [caches[one] for one in patched if one in caches]
    if name.layer in variables and at_position and sources:
        findings.note(
            run.node,
            f"the whole double loop is one call: patch_grid({run.model}, {run.input}, {sources[0]}, "
            f"site={place.site.name!r}, metric=...), from mamba_trace.patching; metric takes the logits at "
            f"the last position [B,V] to [B], e.g. logit_diff({run.model}, ' answer', ' wrong')",
        )
