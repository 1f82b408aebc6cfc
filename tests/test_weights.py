"""Weights under MambaLens's names: which rows they are, and that editing them edits the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import accelerate
import numpy as np
import pytest
import torch
from conftest import N_LAYERS, VARIANTS, make_hf
from einops import rearrange
from family_models import family_model
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_state_dict
from mamba_trace.errors import CheckpointError, LayerError, SiteValueError, UnknownSiteError
from mamba_trace.hooked.weights import LensBlock
from mamba_trace.model import DEMO

D, E, N, R, V, K = 12, 24, 5, 4, 31, 3
SHAPES = {
    "norm.weight": (D,),
    "skip_proj.weight": (E, D),
    "in_proj.weight": (E, D),
    "conv1d.weight": (E, 1, K),
    "conv1d.bias": (E,),
    "W_delta_1.weight": (R, E),
    "W_B.weight": (N, E),
    "W_C.weight": (N, E),
    "W_delta_2.weight": (E, R),
    "W_delta_2.bias": (E,),
    "A_log": (E, N),
    "W_D": (E,),
    "out_proj.weight": (D, E),
}


def logits(model: MambaTrace, tokens: Tensor) -> Tensor:
    with torch.no_grad(), model.trace(tokens):
        value = model.lm_head.output.save()
    return value


def get(block: LensBlock, name: str) -> Tensor:
    value = block
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def with_weights(weights: dict[str, Tensor], **changes: object) -> MambaTrace:
    """A model whose fused parameters were put together from MambaLens's pieces, outside of it."""
    module = make_hf(**changes)
    module.load_state_dict(convert_state_dict(weights, "huggingface"))
    return MambaTrace(module)


def pieces(model: MambaTrace) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in convert_state_dict(model._module.state_dict(), "mamba_lens").items()}


def test_the_shapes_are_those_documented(tiny: MambaTrace) -> None:
    block = tiny.blocks[1]
    assert {name: tuple(view.shape) for name, view in block.named_weights().items()} == SHAPES
    assert block.in_proj.bias is None
    assert (tiny.W_E.shape, tiny.W_U.shape, tiny.norm.weight.shape) == ((V, D), (D, V), (D,))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_view_holds_what_a_converted_state_dict_holds(changes: dict) -> None:
    model = MambaTrace(make_hf(**changes))
    found = {"embedding.weight": model.embedding.weight, "norm.weight": model.norm.weight}
    found["lm_head.weight"] = model.W_U.T
    for layer, block in enumerate(model.blocks):
        found |= {f"blocks.{layer}.{name}": view for name, view in block.named_weights().items()}
    expected = pieces(model)
    assert found.keys() == expected.keys()
    for name, view in found.items():
        assert torch.equal(view, expected[name]), name
        assert not view.requires_grad


@pytest.mark.parametrize("name", SHAPES)
def test_editing_a_view_in_place_edits_the_model(tiny: MambaTrace, tokens: Tensor, name: str) -> None:
    before, weights = logits(tiny, tokens), pieces(tiny)
    view = get(tiny.blocks[1], name)
    view[1:] *= 1.5
    view[0] = 0.25
    weights[f"blocks.1.{name}"][1:] *= 1.5
    weights[f"blocks.1.{name}"][0] = 0.25
    after = logits(tiny, tokens)
    assert torch.equal(after, logits(with_weights(weights), tokens))
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", ["in_proj.bias", "skip_proj.bias", "out_proj.bias"])
def test_biases_where_the_model_has_them(tokens: Tensor, name: str) -> None:
    model = MambaTrace(make_hf(use_bias=True))
    before, weights = logits(model, tokens), pieces(model)
    get(model.blocks[0], name)[:] = 1.0
    weights[f"blocks.0.{name}"][:] = 1.0
    after = logits(model, tokens)
    assert torch.equal(after, logits(with_weights(weights, use_bias=True), tokens))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", SHAPES)
def test_assigning_copies_into_the_parameter(tiny: MambaTrace, tokens: Tensor, name: str) -> None:
    parameters, weights = dict(tiny._module.named_parameters()), pieces(tiny)
    value = torch.rand(SHAPES[name], dtype=torch.float64) / 4
    group, _, leaf = name.rpartition(".")
    if leaf == "bias":
        getattr(tiny.blocks[2], group).bias = value
    else:
        setattr(tiny.blocks[2], group or leaf, value)
    weights[f"blocks.2.{name}"] = value.float()
    assert torch.equal(logits(tiny, tokens), logits(with_weights(weights), tokens))
    assert all(parameters[key] is value for key, value in tiny._module.named_parameters())
    value.zero_()  # it was copied
    assert get(tiny.blocks[2], name).abs().max() > 0


def test_views_have_the_models_dtype(tiny_hf, tokens: Tensor) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.bfloat16))
    before = logits(model, tokens)
    assert model.blocks[0].W_B.weight.dtype == torch.bfloat16
    model.blocks[0].W_B = torch.ones(N, E, dtype=torch.float64)
    assert (model._module.backbone.layers[0].mixer.x_proj.weight[R : R + N] == 1).all()
    assert not torch.equal(logits(model, tokens), before)


def test_the_embedding_and_the_unembedding(tokens: Tensor) -> None:
    model = MambaTrace(make_hf(tie_word_embeddings=False))
    before = logits(model, tokens)
    model.W_U[:, 3] = 0  # no gradient mode to turn off, and the transposed layout
    after = logits(model, tokens)
    assert (after[..., 3] == 0).all()
    assert torch.equal(after[..., :3], before[..., :3])
    weights = pieces(model)
    model.W_E = model.W_E.roll(1, dims=0)
    weights["embedding.weight"] = weights["embedding.weight"].roll(1, dims=0)
    model.W_U *= 2
    model.norm.weight = torch.full((D,), 0.5)
    weights["lm_head.weight"] *= 2
    weights["norm.weight"][:] = 0.5
    assert torch.equal(logits(model, tokens), logits(with_weights(weights, tie_word_embeddings=False), tokens))


def test_tied_embeddings_are_one_parameter(tiny: MambaTrace) -> None:
    tiny.W_E[5] = 7
    assert (tiny.W_U[:, 5] == 7).all()


def test_calling_a_weight_applies_it(tiny: MambaTrace) -> None:
    mixer, block = tiny._module.backbone.layers[0].mixer, tiny.blocks[0]
    x, e = torch.randn(2, 4, D), torch.randn(2, 4, E)
    fused = mixer.in_proj(x)
    torch.testing.assert_close(block.in_proj(x), fused[..., :E])
    torch.testing.assert_close(block.skip_proj(x), fused[..., E:])
    parts = mixer.x_proj(e).split([R, N, N], dim=-1)
    for name, part in zip(("W_delta_1", "W_B", "W_C"), parts, strict=True):
        torch.testing.assert_close(getattr(block, name)(e), part)
    assert torch.equal(block.W_delta_2(parts[0]), mixer.dt_proj(parts[0]))
    assert torch.equal(block.norm(x), tiny._module.backbone.layers[0].norm(x))
    assert torch.equal(tiny.embedding(torch.tensor([3, 1])), tiny.W_E[[3, 1]])
    biased = MambaTrace(make_hf(use_bias=True))
    inner = biased._module.backbone.layers[0].mixer.in_proj
    torch.testing.assert_close(biased.blocks[0].skip_proj(x), inner(x)[..., E:])


def test_gradients_reach_the_parameter_and_are_seen_in_the_views(tiny: MambaTrace, tokens: Tensor) -> None:
    assert tiny.blocks[0].W_B.weight.grad is None
    with tiny.trace(tokens):
        tiny.lm_head.output.square().mean().backward()
    whole = tiny._module.backbone.layers[0].mixer.x_proj.weight.grad
    assert torch.equal(tiny.blocks[0].W_B.weight.grad, whole[R : R + N])
    assert torch.equal(tiny.blocks[0].W_C.grad, whole[R + N :])
    tiny.blocks[0].W_B.weight.grad.zero_()
    assert (whole[R : R + N] == 0).all()
    assert whole[:R].abs().max() > 0
    tiny._module.zero_grad()
    tiny.blocks[1].W_C(torch.ones(E)).sum().backward()
    grad = tiny._module.backbone.layers[1].mixer.x_proj.weight.grad
    assert (grad[R + N :] == 1).all()
    assert (grad[: R + N] == 0).all()


def test_an_edit_between_forward_and_backward_is_noticed(tiny: MambaTrace, tokens: Tensor) -> None:
    with tiny.trace(tokens):
        loss = tiny.lm_head.output.sum().save()
    tiny.blocks[0].out_proj.weight[:] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_stands_for_its_tensor(tiny: MambaTrace) -> None:
    block = tiny.blocks[0]
    plain = block.W_B.weight.clone()
    assert block.W_B.shape == (N, E)
    assert len(block.W_B) == N
    assert torch.equal(block.W_B[2], plain[2])
    assert torch.equal(block.W_B.T, plain.T)
    assert torch.equal(block.W_B @ torch.ones(E), plain @ torch.ones(E))
    assert torch.equal(torch.ones(N) @ block.W_B, torch.ones(N) @ plain)
    assert torch.equal(torch.stack([block.W_B, block.W_C])[0], plain)
    assert torch.equal(2 - block.W_B, 2 - plain)
    assert ((plain == block.W_B) & (abs(block.W_B) >= 0)).all()
    block.W_B *= 2
    assert torch.equal(block.W_B.weight, 2 * plain)
    block.W_B[0] = 0
    block.W_C = block.W_B
    block.A_log += 1
    assert (block.W_C[0] == 0).all()
    assert torch.equal(block.W_C.weight[1:], 2 * plain[1:])


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


#: Operations that no list of this package names.
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "power": lambda w: w**2,
    "of a number": lambda w: 2**w,
    "floor": lambda w: w // 0.1,
    "remainder": lambda w: 0.1 % w,
    "rows": lambda w: torch.stack(list(w)),
    "an array": lambda w: torch.from_numpy(np.asarray(w)),
    "a function": lambda w: torch.linalg.svdvals(w),
    "by keyword": lambda w: F.linear(input=torch.ones(E), weight=w),
    "in lists": lambda w: torch.cat([torch.cat((w, w)), w]),
    "in a named tuple": lambda w: torch.cat(Pair(w, w)),
    "rearranged": lambda w: rearrange(w, "N E -> E N"),
    # These never ask what stands for the tensor, and read it itself.
    "a new tensor": lambda w: torch.tensor(w),
    "mapped": lambda w: torch.func.vmap(lambda row: row.sum())(w),
    "differentiated": lambda w: torch.func.grad(lambda v: (v**2).sum())(w),
}


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
@pytest.mark.parametrize("case", OPERATIONS)
def test_every_operation_of_a_tensor_is_one_of_a_weight(tiny: MambaTrace, case: str) -> None:
    weights, operation = tiny.blocks[0].W_B, OPERATIONS[case]
    assert isinstance(weights, Tensor)
    result = operation(weights)
    assert type(result) is Tensor
    assert torch.equal(result, operation(weights.weight))


def test_weights_go_where_tensors_go(tiny: MambaTrace, tokens: Tensor) -> None:
    block, linear = tiny.blocks[0], nn.Linear(E, N)
    linear.load_state_dict({"weight": block.W_B, "bias": torch.zeros(N)})
    assert torch.equal(linear.weight, block.W_B)
    block.W_B //= 0.1
    assert torch.equal(block.W_B, linear.weight // 0.1)
    with tiny.scan(tokens):
        shape = (tiny.layers[0].ssm.ssm_input.output @ tiny.blocks[0].W_B.T).shape.save()
    assert shape == (3, 9, N)


def test_blocks_is_a_sequence_beside_the_layers(tiny: MambaTrace, tokens: Tensor) -> None:
    assert len(tiny.blocks) == N_LAYERS
    assert [repr(block) for block in tiny.blocks] == [repr(tiny.blocks[layer]) for layer in range(N_LAYERS)]
    assert [repr(block) for block in tiny.blocks[1:]] == [repr(tiny.blocks[-2]), repr(tiny.blocks[-1])]
    assert "W_delta_1.weight: [4, 24]" in repr(tiny.blocks[-1])
    assert "W_B" in dir(tiny.blocks[0])
    with pytest.raises(LayerError, match=r"blocks\[3\]: this model has layers 0 to 2"):
        tiny.blocks[3]
    with torch.no_grad(), tiny.trace(tokens):  # blocks, in a trace, of a model whose layers are traced
        norm = tiny.layers[0].norm.output
        gate = tiny.layers[0].ssm.skip.output.save()
        same = tiny.blocks[0].skip_proj(norm).save()
        again = tiny.blocks[0].norm(tiny.layers[1].resid_pre.output).save()
        out = tiny.layers[1].ssm.y.output.save()
    torch.testing.assert_close(same, gate)
    assert again.shape == (3, 9, D)
    assert out.shape == (3, 9, E)
    with pytest.raises(AttributeError):
        tiny.blocks = [1]


def test_an_edit_inside_a_trace_counts_from_the_next_layer_on(tiny: MambaTrace, tokens: Tensor) -> None:
    with torch.no_grad(), tiny.trace(tokens):
        tiny.layers[0].resid_post.output.save()
        tiny.blocks[2].out_proj.weight[:] = 0
        out = tiny.layers[2].ssm.out_proj.output.save()
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(E, N), r"blocks\[1\]\.W_B\.weight takes shape \[5, 24\] \(N E\), not \[24, 5\].*slice"),
        (torch.zeros(E), r"not \[24\]"),
        (0.0, r"takes a tensor of shape \[5, 24\] \(N E\), not a float.*W_B\.weight\[:\] = "),
        (
            torch.zeros(N, E, dtype=torch.int64),
            r"floating tensor such as torch.float32, not one of torch.int64",
        ),
        (torch.zeros(N, E, device="meta"), "on the meta device"),
    ],
    ids=["transposed", "vector", "number", "integers", "meta"],
)
def test_values_that_do_not_fit(tiny: MambaTrace, tokens: Tensor, value: object, words: str) -> None:
    before = logits(tiny, tokens)
    with pytest.raises(SiteValueError, match=words):
        tiny.blocks[1].W_B = value
    with pytest.raises(SiteValueError):
        tiny.blocks[1].W_B.weight = value
    assert torch.equal(logits(tiny, tokens), before)


def test_the_unembedding_says_its_own_shape(tiny: MambaTrace) -> None:
    with pytest.raises(SiteValueError, match=r"model\.W_U takes shape \[12, 31\] \(D V\), not \[31, 12\]"):
        tiny.W_U = torch.zeros(V, D)


def test_names_that_do_not_exist(tiny: MambaTrace) -> None:
    with pytest.raises(UnknownSiteError, match=r"blocks\[0\] has no 'W_delta_3'; did you mean W_delta_"):
        _ = tiny.blocks[0].W_delta_3
    with pytest.raises(UnknownSiteError, match=r"model\.hook\('blocks\.2\.hook_y'\)"):
        _ = tiny.blocks[2].hook_y
    with pytest.raises(UnknownSiteError, match="has no 'W_Q'"):
        tiny.blocks[0].W_Q = torch.zeros(2)
    with pytest.raises(UnknownSiteError, match="has no 'attn': a Mamba has no attention"):
        _ = tiny.blocks[0].attn
    with pytest.raises(UnknownSiteError, match=r"has no 'data' .*: write model\.blocks\[0\]\.W_B = value"):
        tiny.blocks[0].W_B.data = torch.zeros(5, 24)
    with pytest.raises(UnknownSiteError, match=r"has no 'data' .*: write model\.norm\.weight = value"):
        tiny.norm.data = torch.zeros(12)
    with pytest.raises(UnknownSiteError, match=r"blocks\[0\]\.in_proj has no 'bias' that could be assigned to$"):
        tiny.blocks[0].in_proj.bias = torch.zeros(E)


def test_weights_are_no_places(tiny: MambaTrace, tokens: Tensor) -> None:
    with pytest.raises(UnknownSiteError, match=r"model\.norm holds weights.*no 'output'.*model\.norm_f"):
        _ = tiny.norm.output
    with pytest.raises(UnknownSiteError, match=r"model\.layers\[1\]\.ssm\.out_proj"), tiny.trace(tokens):
        tiny.blocks[1].out_proj.input.save()
    with pytest.raises(UnknownSiteError, match="no 'output'"):
        tiny.norm.output = torch.zeros(D)


def test_weights_that_are_not_loaded_yet() -> None:
    model = MambaTrace(DEMO)
    with pytest.raises(CheckpointError, match=r"blocks\[0\]\.W_B\.weight is not loaded yet.*model\.dispatch\(\)"):
        _ = model.blocks[0].W_B.weight
    blocks = model.blocks
    assert repr(blocks[0].W_B) == "model.blocks[0].W_B: weight [16, 128]"
    assert "conv1d.bias: [128]" in repr(blocks[0])
    model.dispatch()
    assert blocks[0].W_B.shape == (16, 128)


def test_offloaded_weights_say_so(tiny_hf, tokens: Tensor) -> None:
    module = tiny_hf()
    expected = logits(MambaTrace(tiny_hf()), tokens)
    for block in module.backbone.layers:
        accelerate.cpu_offload(block, execution_device=torch.device("cpu"))
    model = MambaTrace(module)
    with pytest.raises(CheckpointError, match=r"A_log is offloaded.*without disk or CPU offload"):
        model.blocks[0].A_log = torch.zeros(E, N)
    torch.testing.assert_close(logits(model, tokens), expected)


def test_quantised_weights_say_so(tiny: MambaTrace) -> None:
    proj = tiny._module.backbone.layers[0].mixer.x_proj
    for packed in (torch.zeros(R + 2 * N, E, dtype=torch.int8), torch.zeros(168, 1, dtype=torch.uint8)):
        proj.weight = nn.Parameter(packed, requires_grad=False)
        with pytest.raises(CheckpointError, match=r"W_C\.weight is quantised.*without quantization_config"):
            _ = tiny.blocks[0].W_C.weight
    assert tiny.blocks[1].W_C.shape == (N, E)


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def test_an_adapter_without_a_weight_says_so(tiny_hf) -> None:
    module = tiny_hf()
    mixer = module.backbone.layers[0].mixer
    mixer.x_proj = Adapter(mixer.x_proj)
    with pytest.raises(CheckpointError, match=r"W_B\.weight: a Adapter stands where it is kept"):
        _ = MambaTrace(module).blocks[0].W_B.weight


# ---------------------------------------------------------------- Mamba-2: rows of in_proj and channels of conv1d

H, P, GN = 6, 4, 10  # two groups of N
#: Name -> shape, the parameter of a mixer or of a block, and its first row there.
OF_MAMBA2: dict[str, tuple[tuple[int, ...], str, int]] = {
    "norm.weight": ((D,), "norm.weight", 0),
    "skip_proj.weight": ((E, D), "mixer.in_proj.weight", 0),
    "skip_proj.bias": ((E,), "mixer.in_proj.bias", 0),
    "in_proj.weight": ((E, D), "mixer.in_proj.weight", E),
    "in_proj.bias": ((E,), "mixer.in_proj.bias", E),
    "conv1d.weight": ((E, 1, K), "mixer.conv1d.weight", 0),
    "conv1d.bias": ((E,), "mixer.conv1d.bias", 0),
    "B_conv1d.weight": ((GN, 1, K), "mixer.conv1d.weight", E),
    "B_conv1d.bias": ((GN,), "mixer.conv1d.bias", E),
    "C_conv1d.weight": ((GN, 1, K), "mixer.conv1d.weight", E + GN),
    "C_conv1d.bias": ((GN,), "mixer.conv1d.bias", E + GN),
    "W_delta_1.weight": ((H, D), "mixer.in_proj.weight", 2 * E + 2 * GN),
    "W_delta_1.bias": ((H,), "mixer.in_proj.bias", 2 * E + 2 * GN),
    "W_B.weight": ((GN, D), "mixer.in_proj.weight", 2 * E),
    "W_B.bias": ((GN,), "mixer.in_proj.bias", 2 * E),
    "W_C.weight": ((GN, D), "mixer.in_proj.weight", 2 * E + GN),
    "W_C.bias": ((GN,), "mixer.in_proj.bias", 2 * E + GN),
    "W_delta_2.bias": ((H,), "mixer.dt_bias", 0),
    "A_log": ((H,), "mixer.A_log", 0),
    "W_D": ((H,), "mixer.D", 0),
    "inner_norm.weight": ((E,), "mixer.norm.weight", 0),
    "out_proj.weight": ((D, E), "mixer.out_proj.weight", 0),
    "out_proj.bias": ((D,), "mixer.out_proj.bias", 0),
}


@pytest.fixture
def mamba2() -> MambaTrace:
    return MambaTrace(family_model("mamba2", use_bias=True))


def rows_of(model: MambaTrace, name: str) -> Tensor:
    """The rows of the parameter itself, cut by hand."""
    shape, parameter, start = OF_MAMBA2[name]
    whole = dict(model._module.named_parameters())[f"backbone.layers.1.{parameter}"]
    return whole.detach()[start : start + shape[0]]


def test_the_names_and_shapes_of_mamba2(mamba2: MambaTrace) -> None:
    views = mamba2.blocks[1].named_weights()
    assert list(views) == list(OF_MAMBA2)
    for name, view in views.items():
        assert tuple(view.shape) == OF_MAMBA2[name][0], name
        assert torch.equal(view, rows_of(mamba2, name)), name
        assert view.data_ptr() == rows_of(mamba2, name).data_ptr(), name
    plain = MambaTrace(family_model("mamba2", use_conv_bias=False)).blocks[1]
    missing = {name for name in OF_MAMBA2 if name.endswith("bias") and name != "W_delta_2.bias"}
    assert plain.named_weights().keys() == OF_MAMBA2.keys() - missing


@pytest.mark.parametrize("name", OF_MAMBA2)
def test_editing_a_view_of_mamba2_edits_the_model(mamba2: MambaTrace, tokens: Tensor, name: str) -> None:
    before, other = logits(mamba2, tokens), MambaTrace(family_model("mamba2", use_bias=True))
    view, rows = get(mamba2.blocks[1], name), rows_of(other, name)
    for each in (view, rows):
        each[1:] *= 1.5
        each[0] = 0.25
    after = logits(mamba2, tokens)
    assert torch.equal(after, logits(other, tokens))
    assert (after - before).abs().max() > 1e-4 * before.abs().max()
    value = torch.rand(OF_MAMBA2[name][0], dtype=torch.float64) / 4
    group, _, leaf = name.rpartition(".")
    if leaf == "bias":
        getattr(mamba2.blocks[1], group).bias = value
    else:
        setattr(mamba2.blocks[1], group or leaf, value)
    rows.copy_(value)
    assert torch.equal(logits(mamba2, tokens), logits(other, tokens))


def test_calling_a_weight_of_mamba2_gives_its_site(mamba2: MambaTrace, tokens: Tensor) -> None:
    names = [
        "skip",
        "x_in",
        "B_in",
        "C_in",
        "conv",
        "B_conv",
        "C_conv",
        "delta_1",
        "delta_2",
        "after_skip",
        "inner_norm",
    ]
    sites: dict[str, Tensor] = {}
    with torch.no_grad(), mamba2.trace(tokens):
        sites["norm"] = mamba2.layers[1].norm.output.save()
        for name in (*names, "out_proj"):
            sites[name] = getattr(mamba2.layers[1].ssm, name).output.save()
    norm = sites["norm"]
    block, length = mamba2.blocks[1], tokens.shape[1]
    for site, name in {"skip": "skip_proj", "x_in": "in_proj", "delta_1": "W_delta_1"}.items():
        torch.testing.assert_close(getattr(block, name)(norm), sites[site])
    for letter in "BC":
        torch.testing.assert_close(getattr(block, f"W_{letter}")(norm), sites[f"{letter}_in"].flatten(-2))
    for site, name, into in (
        ("conv", "conv1d", "x_in"),
        ("B_conv", "B_conv1d", "B_in"),
        ("C_conv", "C_conv1d", "C_in"),
    ):
        columns = sites[into].flatten(2).transpose(1, 2)  # [B,channels,L]
        found = getattr(block, name)(columns)[..., :length].transpose(1, 2)
        torch.testing.assert_close(found, sites[site].flatten(2))
    torch.testing.assert_close(block.W_delta_2(sites["delta_1"]), sites["delta_2"])
    torch.testing.assert_close(block.inner_norm(sites["after_skip"]), sites["inner_norm"])
    torch.testing.assert_close(block.out_proj(sites["inner_norm"]), sites["out_proj"])


def test_gradients_of_mamba2_are_seen_in_the_views(mamba2: MambaTrace, tokens: Tensor) -> None:
    with mamba2.trace(tokens):
        mamba2.lm_head.output.square().mean().backward()
    mixer = mamba2._module.backbone.layers[1].mixer
    block = mamba2.blocks[1]
    assert torch.equal(block.W_C.weight.grad, mixer.in_proj.weight.grad[2 * E + GN : 2 * E + 2 * GN])
    assert torch.equal(block.B_conv1d.bias.grad, mixer.conv1d.bias.grad[E : E + GN])
    assert torch.equal(block.W_delta_2.bias.grad, mixer.dt_bias.grad)
    mamba2._module.zero_grad()
    block.C_conv1d(torch.ones(1, GN, 5)).sum().backward()
    assert (mixer.conv1d.weight.grad[: E + GN] == 0).all()
    assert (mixer.conv1d.bias.grad[E + GN :] == 5 + K - 1).all()
    block.W_delta_2(torch.zeros(H)).sum().backward()
    assert (mixer.dt_bias.grad == 1).all()


def test_what_mamba2_lacks_and_mamba_lacks(mamba2: MambaTrace, tiny: MambaTrace) -> None:
    for action in (
        lambda: mamba2.blocks[0].W_delta_2.weight,
        lambda: mamba2.blocks[0].W_delta_2 * 2,
        lambda: mamba2.blocks[0].W_delta_2.shape,
        lambda: mamba2.blocks[0].W_delta_2.T,
        lambda: setattr(mamba2.blocks[0], "W_delta_2", torch.zeros(H, H)),
    ):
        with pytest.raises(UnknownSiteError, match=r"W_delta_2 has no weight in Mamba-2: it adds its bias"):
            action()
    with pytest.raises(UnknownSiteError, match=r"W_delta_2 has no 'weight' that could be assigned to"):
        mamba2.blocks[0].W_delta_2.weight = torch.zeros(H, H)
    assert repr(mamba2.blocks[0].W_delta_2) == "model.blocks[0].W_delta_2: bias [6]"
    assert {"B_conv1d", "inner_norm", "W_delta_2"} <= set(dir(mamba2.blocks[0]))
    for model in (tiny, MambaTrace(family_model("falcon_mamba"))):
        for name in ("inner_norm", "B_conv1d"):
            with pytest.raises(UnknownSiteError, match=rf"has no '{name}': a {model.architecture.name} has none"):
                getattr(model.blocks[0], name)
    with pytest.raises(SiteValueError, match=r"W_B\.weight takes shape \[10, 12\] \(GN D\), not \[12, 10\]"):
        mamba2.blocks[0].W_B = torch.zeros(D, GN)


def test_falcon_mamba_has_the_weights_of_mamba(tokens: Tensor) -> None:
    model = MambaTrace(family_model("falcon_mamba"))
    assert {name: tuple(view.shape) for name, view in model.blocks[0].named_weights().items()} == SHAPES
    model.blocks[0].W_B[:] = 0
    assert (model._module.backbone.layers[0].mixer.x_proj.weight[R : R + N] == 0).all()
    with torch.no_grad(), model.trace(tokens):
        B = model.layers[0].ssm.B.output.save()
    assert (B == 0).all()
