"""TransformerLens's ``generate`` as Hugging Face's, which is what ``model.generate`` is here.

The two have one name and other defaults: TransformerLens puts a token before a string, draws from all of the
distribution and returns the text. So everything that it does unasked is written out.
"""

from __future__ import annotations

import ast

from .findings import Findings
from .runs import GENERATE, Run

#: Arguments without effect here, and why.
NOT_NEEDED = {
    "verbose": "there is no progress bar",
    "padding_side": "padding never changes a result",
}
#: Arguments that go by the same name, or another.
RENAMED = {
    "use_past_kv_cache": "use_cache",
    "eos_token_id": "eos_token_id",
    "max_new_tokens": "max_new_tokens",
}
#: What an argument of the sampling is where it is not given.
SAMPLING = {"do_sample": "True", "top_k": "0", "top_p": "", "temperature": ""}
DIFFERS = (
    "TransformerLens's generate puts a beginning-of-sequence token before a string, draws from the whole "
    "distribution unless do_sample=False, and returns the text. Here generate is Hugging Face's, which does "
    "none of it unasked; that of mamba_trace.mamba_lens.HookedMamba does all of it"
)
IF_TEXT = (
    "if its input is a string, give it model.to_tokens(input, prepend_bos=True) and read the text with "
    "model.tokenizer.decode(ids[0], skip_special_tokens=True)"
)


def generated(node: ast.Call, original: ast.Call, model: str, is_text: bool, findings: Findings) -> ast.expr:
    """The call of ``model.generate`` here for one of TransformerLens's.

    Args:
        node: the call, whose arguments are rewritten.
        original: the call as the script has it.
        model: the model, as an expression.
        is_text: whether its input is known to be a string.
        findings: added to.
    """
    arguments: dict[str, ast.expr] = dict(zip(GENERATE, node.args, strict=False))
    arguments |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    run = Run(node, "generate", model, {"input": ast.Constant(""), **arguments}, is_text)
    given = [run.input, *options(arguments, findings)]
    for keyword in node.keywords:
        if keyword.arg is None:
            given.append(f"**{ast.unparse(keyword.value)}")
            findings.problem(keyword.value, "arguments that only the run knows: write them out", given[-1])
    call = f"{model}.generate({', '.join(given)})"
    kind = run.constant("return_type", "input")
    if kind == "str" or (kind == "input" and is_text):
        decoded = f"decode({call}[0]" if is_text else f"batch_decode({call}"
        call = f"{model}.tokenizer.{decoded}, skip_special_tokens=True)"
    elif kind not in ("input", "tokens", "tensor"):
        reason = "generate gives token ids: run the model on them for anything else"
        findings.problem(node, reason, f"return_type={ast.unparse(arguments['return_type'])}")
    new = ast.parse(call, mode="eval").body
    findings.call(original, ast.unparse(new))
    if all(note.reason != DIFFERS for note in findings.notes.values()):
        findings.note(original, DIFFERS)
    if kind == "input" and not is_text and not isinstance(run.arguments["input"], ast.Call):
        findings.note(original, IF_TEXT)
    return new


def options(arguments: dict[str, ast.expr], findings: Findings) -> list[str]:
    """The arguments besides the input, as Hugging Face's."""
    given = {"max_new_tokens": "10"}
    for name, value in arguments.items():
        text = ast.unparse(value)
        if name in RENAMED:
            given[RENAMED[name]] = text
        elif name in NOT_NEEDED:
            findings.dropped(value, f"{name}={text}", NOT_NEEDED[name])
        elif name == "stop_at_eos" and text == "False":
            given["eos_token_id"] = "None"
        elif name == "freq_penalty" and text not in ("0", "0.0"):
            reason = "Hugging Face's generate has none: pass logits_processor=[...] with one"
            findings.problem(value, reason, f"{name}={text}")
        elif name not in GENERATE:
            findings.problem(value, "an argument with no counterpart here", f"{name}={text}")
    for name, default in SAMPLING.items():
        text = ast.unparse(arguments[name]) if name in arguments else "None"
        text = default if text == "None" else text
        if text and (name == "do_sample" or given["do_sample"] != "False"):
            given[name] = text
    return [f"{name}={text}" for name, text in given.items()]
