"""The calls that run a model, and their arguments."""

from __future__ import annotations

import ast
from dataclasses import dataclass

RUNS = ("run_with_cache", "run_with_hooks")
ADDS = ("add_hook", "add_perma_hook")
#: Methods that only a model of these libraries has, so that whatever they are called on is one.
MODEL_METHODS = (*RUNS, "to_tokens", "to_str_tokens", "to_single_token", "to_string", "reset_hooks", "hooks")
#: Arguments that a trace has no use for, and why.
DROPPED = {
    "fast_conv": "the convolution kernel runs wherever conv is not asked for",
    "fast_ssm": "the scan kernel runs wherever its inner sites are not asked for",
    "warn_disabled_hooks": "no kernel disables a site",
    "reset_hooks_end": "a trace leaves nothing behind",
    "clear_contexts": "a trace leaves nothing behind",
    "return_cache_object": "values are saved one by one",
}
KNOWN = set(
    "input tokens return_type names_filter stop_at_layer remove_batch_dim device fwd_hooks bwd_hooks "
    "prepend_bos".split()
)
#: The arguments of TransformerLens's ``generate``, in its order.
GENERATE = (
    *("input", "max_new_tokens", "stop_at_eos", "eos_token_id", "do_sample", "top_k", "top_p", "temperature"),
    *("freq_penalty", "use_past_kv_cache", "prepend_bos", "padding_side", "return_type", "verbose"),
)
BY_HAND = {
    "incl_bwd": "for gradients, read y = site.output and then y.grad inside `with loss.backward():`",
    "start_at_layer": "assign the residual to model.layers[k].resid_pre.output instead",
    "pos_slice": "slice the values where they are read: site.output[:, -1]",
}


@dataclass
class Run:
    """One call that runs the model, and the arguments that it has.

    Attributes:
        is_text: whether the input is known to be a string, which the libraries put a token before.
    """

    node: ast.Call
    kind: str
    model: str
    arguments: dict[str, ast.expr]
    is_text: bool = False

    def constant(self, name: str, default: object = None) -> object:
        """An argument that is a literal."""
        value = self.arguments.get(name)
        return value.value if isinstance(value, ast.Constant) else default if value is None else value

    @property
    def input(self) -> str:
        """What the model is run on, as an expression."""
        node = self.arguments.get("input") or self.arguments.get("tokens")
        source = "" if node is None else ast.unparse(node)
        prepend = self.constant("prepend_bos")
        if prepend is True or (prepend is None and self.is_text):
            return f"{self.model}.to_tokens({source}, prepend_bos=True)"
        return source

    @property
    def returns(self) -> str:
        """``"logits"``, ``"loss"``, ``"both"`` or ``""``; TransformerLens's ``return_type``."""
        kind = self.constant("return_type", "logits")
        return kind if isinstance(kind, str) else "" if kind is None else "logits"


def find_run(node: ast.AST, models: set[str]) -> Run | None:
    """A call as a run of one of the models; ``None`` if it is none."""
    if not isinstance(node, ast.Call):
        return None
    function, kind = node.func, "forward"
    if isinstance(function, ast.Attribute) and function.attr in (*RUNS, "forward"):
        kind, function = function.attr, function.value
    model = ast.unparse(function)
    if model not in models:
        return None
    arguments = dict(zip(("input", "return_type"), node.args, strict=False))
    arguments |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    return Run(node, kind, model, arguments)


def attribute_parts(node: ast.expr) -> list[str | ast.expr] | None:
    """The hook name of ``model.blocks[3].hook_y``; ``None`` for a node that is no hook point."""
    parts: list[str | ast.expr] = []
    while True:
        if isinstance(node, ast.Attribute):
            parts, node = [f".{node.attr}", *parts], node.value
        elif isinstance(node, ast.Subscript):
            index = node.slice
            text = str(index.value) if isinstance(index, ast.Constant) else index
            parts, node = [".", text, *parts], node.value
        else:
            break
    texts: list[str | ast.expr] = []
    for part in parts:
        if texts and isinstance(part, str) and isinstance(texts[-1], str):
            texts[-1] += part
        else:
            texts.append(part)
    if not texts or not isinstance(texts[0], str) or "hook_" not in str(texts[-1]):
        return None
    texts[0] = texts[0].removeprefix(".")
    return texts
