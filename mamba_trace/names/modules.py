"""What Hugging Face calls the modules of each architecture, and what this package calls them.

The package has one name for each part of a model: ``layers[3].ssm`` is ``backbone.layers.3.mixer`` in a Mamba,
``model.layers.3.mamba`` in a Jamba and ``model.layers.3.mamba_decoder.mamba`` in some layers of a Zamba. What is
here holds for all of them at once, so that a name is understood where nobody knows the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..sites import BY_NAME, PUBLIC_PART, Scope

#: The names of the module that holds the embedding, the layers and the final norm.
BASES = ("backbone", "model")
#: The package's name of a part of it -> Hugging Face's.
OF_BASE = {
    "embeddings": ("embeddings", "embed_tokens"),
    "layers": ("layers",),
    "norm_f": ("norm_f", "final_layernorm", "norm"),
}
#: The package's name of a part of a layer -> Hugging Face's paths below the layer.
OF_LAYER = {
    "ssm": ("mixer", "mamba", "mamba_decoder.mamba"),
    "attn": ("self_attn", "shared_transf.self_attn", "shared_transformer.self_attn", "mixer"),
    "mlp": ("shared_mlp", "feed_forward", "shared_transf.feed_forward", "shared_transformer.feed_forward", "mixer"),
    "moe": ("block_sparse_moe", "feed_forward", "mixer"),
    "norm": ("norm", "input_layernorm", "mamba_decoder.input_layernorm"),
    "norm_2": ("pre_ff_layernorm", "post_attention_layernorm"),
}
#: The scope of a part's sites.
SCOPE_OF: dict[str, Scope] = {part: scope for scope, part in PUBLIC_PART.items()}

_OF_MODEL = {path: name for name, several in OF_BASE.items() for path in several}
_BASE = re.compile(rf"(?:^|.*\.)(?:{'|'.join(BASES)})\.(?=(?:{'|'.join(_OF_MODEL)})(?:\.|$))")


def below_the_model(location: str) -> str:
    """A path without the modules around the embedding, the layers and the final norm, by the package's names of these.

    >>> below_the_model("model.model.embed_tokens.output"), below_the_model("model.backbone.layers.3.mixer.h.5")
    ('embeddings.output', 'layers.3.mixer.h.5')
    """
    match = _BASE.match(location)
    if match is None:
        return location
    first, dot, rest = location[match.end() :].partition(".")
    return _OF_MODEL[first] + dot + rest


def below_the_layer(path: str) -> str:
    """A path below a layer by the package's names of the parts. A path of the package's own stays as it is.

    >>> below_the_layer("mixer.h.5"), below_the_layer("self_attn.q"), below_the_layer("mamba_decoder.mamba")
    ('ssm.h.5', 'attn.q', 'ssm')
    """
    found = list(_parts_of(path))
    for part, rest in found:
        name = rest.partition(".")[0]
        site = BY_NAME.get(name) or next((site for site in BY_NAME.values() if site.place == name), None)
        if part in SCOPE_OF and site is not None and site.scope == SCOPE_OF[part]:
            return f"{part}.{site.name}{rest[len(name) :]}"
    if not found:
        return path
    part, rest = found[0]
    return f"{part}.{rest}" if rest else part


def _parts_of(path: str) -> Iterator[tuple[str, str]]:
    # Each part that a path may lie in, with what follows; those that are named by more of the path first.
    named = [(spelled, part) for part, several in OF_LAYER.items() for spelled in several]
    for spelled, part in sorted(named, key=lambda pair: -pair[0].count(".")):
        if path == spelled or path.startswith(f"{spelled}."):
            yield part, path[len(spelled) + 1 :]
