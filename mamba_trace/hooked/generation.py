"""TransformerLens's ``generate`` takes other arguments than Hugging Face's, which is the one that runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def generation_options(
    model: Any,
    max_new_tokens: int = 10,
    stop_at_eos: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    do_sample: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    use_past_kv_cache: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of TransformerLens's ``generate`` as arguments of Hugging Face's, with the same defaults.

    Raises:
        ValueError: for a ``freq_penalty``, which Hugging Face's ``generate`` does not have.
    """
    if freq_penalty:
        raise ValueError(
            f"freq_penalty={freq_penalty}: Hugging Face's generate, which runs here, has none; pass "
            f"logits_processor=[...] with one, or repetition_penalty=, which is another thing"
        )
    if eos_token_id is None:
        eos_token_id = getattr(model.tokenizer, "eos_token_id", None)
    options |= {"max_new_tokens": max_new_tokens, "use_cache": use_past_kv_cache}
    if not stop_at_eos:
        options["eos_token_id"] = None
    elif eos_token_id is not None:
        options["eos_token_id"] = eos_token_id
        first = eos_token_id if isinstance(eos_token_id, int) else eos_token_id[0]
        options.setdefault("pad_token_id", first)  # what a prompt that has ended goes on with
    options["do_sample"] = do_sample and temperature != 0
    if options["do_sample"]:
        top_k, top_p = top_k or 0, 1.0 if top_p is None else top_p  # all there are
        options |= {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    return options
