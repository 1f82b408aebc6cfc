"""The parameters of one Mamba go by three sets of names, and MambaLens cuts two of its matrices into pieces.

Hugging Face's names are the ones that conversion goes through. Against them, the original format has
`backbone.embedding`, and MambaLens drops `backbone.` and `mixer.`, says `blocks`, `norm`, `W_D` and
`W_delta_2` for `layers`, `norm_f`, `D` and `dt_proj`, and splits (rows, from the top):

    in_proj [2E,D] -> in_proj [E,D], skip_proj [E,D]
    x_proj [R+2N,E] -> W_delta_1 [R,E], W_B [N,E], W_C [N,E]

Contract: `convert_state_dict` loses nothing and invents nothing: the same values in the same dtypes, split
and joined only along rows, `lm_head.weight` present exactly where it was. Every key and shape is checked on
the way, and `CheckpointError` lists what is missing, what is unexpected and which shapes differ.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MambaConfig

from ..errors import CheckpointError
from .config_formats import check_format

StateDict = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

EMBEDDING = {
    "original": "backbone.embedding.weight",
    "huggingface": "backbone.embeddings.weight",
    "mamba_lens": "embedding.weight",
}
LM_HEAD = "lm_head.weight"  # in every format
NAMED_AT_MOST = 8
LAYER = re.compile(r"(?:backbone\.layers|blocks)\.(\d{1,9})\.(.+)")

# MambaLens's name of every parameter of a layer that it does not split, by Hugging Face's.
RENAMED = {
    "norm.weight": "norm.weight",
    "mixer.A_log": "A_log",
    "mixer.D": "W_D",
    "mixer.conv1d.weight": "conv1d.weight",
    "mixer.conv1d.bias": "conv1d.bias",
    "mixer.dt_proj.weight": "W_delta_2.weight",
    "mixer.dt_proj.bias": "W_delta_2.bias",
    "mixer.out_proj.weight": "out_proj.weight",
    "mixer.out_proj.bias": "out_proj.bias",
}
# ... and of those that it splits, into pieces from the top row down.
SPLIT = {
    "mixer.in_proj.weight": ("in_proj.weight", "skip_proj.weight"),
    "mixer.in_proj.bias": ("in_proj.bias", "skip_proj.bias"),
    "mixer.x_proj.weight": ("W_delta_1.weight", "W_B.weight", "W_C.weight"),
}


class Sizes(NamedTuple):
    """Everything that decides which parameters a Mamba has, and their shapes."""

    n_layers: int
    V: int
    D: int
    E: int
    N: int
    R: int
    K: int  # d_conv
    use_bias: bool
    use_conv_bias: bool


def detect_state_dict_format(state_dict: Mapping[str, object]) -> str:
    """One of "original", "huggingface", "mamba_lens", by the name of the embedding; else `CheckpointError`.

    >>> detect_state_dict_format({"backbone.embedding.weight": torch.zeros(8, 4)})
    'original'
    """
    found = [format for format, key in EMBEDDING.items() if key in state_dict]
    if len(found) == 1:
        return found[0]
    expected = ", ".join(f"{key!r} ({format})" for format, key in EMBEDDING.items())
    if found:
        keys = " and ".join(repr(EMBEDDING[format]) for format in found)
        raise CheckpointError(f"this state dict has {keys}; expected exactly one of {expected}")
    hint = ""
    wrapped = next(
        (k for k in state_dict if str(k).endswith(tuple(f".{e}" for e in EMBEDDING.values()))), None
    )
    if wrapped is not None:
        hint = f". {wrapped!r} looks like a Mamba inside a wrapper: strip the prefix from every key"
    raise CheckpointError(
        f"not the state dict of a Mamba language model: found {_some(list(map(str, state_dict)))}; "
        f"expected one of {expected}{hint}"
    )


def convert_state_dict(state_dict: Mapping[str, Tensor], to: str, *, source: str | None = None) -> StateDict:
    """The same parameters under the names, and in the pieces, of another format.

    Args:
        state_dict: parameters of a whole Mamba language model, on any device and of any dtype. A tied lm_head
            may be there or not, and is there or not in the result: mamba_ssm's and MambaLens's own
            load_state_dict want it, so add `result["lm_head.weight"] = <the embedding>` where it is absent.
        to: "original", "huggingface" or "mamba_lens".
        source: the format of `state_dict`; detected when None.

    Returns:
        A new dict. Parameters that are only renamed are the given tensors themselves; those that are split or
        joined are new contiguous ones of the same dtype and device.

    Raises:
        CheckpointError: missing or unexpected keys, shapes that do not fit together, complex parameters.

    >>> hf = MambaForCausalLM(MambaConfig(num_hidden_layers=1)).state_dict()    # doctest: +SKIP
    >>> convert_state_dict(hf, "mamba_lens")["blocks.0.W_B.weight"].shape         # doctest: +SKIP
    torch.Size([16, 1536])
    """
    check_format(to)
    format = check_format(source) if source is not None else detect_state_dict_format(state_dict)
    _check_tensors(state_dict)
    sizes = _sizes_of(state_dict, format)
    expected = _shapes(sizes)
    native: Shapes = {}
    for name, shape in expected.items():
        native |= _pieces(format, name, shape, sizes)
    _check(state_dict, native, optional={LM_HEAD})
    out: StateDict = {}
    for name, shape in expected.items():
        given = [state_dict[key] for key in _pieces(format, name, shape, sizes) if key in state_dict]
        wanted = _pieces(to, name, shape, sizes)
        if given:  # lm_head may be absent
            out |= zip(wanted, _repartition(name, given, wanted), strict=True)
    return out


def check_state_dict(state_dict: Mapping[str, Tensor], config: MambaConfig) -> None:
    """Raise `CheckpointError` unless a Hugging Face state dict is what a model of this config needs, exactly.

    Compares keys and shapes, and where the config ties lm_head to the embedding, in which case lm_head may be
    absent, that the two are equal. The error lists what is missing, unexpected, or of the wrong shape.

    >>> check_state_dict(model.state_dict(), model.config)    # doctest: +SKIP
    """
    _check_tensors(state_dict)
    _check_layers(state_dict, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    _check(state_dict, expected_shapes(config), optional={LM_HEAD} if tied else set())
    if tied and _differ(state_dict[EMBEDDING["huggingface"]], state_dict.get(LM_HEAD)):
        raise CheckpointError(
            "the config ties lm_head.weight to the embedding, but the state dict has another lm_head.weight; "
            "set tie_word_embeddings=False (tie_embeddings=False in the original format)"
        )


def expected_shapes(config: MambaConfig) -> Shapes:
    """Every parameter of a Hugging Face Mamba of this config, by its name, lm_head included.

    >>> expected_shapes(MambaConfig(num_hidden_layers=1))["backbone.norm_f.weight"]
    (768,)
    """
    sizes = Sizes(
        n_layers=config.num_hidden_layers,
        V=config.vocab_size,
        D=config.hidden_size,
        E=int(config.expand * config.hidden_size),
        N=config.state_size,
        R=int(config.time_step_rank),
        K=config.conv_kernel,
        use_bias=config.use_bias,
        use_conv_bias=config.use_conv_bias,
    )
    return _shapes(sizes)


def first_layers(state_dict: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """A Hugging Face state dict without the layers from the `n_layers`-th on.

    >>> model = MambaForCausalLM(MambaConfig(num_hidden_layers=3))            # doctest: +SKIP
    >>> sorted(first_layers(model.state_dict(), 2))[-3]                        # doctest: +SKIP
    'backbone.layers.1.norm.weight'
    """
    layers = {name: LAYER.fullmatch(name) for name in state_dict}
    return {name: state_dict[name] for name, match in layers.items() if not match or int(match[1]) < n_layers}


def _differ(embedding: Tensor, head: Tensor | None) -> bool:
    """Whether an lm_head is not the embedding that it is tied to; on the meta device nothing differs."""
    if head is None or head is embedding or "meta" in (head.device.type, embedding.device.type):
        return False
    return not torch.equal(embedding.to(head.device, head.dtype), head)


def _shapes(sizes: Sizes) -> Shapes:
    """Every parameter of a Hugging Face Mamba of these sizes, in its order, with its shape."""
    _, V, D, E, N, R, K, use_bias, use_conv_bias = sizes
    layer: Shapes = {
        "mixer.A_log": (E, N),
        "mixer.D": (E,),
        "mixer.conv1d.weight": (E, 1, K),
        "mixer.conv1d.bias": (E,),
        "mixer.in_proj.weight": (2 * E, D),
        "mixer.in_proj.bias": (2 * E,),
        "mixer.x_proj.weight": (R + 2 * N, E),
        "mixer.dt_proj.weight": (E, R),
        "mixer.dt_proj.bias": (E,),
        "mixer.out_proj.weight": (D, E),
        "mixer.out_proj.bias": (D,),
        "norm.weight": (D,),
    }
    absent = set() if use_bias else {"mixer.in_proj.bias", "mixer.out_proj.bias"}
    absent |= set() if use_conv_bias else {"mixer.conv1d.bias"}
    shapes: Shapes = {EMBEDDING["huggingface"]: (V, D)}
    for i in range(sizes.n_layers):
        shapes |= {f"backbone.layers.{i}.{k}": shape for k, shape in layer.items() if k not in absent}
    return shapes | {"backbone.norm_f.weight": (D,), LM_HEAD: (V, D)}


def _pieces(format: str, name: str, shape: tuple[int, ...], sizes: Sizes) -> Shapes:
    """The names and shapes that a Hugging Face parameter has in another format, from the top row down."""
    if name == EMBEDDING["huggingface"]:
        return {EMBEDDING[format]: shape}
    if format != "mamba_lens" or name == LM_HEAD:
        return {name: shape}
    layer = LAYER.fullmatch(name)
    if layer is None:
        return {"norm.weight": shape}  # the only one left: backbone.norm_f.weight
    block, key = f"blocks.{layer[1]}.", layer[2]
    if key not in SPLIT:
        return {block + RENAMED[key]: shape}
    rows = (sizes.R, sizes.N, sizes.N) if key == "mixer.x_proj.weight" else (sizes.E, sizes.E)
    return {block + piece: (n, *shape[1:]) for piece, n in zip(SPLIT[key], rows, strict=True)}


def _repartition(name: str, given: list[Tensor], wanted: Shapes) -> list[Tensor]:
    """The rows of the given tensors in the wanted pieces; the same tensors where there is nothing to do."""
    if len(given) == len(wanted):
        return given
    if len(wanted) > 1:
        rows = [shape[0] for shape in wanted.values()]
        return [piece.clone(memory_format=torch.contiguous_format) for piece in given[0].split(rows)]
    if len({tensor.dtype for tensor in given}) > 1:
        found = ", ".join(str(tensor.dtype) for tensor in given)
        raise CheckpointError(f"the pieces of {name} must have one dtype, found {found}")
    return [torch.cat(given)]


def _sizes_of(state_dict: Mapping[str, Tensor], format: str) -> Sizes:
    """The sizes that a state dict shows, by its embedding and its first layer."""
    layers = [int(match[1]) for match in map(LAYER.fullmatch, state_dict) if match]
    if not layers:
        raise CheckpointError(f"the state dict has no layers: found {_some(list(state_dict))}")
    _check_layers(state_dict, max(layers) + 1)
    named = Sizes(max(layers) + 1, 0, 0, 0, 0, 0, 0, False, False)

    def key(name: str) -> str:
        return next(iter(_pieces(format, name, (0,), named)))

    first = "backbone.layers.0.mixer."
    biases = [key(first + name) in state_dict for name in ("in_proj.bias", "out_proj.bias", "conv1d.bias")]
    named = named._replace(use_bias=biases[0] or biases[1], use_conv_bias=biases[2])
    native: list[str] = [k for name in _shapes(named) for k in _pieces(format, name, (0,), named)]
    _check(state_dict, dict.fromkeys(native), optional={LM_HEAD})

    def size(name: str, axis: int) -> int:
        return (*state_dict[key(name)].shape, 0, 0, 0)[axis]

    return named._replace(
        V=size(EMBEDDING["huggingface"], 0),
        D=size(EMBEDDING["huggingface"], 1),
        E=size(first + "A_log", 0),
        N=size(first + "A_log", 1),
        R=size(first + "dt_proj.weight", 1),
        K=size(first + "conv1d.weight", 2),
    )


def _check_layers(state_dict: Mapping[str, Tensor], declared: int) -> None:
    """Raise where more layers are asked for than there are tensors: naming what is missing takes hours."""
    layers = {int(match[1]) for match in map(LAYER.fullmatch, state_dict) if match}
    if declared > len(state_dict) + 1:
        raise CheckpointError(
            f"the state dict does not fit: {declared} layers are expected, and it has {len(layers)} layers "
            f"in {len(state_dict)} tensors"
        )


def _check_tensors(state_dict: Mapping[str, Tensor]) -> None:
    """Raise unless the values are real tensors."""
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"a state dict maps names to tensors; {name!r} is a {type(value).__name__}")
        if value.is_complex():
            raise CheckpointError(
                f"{name!r} is complex ({value.dtype}); Hugging Face's Mamba has real parameters only"
            )


def _check(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...] | None], optional: set[str]
) -> None:
    """Raise for missing and unexpected names and wrong shapes, all in one; None fits any shape."""
    missing = [key for key in expected if key not in state_dict and key not in optional]
    extra = [key for key in state_dict if key not in expected]
    wrong = [
        f"{key} {list(state_dict[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if shape is not None and key in state_dict and tuple(state_dict[key].shape) != shape
    ]
    found = (("missing", missing), ("unexpected", extra), ("of the wrong shape", wrong))
    problems = [f"{len(names)} {what}: {_some(names)}" for what, names in found if names]
    if any(key.endswith((".dt_bias", "mixer.norm.weight")) for key in extra):
        problems.append("the layers look like Mamba-2's; only Mamba-1 is supported so far")
    if any(line.startswith(tuple(EMBEDDING.values())) for line in wrong):
        problems.append("a Hugging Face vocab_size counts the padding of the vocabulary")
    if problems:
        raise CheckpointError("the state dict does not fit. " + ". ".join(problems))


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ("; ".join(names[:NAMED_AT_MOST]) or "nothing") + more
