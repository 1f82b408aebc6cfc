"""The values that TransformerLens 4 has with other axes than this package, in a script that has them its way.

Its Mamba-1 has ``mixer.hook_ssm_state`` and ``mixer.hook_ssm_write`` as [B,E,L,N]; here they are [B,L,E,N]. The
index of a position would be that of a channel, which no error tells. So a ported script gets functions of its
own, which turn a value before its hook sees it, what the hook leaves back again, and the values of a cache.
They go by the name that a run gives to a value, so they are right for names that only the run knows, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import libcst as cst
import libcst.matchers as m

from ..sites import BY_NAME
from .runs import CLASSES, NOWHERE, RUNS, ModelRun, Script
from .values import OTHER_AXES, WrittenName, text_of

#: The sites whose values have other axes, by the end of their hook names.
TURNED = tuple(BY_NAME[name].hook.rpartition(".")[2] for name in OTHER_AXES)
#: The functions by what they are for. A Mamba-2's values, which have an axis more, are the same in both.
HELPERS = {
    "hook": '''
def {hook}(function):
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
    "hooks": '''
def {hooks}(model, hooks, stop_at_layer=None):
    """Hooks that see states and writes as TransformerLens has them; what chooses by the name is asked for theirs."""
    layers = range(len(model.layers))[:stop_at_layer]
    theirs = [f"blocks.{{layer}}.mixer.{{name}}" for layer in layers for name in {ends}]
    pairs = []
    for wanted, function in hooks:
        more = [name for name in theirs if callable(wanted) and wanted(name)]
        if not more or any(map(wanted, model.hook_names(1))):
            pairs.append((wanted, function))
        pairs += [(name, function) for name in more]
    return [(name, {hook}(function)) for name, function in pairs]
''',
    "cache": '''
def {cache}(model, *args, names_filter=None, stop_at_layer=None, **kwargs):
    """model.run_with_cache that keeps what TransformerLens's keeps, states and writes as it has them: [B,E,L,N]."""
    layers = range(len(model.layers))[:stop_at_layer]
    theirs = [f"blocks.{{layer}}.{{name}}" for layer in layers for name in {kinds}]
    one = names_filter is None or isinstance(names_filter, str) or callable(names_filter)
    kept = [names_filter or (lambda name: True)] if one else list(names_filter)
    kept += [name for name in theirs for wanted in kept if callable(wanted) and wanted(name)]
    output, cache = model.run_with_cache(*args, names_filter=kept, stop_at_layer=stop_at_layer, **kwargs)
    for name, value in cache.cache_dict.items():
        of_them = name.removesuffix("_grad").endswith({ends})
        if of_them and value.ndim == 3 + cache.has_batch_dim:
            cache.cache_dict[name] = value.transpose(-3, -2).contiguous()
    return output, cache
''',
}
OTHERWISE = "[B,E,L,N] in TransformerLens's Mamba-1 is [B,L,E,N] here: permute its axes where it is used"
#: What they are called, unless the script has such a name.
NAMES = {"hook": "with_their_axes", "hooks": "hooks_with_their_axes", "cache": "run_with_their_cache"}


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
        #: What a cache of TransformerLens has, and one of this package if it is named, by what follows the layer.
        self.kinds = {
            f"mixer.{name}": None for name in TURNED if name.removeprefix("hook_") in code or not self.written
        }
        for node in self._strings():
            name = script.name_of(node)
            if name is not None and name.unlisted:
                self.kinds[re.sub(r"^blocks\.\d+\.", "", text_of(node, script, {}) or "")] = None

    def _strings(self) -> list[Any]:
        kinds = (m.SimpleString(), m.FormattedString(), m.BinaryOperation(), m.Call(), m.ConcatenatedString())
        return m.findall(self.script.module, m.OneOf(*kinds))  # type: ignore[return-value]

    def definitions(self, names: Mapping[str, str]) -> list[Any]:
        """The statements that define `HELPERS` under names, by what they are for."""
        lists = {"ends": TURNED, "kinds": tuple(self.kinds)}
        quoted = {name: "(" + ", ".join(f'"{one}"' for one in some) + ",)" for name, some in lists.items()}
        blank = [cst.EmptyLine(indent=False)] * 2
        made: list[Any] = [cst.parse_statement(HELPERS[kind].strip().format(**names, **quoted)) for kind in names]
        return [one.with_changes(leading_lines=blank) for one in made]

    def among(self, names: list[WrittenName | None]) -> bool:
        """Whether one of several names is, or may be, that of such a value; ``None`` where it is not known."""
        known = [name for name in names if name is not None and name.place is not None]
        return any(name.turned for name in known) or (self.possible and len(known) < len(names))

    def in_cache(self, run: ModelRun) -> bool:
        """Whether the script may look at such a value in the cache of a run."""
        names = self._filtered(run.given["names_filter"]) if "names_filter" in run.given else []
        if names and None not in names:
            return self.among(names)
        variable = next((name for name, other in self.script.caches.items() if other.node is run.node), None)
        if self.written or variable is None:
            return self.possible
        read = [self._read(one) for one in m.findall(self.script.module, m.Name(variable))]
        return self.among(read) or any(name is not None and name.unlisted for name in read)

    def unseen(self, helpers: Mapping[str, str]) -> Iterator[tuple[Any, str]]:
        """What may come to such a value in a run that is not seen, and the reason, which cannot be ported."""
        script = self.script
        for node in m.findall(script.module, m.Attribute(attr=m.OneOf(*map(m.Name, (*RUNS[:2], "hooks"))))):
            call = script.parents[node]
            if self.written and not (isinstance(call, cst.Call) and call.func is node):
                yield node, f"what it is called with is not seen, and {OTHERWISE}"
        for node in self._strings() if self.written and not helpers else ():
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
