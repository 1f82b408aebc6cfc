"""The values that TransformerLens 4 has with other axes than this package, in a script that has them its way.

Its Mamba-1 has ``mixer.hook_ssm_state`` and ``mixer.hook_ssm_write`` as [B,E,L,N]; here they are [B,L,E,N]. The
index of a position would be that of a channel, which no error tells. So a ported script gets functions of its
own, which turn a value before its hook sees it, what the hook leaves back again, and the values of a cache.
They go by the name that a run gives to a value, so they are right for names that only the run knows, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import libcst as cst
import libcst.matchers as m

from ..sites import BY_NAME
from .runs import CLASSES, NOWHERE, RUNS, ModelRun, Script
from .values import OTHER_AXES, WrittenName

#: The sites whose values have other axes, by the end of their hook names.
TURNED = tuple(BY_NAME[name].hook.rpartition(".")[2] for name in OTHER_AXES)
#: The functions by what they turn. A Mamba-2's values, which have an axis more, are the same in both.
HELPERS = {
    "hook": '''
def {name}(function):
    """A hook that sees a Mamba-1's states and writes as TransformerLens has them: [B,E,L,N], here [B,L,E,N]."""

    def hook_function(value, hook):
        if not hook.name.endswith({ends}) or value.ndim != 4:
            return function(value, hook=hook)
        seen = value.transpose(1, 2).contiguous()
        left = function(seen, hook=hook)
        left = left[0] if isinstance(left, tuple) else left
        return (seen if left is None else left).transpose(1, 2)

    return hook_function
''',
    "cache": '''
def {name}(returned):
    """What run_with_cache returned, with a Mamba-1's states and writes as TransformerLens has them: [B,E,L,N]."""
    cache = returned[1]
    for name, value in cache.cache_dict.items():
        of_them = name.removesuffix("_grad").endswith({ends})
        if of_them and value.ndim == 3 + cache.has_batch_dim:
            cache.cache_dict[name] = value.transpose(-3, -2).contiguous()
    return returned
''',
}
OTHERWISE = "[B,E,L,N] in TransformerLens's Mamba-1 is [B,L,E,N] here: permute its axes where it is used"
#: What they are called, unless the script has such a name.
NAMES = {"hook": "with_their_axes", "cache": "cache_with_their_axes"}


def definition(kind: str, name: str) -> Any:
    """The statement that defines one of `HELPERS` under a name."""
    code = HELPERS[kind].strip().format(name=name, ends=json.dumps(TURNED).replace("[", "(").replace("]", ")"))
    blank = [cst.EmptyLine(indent=False)] * 2
    return cst.parse_statement(code).with_changes(leading_lines=blank)  # type: ignore[call-arg]


class Axes:
    """Which runs of a script may come to a value that has other axes there."""

    def __init__(self, script: Script) -> None:
        self.script = script
        code = script.module.code
        #: Whether the script writes such a name, or a part of one.
        self.written = any(name.removeprefix("hook_") in code for name in TURNED)
        loads = [one for one in script.calls if script.loads(one)]
        #: Whether a name that only the run knows may be one: MambaLens has none of them.
        self.possible = self.written or any(script.receiver(one).endswith(CLASSES[1:]) for one in loads)

    def among(self, names: list[WrittenName | None]) -> bool:
        """Whether one of several names is, or may be, that of such a value; ``None`` where it is not known."""
        known = [name for name in names if name is not None and name.place is not None]
        return any(name.turned for name in known) or (self.possible and len(known) < len(names))

    def in_cache(self, run: ModelRun) -> bool:
        """Whether the script may look at such a value in the cache of a run."""
        if "names_filter" in run.given:
            return self.among(self._filtered(run.given["names_filter"]))
        variable = next((name for name, other in self.script.caches.items() if other.node is run.node), None)
        if self.written or variable is None:
            return self.possible
        return self.among([self._read(one) for one in m.findall(self.script.module, m.Name(variable))])

    def unseen(self, helpers: Mapping[str, str]) -> Iterator[tuple[Any, str]]:
        """What may come to such a value in a run that is not seen, and the reason, which cannot be ported."""
        script = self.script
        for node in m.findall(script.module, m.Attribute(attr=m.OneOf(*map(m.Name, (*RUNS[:2], "hooks"))))):
            call = script.parents[node]
            if self.written and not (isinstance(call, cst.Call) and call.func is node):
                yield node, f"what it is called with is not seen, and {OTHERWISE}"
        strings: list[Any] = m.findall(script.module, m.SimpleString() | m.FormattedString())  # type: ignore
        for node in strings if self.written and not helpers else ():
            name = script.name_of(node)
            if name is not None and name.turned:
                yield node, f"no run of a model is seen that it belongs to, and {OTHERWISE}"

    def _filtered(self, node: Any) -> list[WrittenName | None]:
        """The names of a names_filter, as far as they are known."""
        whole = self.script.expression(node)
        if isinstance(whole, (cst.List, cst.Tuple)):
            return [name for one in whole.elements for name in self._filtered(one.value)]
        if isinstance(whole, (cst.ListComp, cst.GeneratorExp)):
            return self._filtered(whole.elt)
        return [self.script.name_of(whole)]

    def _read(self, use: Any) -> WrittenName | None:
        """The name under which one use of a cache reads it; ``None`` where that is not seen."""
        above = self.script.parents[use]
        key = [getattr(one.slice, "value", None) for one in above.slice] if isinstance(above, cst.Subscript) else []
        if len(key) == 2 and isinstance(key[0], cst.BaseString):
            return self.script.name_of(*key)
        if isinstance(above, (cst.Element, cst.AssignTarget)):
            assigned = any(isinstance(one, cst.AssignTarget) for one in self.script.around(use))
            return NOWHERE if assigned else None
        return self.script.name_of(key[0]) if len(key) == 1 else None
