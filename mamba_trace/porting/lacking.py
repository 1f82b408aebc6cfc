"""The parts of a model, its configuration and its caches that a script uses and that are not here.

A tiny `MambaTrace`, which has what `HookedMamba` has, is asked, so that no list of what there is has to be kept,
and it says itself why it has no part of a name. Making one takes torch, which a script that uses only `SURE` does
not wait for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import libcst as cst
import libcst.matchers as m

from .report import PortReport, Problem
from .runs import LOADERS, RUNS, SAME, Script
from .values import called

#: What is there, and what the porter itself rewrites or reports.
SURE = {
    *(*RUNS, *SAME, *LOADERS, "to", "eval", "tokenizer", "W_E", "W_U", "default_prepend_bos", "reset_hooks"),
    *("cfg", "cfg.n_layers", "cfg.d_model", "cfg.d_vocab", "cfg.device", "cfg.dtype"),
    *("items", "keys", "values", "stack_activation", "decompose_resid", "accumulated_resid", "logit_attrs"),
}
REWRITTEN = {"hooks", "add_hook", "add_perma_hook", "reset_hooks", *LOADERS}
#: What TransformerLens's mixers are told, so that their states have hooks: the statement is left out.
NOT_SET = "eager_scan"
#: What has another name here.
INSTEAD = {
    "unembed": "model.W_U is the matrix [D,V], and model.lm_head the module",
    "embed": "model.W_E is the matrix [V,D], and model.embeddings the module",
    "ln_final": "it is model.norm",
    "enable_compatibility_mode": "nothing is folded or centred here, so the call can go",
}


@functools.cache
def tiny() -> dict[str, Any]:
    """A model and a cache, which are asked whether they have a part of a name."""
    from ..hooked.cache import ActivationCache
    from ..model import MambaTrace

    model: Any = MambaTrace.from_config({"d_model": 2, "n_layers": 1, "vocab_size": 2})
    return {"model": model, "cache": ActivationCache({}, model), "blocks": type(model.blocks)}


class Uses:
    """The attributes of a script that are those of a model, of what a model has, or of a cache."""

    def __init__(self, script: Script) -> None:
        self.script, self.caches = script, set(script.caches)
        self.lacking: dict[Any, str] = {}  # by attribute, with the reason

    def looked_up(self, node: Any) -> Any:
        """What an expression of the script is in the tiny model; ``None`` for all else, or where it has none."""
        code = self.script.code(node)
        if code in self.script.models:
            return tiny()["model"]
        if code in self.caches:
            return None if self._is_dict(node) else tiny()["cache"]
        if isinstance(node, cst.Name):
            return self._of_variable(node)
        if isinstance(node, cst.Subscript):
            blocks = self.looked_up(node.value)
            index = node.slice[0].slice if len(node.slice) == 1 else None
            return self._block(blocks, isinstance(index, cst.Slice))
        return self._attribute(node) if isinstance(node, cst.Attribute) else None

    def _block(self, blocks: Any, several: bool = False) -> Any:
        is_blocks = blocks is not None and isinstance(blocks, tiny()["blocks"])
        return (blocks if several else blocks[0]) if is_blocks else None

    def _is_dict(self, node: Any) -> bool:
        """Whether a variable with the name of a cache is a dict at a node."""
        bound = self.script.bound(node.value, node) if isinstance(node, cst.Name) else []
        values = [getattr(self.script.parents.get(self.script.parents[one.node]), "value", None) for one in bound]
        return any(isinstance(one, cst.Dict) or called(one) == "dict" for one in values)

    def _of_variable(self, node: Any) -> Any:
        """The block that a loop over blocks, or an assignment, puts into a variable."""
        bound: Any = self.script.binding(node.value, node)
        above = list(self.script.around(bound)) if isinstance(bound, cst.CSTNode) else []
        loops = (one for one in above if isinstance(one, cst.For | cst.CompFor))
        loop = next((one for one in loops if one is bound or one.target in above), None)
        if loop is not None:
            counted = called(loop.iter) == "enumerate"
            target = loop.target.elements[-1].value if isinstance(loop.target, cst.Tuple) else loop.target
            whole = loop.iter.args[0].value if counted else loop.iter  # type: ignore[attr-defined]
            is_it = isinstance(target, cst.Name) and target.value == node.value
            return self._block(self.looked_up(whole)) if is_it else None
        value = self.script.value(node)
        return self.looked_up(value) if isinstance(value, (cst.Attribute, cst.Subscript)) else None

    def _attribute(self, node: cst.Attribute) -> Any:
        owner = self.looked_up(node.value)
        if owner is None:
            return None
        try:
            part = getattr(owner, node.attr.value)
        except AttributeError as error:
            said = f"a cache has no {node.attr.value!r} here" if owner is tiny()["cache"] else str(error)
            self.lacking[node] = INSTEAD.get(node.attr.value) or said.partition(". It has:")[0]
            return None
        except Exception:  # it is there, and an empty model has no value for it
            return None
        return part if type(part).__module__.startswith("mamba_trace.hooked") else None

    def of_interest(self) -> Iterator[Any]:
        """The attributes that may be of a model, a block or a cache, and that are not known to be there."""
        script, roots = self.script, self.script.models | self.caches
        targets: list[Any] = m.findall(script.module, m.AssignTarget(m.Attribute()))  # type: ignore[assignment]
        made = {script.code(one.target) for one in targets if script.code(one.target.value) in roots}
        for node in m.findall(script.module, m.Attribute()):
            code, owner = script.code(node), node.value  # type: ignore[attr-defined]
            below = next((code.removeprefix(f"{one}.") for one in roots if code.startswith(f"{one}.")), None)
            of_variable = isinstance(owner, cst.Name) and ".blocks" in script.module.code
            if (below not in SURE if below else of_variable) and code not in made and not self._rewritten(node):
                yield node

    def _rewritten(self, node: Any) -> bool:
        """Whether an attribute is a part of what the porter rewrites as a whole."""
        for one in self.script.around(node):
            if isinstance(one, cst.Attribute) and one.attr.value in (*REWRITTEN, NOT_SET):
                return True
            if not isinstance(one, cst.Attribute | cst.Subscript):
                return False
        return False


def list_lacking(script: Script, report: PortReport) -> None:
    """List each part of a model that a script uses and that is not here."""
    uses = Uses(script)
    for node in uses.of_interest():
        uses.looked_up(node)
    for node, reason in uses.lacking.items():
        report.add(report.problems, Problem(script.start(node)[0], script.code(node), reason))
