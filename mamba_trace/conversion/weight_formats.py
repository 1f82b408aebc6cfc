"""The parameters of one Mamba go by three sets of names, and MambaLens cuts two of its matrices into pieces.

Conversion goes through Hugging Face's names. The original format differs from them in `backbone.embedding`
only, in Mamba-2 as in Mamba-1. MambaLens, which has Mamba-1 only, drops `backbone.` and `mixer.`, says `blocks`,
`norm`, `W_D` and `W_delta_2` for `layers`, `norm_f`, `D` and `dt_proj`, and splits two matrices by rows, from
the top:

    in_proj [2E,D] -> in_proj [E,D], skip_proj [E,D]
    x_proj [R+2N,E] -> W_delta_1 [R,E], W_B [N,E], W_C [N,E]

The architecture has the table of these names.

Contract: `convert_state_dict` loses nothing and invents nothing: the same values in the same dtypes, split
and joined only along rows, `lm_head.weight` present exactly where it was. Every key and shape is checked on
the way, and `CheckpointError` lists what is missing, what is unexpected and which shapes differ.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..modeling.architectures import ARCHITECTURES, BY_TYPE, Architecture
from ..modeling.architectures.architecture import size_of
from .config_formats import check_format
from .hybrid_weights import check_tied, empty_model, misfits_of
from .weight_sizes import (
    EMBEDDING,
    LAYER,
    LM_HEAD,
    Shapes,
    all_shapes,
    expected_shapes,
    layers_in,
    misfits,
    sizes_in,
    some,
)

StateDict = dict[str, Tensor]


class Model(NamedTuple):
    """The model that a state dict belongs to, as far as its parameters tell.

    Attributes:
        architecture: Mamba-1 for Falcon-Mamba too, whose parameters are the same.
        sizes: of the axes of the parameters.
        flags: which of the optional parameters there are.
        layers: the number of layers.
    """

    architecture: Architecture
    sizes: dict[str, int]
    flags: SimpleNamespace
    layers: int


def detect_state_dict_format(state_dict: Mapping[str, object]) -> str:
    """One of "original", "huggingface", "mamba_lens", by the name of the embedding; else `CheckpointError`.

    >>> detect_state_dict_format({"backbone.embedding.weight": torch.zeros(8, 4)})
    'original'
    """
    check_mapping(state_dict)
    formats = [format for format, key in EMBEDDING.items() if key in state_dict]
    if len(formats) == 1:
        return formats[0]
    expected = ", ".join(f"{key!r} ({format})" for format, key in EMBEDDING.items())
    if formats:
        keys = " and ".join(repr(EMBEDDING[format]) for format in formats)
        raise CheckpointError(f"this state dict has {keys}; expected exactly one of {expected}")
    ends = tuple(f".{key}" for key in EMBEDDING.values())
    wrapped = next((key for key in state_dict if str(key).endswith(ends)), None)
    hint = f". {wrapped!r} looks like a Mamba inside a wrapper: strip the prefix from every key"
    raise CheckpointError(
        f"not the state dict of a Mamba language model: found {some(state_dict)}; "
        f"expected one of {expected}{hint if wrapped else ''}"
    )


def check_mapping(state_dict: object) -> None:
    """Raise `CheckpointError` for anything that maps no names to anything."""
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"a state dict maps names to tensors, and this is a {type(state_dict).__name__}: module.state_dict() is one"
        )


def convert_state_dict(state_dict: Mapping[str, Tensor], to: str, *, source: str | None = None) -> StateDict:
    """The same parameters under the names, and in the pieces, of another format.

    Args:
        state_dict: the parameters of a whole Mamba language model, on any device and of any dtype. Those of a
            Falcon-Mamba cannot be told from a Mamba-1's, and are converted as they would be. A tied
            lm_head is in the result exactly if it is here. mamba_ssm's and MambaLens's own load_state_dict
            want it: if it is absent, add `result["lm_head.weight"] = <the embedding>`.
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
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    model = _model_of(shapes)
    for other in (format, to):
        if other not in model.architecture.formats:
            raise CheckpointError(
                f"these are the weights of a {model.architecture.name}, which has no {other} format: MambaLens has "
                f"Mamba-1 only. It has {' and '.join(map(repr, model.architecture.formats))}"
            )
    expected = all_shapes(model.architecture, model.sizes, model.flags, model.layers)
    pieces = {name: _pieces(format, name, shape, model) for name, shape in expected.items()}
    native = {key: shape for parts in pieces.values() for key, shape in parts.items()}
    _check(shapes, native, optional={LM_HEAD})
    out: StateDict = {}
    for name, shape in expected.items():
        given = [state_dict[key] for key in pieces[name] if key in state_dict]
        if given:  # lm_head may be absent
            wanted = _pieces(to, name, shape, model)
            out |= zip(wanted, _repartition(name, given, wanted), strict=True)
    return out


def check_state_dict(state_dict: Mapping[str, Tensor], config: Any) -> None:
    """Raise `CheckpointError` unless a Hugging Face state dict is exactly what a model of this config needs.

    Keys and shapes must be the model's; for a hybrid, those that transformers makes of them when it loads them. If the
    config ties lm_head to the embedding, lm_head may be absent, and otherwise must equal it. The error lists what is
    missing, unexpected, or of the wrong shape.

    >>> check_state_dict(model.state_dict(), model.config)    # doctest: +SKIP
    """
    _check_tensors(state_dict)
    if BY_TYPE[config.model_type].hybrid:
        return _check_hybrid(state_dict, config)
    tied = config.tie_word_embeddings
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    _check(shapes, expected_shapes(config), optional={LM_HEAD} if tied else set())
    if tied and _differ(state_dict[EMBEDDING["huggingface"]], state_dict.get(LM_HEAD)):
        raise CheckpointError(
            "the config ties lm_head.weight to the embedding, but the state dict has another lm_head.weight; "
            "set tie_word_embeddings=False (tie_embeddings=False in the original format)"
        )


def _check_hybrid(state_dict: Mapping[str, Tensor], config: Any) -> None:
    """As `check_state_dict`."""
    missing, extra, wrong = misfits_of(config, {name: tuple(tensor.shape) for name, tensor in state_dict.items()})
    if problems := misfits(missing, extra, {key: (shape, right) for key, shape, right in wrong}):
        raise CheckpointError(f"the state dict does not fit. {problems}")
    check_tied(config, state_dict, empty_model(config))


def _differ(embedding: Tensor, head: Tensor | None) -> bool:
    """Whether an lm_head is not the embedding that it is tied to; on the meta device nothing differs."""
    if head is None or head is embedding or "meta" in (head.device.type, embedding.device.type):
        return False
    return not torch.equal(embedding.to(head.device, head.dtype), head)


def _pieces(format: str, name: str, shape: tuple[int, ...], model: Model) -> Shapes:
    """The names and shapes that a Hugging Face parameter has in another format, from the top row down."""
    if name == EMBEDDING["huggingface"]:
        return {EMBEDDING[format]: shape}
    if format != "mamba_lens" or name == LM_HEAD:
        return {name: shape}
    layer = LAYER.search(name)
    if layer is None:
        return {"norm.weight": shape}  # the only one left: backbone.norm_f.weight
    block, parameter = f"blocks.{layer[1]}.", model.architecture.parameters[layer[2]]
    rows = (size_of(axis, model.sizes) for axis in parameter.rows)
    return {block + piece: (n, *shape[1:]) for piece, n in zip(parameter.pieces, rows, strict=True)}


def _repartition(name: str, given: list[Tensor], wanted: Shapes) -> list[Tensor]:
    """The rows of the given tensors, split or joined into the wanted pieces; the same if they fit."""
    if len(given) == len(wanted):
        return given
    if len(wanted) > 1:
        rows = [shape[0] for shape in wanted.values()]
        return [piece.clone(memory_format=torch.contiguous_format) for piece in given[0].split(rows)]
    if len({tensor.dtype for tensor in given}) > 1:
        dtypes = ", ".join(str(tensor.dtype) for tensor in given)
        raise CheckpointError(f"the pieces of {name} must have one dtype, found {dtypes}")
    return [torch.cat(given)]


def _model_of(shapes: Shapes) -> Model:
    """The model that a state dict of any format belongs to.

    A size that no parameter shows is 0, so that `_check` names the parameters that should show it.
    """
    layers = layers_in(shapes)
    if not layers:
        raise CheckpointError(f"the state dict has no layers: found {some(shapes)}")
    names = {layer[2] for layer in map(LAYER.search, shapes) if layer}
    # The one whose names are most of these; Mamba-1, which comes first, where several have them.
    architecture = max(ARCHITECTURES, key=lambda each: len(names & _names_of(each)))
    flags = {parameter.flag: False for parameter in architecture.parameters.values() if parameter.flag}
    for name, parameter in architecture.parameters.items():
        if parameter.flag and not names.isdisjoint({name, *parameter.pieces}):
            flags[parameter.flag] = True
    axes = {axis for parameter in architecture.parameters.values() for axis in (*parameter.rows, *parameter.others)}
    sizes = dict.fromkeys(axes | {"V", "D"}, 0) | sizes_in(architecture, shapes)
    return Model(architecture, sizes, SimpleNamespace(**flags), layers)


def _names_of(architecture: Architecture) -> set[str]:
    """The names of the parameters of a layer of an architecture in all of its formats."""
    pieces = (parameter.pieces for parameter in architecture.parameters.values())
    known = {piece for parts in pieces for piece in parts} if "mamba_lens" in architecture.formats else set()
    return known | architecture.parameters.keys()


def _check_tensors(state_dict: Mapping[str, Tensor]) -> None:
    """Raise unless the values are dense tensors of real numbers."""
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"a state dict maps names to tensors; {name!r} is a {type(value).__name__}")
        if value.is_complex():
            raise CheckpointError(f"{name!r} is complex ({value.dtype}); Hugging Face's Mamba has real parameters only")
        if value.layout != torch.strided:
            raise CheckpointError(f"{name!r} is of layout {value.layout}; parameters are dense: use .to_dense()")


def check_values(state_dict: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless a model can be built of the values: floating numbers that are there."""
    for name, value in state_dict.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{name!r} is of {value.dtype}; the parameters of a model are floating: use .float()")
        if value.is_meta:
            raise CheckpointError(
                f"{name!r} is on the meta device, which holds no numbers: load the weights first, those of a "
                f"MambaTrace with model.dispatch()"
            )


def _check(shapes: Shapes, expected: Shapes, optional: set[str]) -> None:
    """Raise for missing and unexpected names and wrong shapes, listing all of them at once."""
    missing = expected.keys() - shapes.keys() - optional
    # A shape with an unknown size in it, which is 0, says nothing beyond that a parameter is missing.
    known = {key: shape for key, shape in expected.items() if key in shapes and (all(shape) or not missing)}
    problems = misfits(
        missing=[key for key in expected if key in missing],
        extra=[key for key in shapes if key not in expected],
        wrong={key: (shapes[key], shape) for key, shape in known.items() if shapes[key] != shape},
    )
    if problems:
        raise CheckpointError(f"the state dict does not fit. {problems}")
