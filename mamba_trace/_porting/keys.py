"""A cache of the libraries has two keys for one value, and a plain dict has one."""

from __future__ import annotations

import ast

from ..errors import UnknownSiteError
from .findings import Findings
from .names import name_of, short_name, written
from .scope import Scopes


class FullKeys(ast.NodeTransformer):
    """Writes ``cache["resid_pre", layer]`` as ``cache[f"blocks.{layer}.hook_resid_pre"]``."""

    def __init__(self, scopes: Scopes, caches: dict[str, str], findings: Findings) -> None:
        self.scopes, self.caches, self.findings = scopes, caches, findings

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        variable, key = node.value, node.slice
        if not isinstance(variable, ast.Name) or variable.id not in self.caches:
            return self.generic_visit(node)
        if not isinstance(key, ast.Tuple) or len(key.elts) < 2:
            return self.generic_visit(node)
        layer = key.elts[1]
        known = self.scopes.number(layer)
        if known is not None and known < 0:  # TransformerLens counts layers from the end there
            layer = ast.parse(f"len({self.caches[variable.id]}.layers) - {-known}", mode="eval").body
        try:
            parts = short_name(key.elts[0], layer, self.scopes)
            if parts is not None:
                self.findings.name(node, f"model.{name_of(parts).path}.output")
                node.slice = ast.parse(written(parts), mode="eval").body
                for new in ast.walk(node.slice):
                    ast.copy_location(new, key)
        except UnknownSiteError as error:
            self.findings.problem(node, str(error))
        return node


def cache_variables(tree: ast.AST) -> dict[str, str]:
    """The variables that a cache is assigned to, and the model that it is of."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        for call in ast.walk(node.value):
            if isinstance(call, ast.Attribute) and call.attr == "run_with_cache":
                targets = [one for one in ast.walk(node.targets[0]) if isinstance(one, ast.Name)]
                found |= {one.id: ast.unparse(call.value) for one in targets}
    return found
