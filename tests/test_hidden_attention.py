"""The matrix of a scan is right for every pair and channel, by products over all positions in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from accelerate.hooks import attach_align_device_hook
from allocations import PeakMemory
from conftest import LENGTH, N_LAYERS, SIZES, agree, layers_that_ran, make_hf
from kinds import BACKENDS, DUAL, KINDS, made, make
from torch import Tensor, nn

from mamba_trace import MambaTrace
from mamba_trace.cli import PROMPT
from mamba_trace.errors import ArgumentError, LayerError, PositionError, PromptError, SiteValueError
from mamba_trace.flow import decay_groups
from mamba_trace.hidden_attention import Contributions, HiddenAttention, contributions, hidden_attention
from mamba_trace.results import Result
from mamba_trace.scan import dual, selective_scan
from mamba_trace.scan import pairs as scan_pairs
from mamba_trace.scan.pairs import HeadPairs, ScanPairs

H, P = 6, 4  # of Mamba-2
D, E = SIZES["hidden_size"], SIZES["expand"] * SIZES["hidden_size"]


# -- the reference -----------------------------------------------------------------------------------------


def values_of(model: MambaTrace, tokens: Tensor) -> dict[str, Tensor]:
    """Every value of a run in float64, by hook name."""
    values: dict[str, Tensor] = {}

    def keep(hook: str, value: Tensor) -> Tensor:
        values[hook] = value
        return value

    reference.forward(model._module.state_dict(), model._module.config, tokens, keep)
    return values


def attention_of(values: dict[str, Tensor], layer: int) -> Tensor:
    """alpha [L,L,E] of the one row, by multiplying A_bar position by position."""
    A_bar, B_bar, C = (values[f"blocks.{layer}.hook_{site}"][0].detach() for site in ("A_bar", "B_bar", "C"))
    if A_bar.dim() == 2:  # Mamba-2, written out for each channel
        A_bar, B_bar = A_bar.repeat_interleave(P, 1)[..., None], B_bar.repeat_interleave(P, 1)
        C = C.repeat_interleave(E // C.shape[1], 1)  # [L,E,N]
    else:
        C = C[:, None]
    length = len(A_bar)
    alpha = torch.zeros(length, length, A_bar.shape[1], dtype=torch.float64)
    for j in range(length):
        carried = B_bar[j]  # [E,N]
        for i in range(j, length):
            carried = carried if i == j else A_bar[i] * carried
            alpha[i, j] = (C[i] * carried).sum(-1)
    return alpha


def by_unit(alpha: Tensor, kind: str) -> Tensor:
    """alpha [L,L,E] as reduce=None keeps it: in Mamba-2 the first channel of each head."""
    return alpha[..., ::P] if kind in DUAL else alpha


def writes_of(model: MambaTrace, values: dict[str, Tensor], layer: int, parts: Tensor) -> Tensor:
    """What parts of y [L,L,E] write into the residual stream [L,L,D], with the run's gate and scales of the norm."""
    weights = {name: weight.double() for name, weight in model._module.state_dict().items()}
    parts = parts * nn.functional.silu(site_of(values, layer, "skip"))[:, None]
    if (weight := weights.get(f"backbone.layers.{layer}.mixer.norm.weight")) is not None:
        config = model._module.config
        gated = site_of(values, layer, "after_skip").unflatten(-1, (config.n_groups, -1))  # [L,G,E/G]
        scale = 1 / (gated.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        parts = parts * (scale.expand_as(gated).flatten(1) * weight)[:, None]
    return parts @ weights[f"backbone.layers.{layer}.mixer.out_proj.weight"].T


def site_of(values: dict[str, Tensor], layer: int, site: str) -> Tensor:
    return values[f"blocks.{layer}.hook_{site}"][0].detach()


@pytest.fixture(scope="module")
def prompt(tokens: Tensor) -> Tensor:
    """Token ids [1,9]."""
    return tokens[1:2]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def exact_once(kind: str) -> MambaTrace:
    return made(kind)


@pytest.fixture(scope="module")
def values(exact_once: MambaTrace, prompt: Tensor) -> dict[str, Tensor]:
    return values_of(exact_once, prompt)


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


# -- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_every_pair_in_every_channel_is_the_product_of_the_matrices_between(
    exact_once: MambaTrace, prompt: Tensor, values: dict[str, Tensor], layer: int, kind: str
) -> None:
    alpha = attention_of(values, layer)
    found = hidden_attention(exact_once, prompt, layer, reduce=None)
    agree(found.values, by_unit(alpha, kind), 1e-11)
    assert found.channels == list(range(E))
    assert found.heads == (list(range(H)) if kind in DUAL else None)
    mean = hidden_attention(exact_once, prompt, layer).values
    agree(mean, alpha.mean(-1), 1e-11)
    assert not mean.triu(1).any()
    agree(hidden_attention(exact_once, prompt, layer, reduce="abs_mean").values, alpha.abs().mean(-1), 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_what_every_token_reads_adds_up_to_y(
    prompt: Tensor, layer: int, dtype: torch.dtype, tolerance: float, kind: str
) -> None:
    model = make(kind, dtype=dtype)
    with torch.no_grad(), model.trace(prompt):
        x = model.layers[layer].ssm.ssm_input.output[0].save()  # [L,E]
        y = model.layers[layer].ssm.y.output[0].save()
    alpha = hidden_attention(model, prompt, layer, channels=range(E), reduce=None).values
    assert alpha.dtype == dtype
    agree((alpha * x).sum(1), y, tolerance)
    units = hidden_attention(model, prompt, layer, reduce=None).values
    agree(units.repeat_interleave(E // units.shape[-1], -1), alpha, 1e-12)


@pytest.mark.parametrize("reduce", ["mean", "abs_mean", None], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(-1, None), ([5, 1, 7], slice(2, 6)), (None, 3), ([2, 3], [3, 2]), (slice(4, None), [0, 1]), (0, -1)],
    ids=["last row", "some of both", "one column", "a square", "all later", "none earlier"],
)
def test_chosen_rows_and_columns_are_those_of_the_whole(
    exact_once: MambaTrace,
    prompt: Tensor,
    values: dict[str, Tensor],
    rows: Any,
    columns: Any,
    reduce: str | None,
    kind: str,
) -> None:
    found = hidden_attention(exact_once, prompt, 1, rows=rows, columns=columns, reduce=reduce)
    whole = attention_of(values, 1)[found.rows][:, found.columns]
    expected = {"mean": whole.mean(-1), "abs_mean": whole.abs().mean(-1), None: by_unit(whole, kind)}[reduce]
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-12)
    chosen = torch.zeros(2, LENGTH, dtype=torch.bool)
    chosen[0, slice(None) if rows is None else rows] = True
    chosen[1, slice(None) if columns is None else columns] = True
    assert found.rows == chosen[0].nonzero().flatten().tolist()
    assert found.columns == chosen[1].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "channels",
    [[5], [3, -1, 0], torch.arange(E) % 2 == 0, "slow", "fast"],
    ids=["one", "three", "mask", "slow", "fast"],
)
def test_chosen_channels_are_those_of_the_whole(
    exact_once: MambaTrace, prompt: Tensor, values: dict[str, Tensor], channels: Any
) -> None:
    found = hidden_attention(exact_once, prompt, -1, channels=channels, reduce=None)
    index = decay_groups(exact_once, -1)[channels] if isinstance(channels, str) else channels
    expected = torch.zeros(E, dtype=torch.bool)
    expected[index] = True
    assert found.channels == expected.nonzero().flatten().tolist()
    assert found.layer == N_LAYERS - 1
    agree(found.values, attention_of(values, N_LAYERS - 1)[..., expected], 1e-11)
    mean = hidden_attention(exact_once, prompt, -1, channels=channels)
    agree(mean.values, attention_of(values, N_LAYERS - 1)[..., expected].mean(-1), 1e-11)
    size = hidden_attention(exact_once, prompt, -1, channels=channels, reduce="abs_mean")
    agree(size.values, attention_of(values, N_LAYERS - 1)[..., expected].abs().mean(-1), 1e-11)
    parts = attention_of(values, N_LAYERS - 1) * site_of(values, N_LAYERS - 1, "ssm_input")
    norms = contributions(exact_once, prompt, -1, channels=channels)
    agree(norms.values, parts[..., expected].norm(dim=-1), 1e-11)
    assert found.heads is mean.heads is norms.heads is None


@pytest.mark.parametrize("heads", [4, [5, 1], slice(1, 4), torch.arange(H) == 2], ids=["one", "two", "slice", "mask"])
@pytest.mark.parametrize("kind", DUAL, scope="module")
def test_chosen_heads_are_those_of_the_whole(
    exact_once: MambaTrace, prompt: Tensor, values: dict[str, Tensor], heads: Any
) -> None:
    alpha = attention_of(values, 1)
    chosen = torch.zeros(H, dtype=torch.bool)
    chosen[heads] = True
    channels = chosen.repeat_interleave(P)
    found = hidden_attention(exact_once, prompt, 1, heads=heads, reduce=None)
    assert found.heads == chosen.nonzero().flatten().tolist()
    assert found.channels == channels.nonzero().flatten().tolist()
    agree(found.values, alpha[..., ::P][..., chosen], 1e-11)
    agree(hidden_attention(exact_once, prompt, 1, heads=heads).values, alpha[..., channels].mean(-1), 1e-11)
    parts = (alpha * site_of(values, 1, "ssm_input")) * channels
    agree(contributions(exact_once, prompt, 1, heads=heads).values, parts.norm(dim=-1), 1e-11)
    direction = torch.linspace(-1, 1, D, dtype=torch.float64)
    found_writes = contributions(exact_once, prompt, 1, heads=heads, residual_direction=direction).values
    agree(found_writes, writes_of(exact_once, values, 1, parts) @ direction, 1e-11)


@pytest.mark.parametrize(("kind", "each_backend"), BACKENDS, indirect=["each_backend"])
def test_every_backend_gives_the_same_matrix_and_contributions(prompt: Tensor, kind: str, each_backend: str) -> None:
    """In float32, whose rounding (6e-8) grows to about 1e-6 over the layers, steps and products of a run."""
    model, layer = make(kind, each_backend, dtype=torch.float32), 2
    values = values_of(model, prompt)
    alpha = attention_of(values, layer)
    agree(hidden_attention(model, prompt, layer, reduce=None).values, by_unit(alpha, kind).float(), 1e-5)
    agree(hidden_attention(model, prompt, layer).values, alpha.mean(-1).float(), 1e-5)
    parts = alpha * site_of(values, layer, "ssm_input")  # [L,L,E]
    agree(contributions(model, prompt, layer).values, parts.norm(dim=-1).float(), 1e-5)
    direction = torch.randn(D, generator=torch.Generator().manual_seed(4))
    written = writes_of(model, values, layer, parts) @ direction.double()
    agree(contributions(model, prompt, layer, residual_direction=direction).values, written.float(), 1e-5)


def test_in_half_precision_the_matrix_is_that_of_the_run_in_float32(prompt: Tensor, kind: str) -> None:
    model = make(kind, dtype=torch.bfloat16)
    with torch.no_grad(), model.trace(prompt):
        x = model.layers[0].ssm.ssm_input.output[0].save()
        y = model.layers[0].ssm.y.output[0].save()
    alpha = hidden_attention(model, prompt, 0, channels=range(E), reduce=None).values
    assert alpha.dtype == torch.float32
    agree((alpha * x.float()).sum(1), y, 1e-5)


def test_nothing_after_the_layer_is_computed(tiny: MambaTrace, prompt: Tensor) -> None:
    hidden_attention(tiny, prompt, 1)
    assert layers_that_ran(tiny)[-1] == 1


# -- contributions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"use_bias": True}], ids=["plain", "with biases"])
def test_contributions_are_alpha_x_by_norm_or_along_a_direction(
    prompt: Tensor, changes: dict[str, Any], kind: str
) -> None:
    model = make(kind, **changes)
    values = values_of(model, prompt)
    parts = attention_of(values, 1) * site_of(values, 1, "ssm_input")  # [L,L,E]
    generator = torch.Generator().manual_seed(4)
    in_y = torch.randn(E, generator=generator, dtype=torch.float64)
    in_residual = torch.randn(D, generator=generator, dtype=torch.float64)
    agree(contributions(model, prompt, 1).values, parts.norm(dim=-1), 1e-11)
    agree(contributions(model, prompt, 1, y_direction=in_y.float()).values, parts @ in_y.float().double(), 1e-11)
    written = writes_of(model, values, 1, parts)  # [L,L,D]
    found = contributions(model, prompt, 1, residual_direction=in_residual).values
    agree(found, written @ in_residual, 1e-11)
    some = contributions(
        model, prompt, 1, residual_direction=in_residual, channels=[1, 8], rows=[4, 6], columns=slice(5)
    )
    only = torch.zeros(E, dtype=torch.float64)
    only[[1, 8]] = 1
    expected = (writes_of(model, values, 1, parts * only) @ in_residual)[[4, 6], :5]
    agree(some.values, expected, 1e-11)
    along_y = contributions(model, prompt, 1, y_direction=in_y, channels=[1, 8], rows=[4, 6], columns=slice(5))
    agree(along_y.values, ((parts * only) @ in_y)[[4, 6], :5], 1e-11)


def test_what_is_read_and_the_rest_add_up_to_what_the_mixer_writes(
    exact_once: MambaTrace, prompt: Tensor, values: dict[str, Tensor]
) -> None:
    """All but the term of D, which has the same gate and the same scales; there is no bias."""
    direction = torch.linspace(-1, 1, D, dtype=torch.float64)
    found = contributions(exact_once, prompt, 1, residual_direction=direction).values
    by_D = site_of(values, 1, "ssm_output") - site_of(values, 1, "y")  # [L,E]
    rest = writes_of(exact_once, values, 1, by_D[:, None])[:, 0] @ direction
    agree(found.sum(1) + rest, site_of(values, 1, "out_proj") @ direction, 1e-11)


def test_along_a_direction_contributions_add_up_to_what_y_writes(demo: MambaTrace) -> None:
    emma, shelby = demo.to_single_token(" Emma"), demo.to_single_token(" Shelby")
    directions = demo.tokens_to_residual_directions(torch.tensor([emma, shelby])).detach()
    direction = directions[0] - directions[1]
    ssm = demo.layers[1].ssm
    with torch.no_grad(), demo.trace(PROMPT):
        skip, x = ssm.skip.output[0].save(), ssm.ssm_input.output[0].save()
        y, out = ssm.y.output[0].save(), ssm.out_proj.output[0].save()
    found = contributions(demo, PROMPT, 1, residual_direction=direction).values
    mixer: Any = ssm._module
    by_D = mixer.out_proj(mixer.D * x * nn.functional.silu(skip)).detach()
    agree(found.sum(1), (out - by_D) @ direction, 1e-5)
    along_y = contributions(demo, PROMPT, 1, y_direction=y[-1], rows=-1).values
    agree(along_y.sum(1), y[-1:].square().sum(-1), 1e-5)


def test_out_proj_may_be_adapted_or_offloaded(prompt: Tensor, kind: str) -> None:
    direction = torch.randn(D, generator=torch.Generator().manual_seed(4))
    plain, offloaded = make(kind, dtype=torch.float32), make(kind, dtype=torch.float32)
    expected = contributions(plain, prompt, 1, residual_direction=direction).values
    for block in offloaded._module.backbone.layers:
        attach_align_device_hook(block, execution_device=torch.device("cpu"), offload=True)
    assert offloaded.layers[1].ssm.out_proj._module.weight.is_meta
    agree(contributions(offloaded, prompt, 1, residual_direction=direction).values, expected)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = make_hf(**KINDS[kind])
    module.backbone.layers[1].mixer.out_proj.__class__ = Doubled
    found = contributions(MambaTrace(module), prompt, 1, residual_direction=direction).values
    agree(found, 2 * expected)


@pytest.mark.parametrize("kind", DUAL, scope="module")
def test_the_norm_may_be_hooked(prompt: Tensor, kind: str) -> None:
    """A hook that halves what the norm returns halves its weight."""
    direction = torch.randn(D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = contributions(made(kind), prompt, 1, residual_direction=direction).values
    hooked = make(kind)
    hooked.layers[1].ssm._module.norm.register_forward_hook(lambda module, inputs, output: output / 2)
    agree(contributions(hooked, prompt, 1, residual_direction=direction).values, expected / 2, 1e-11)


# -- the matrix in blocks ----------------------------------------------------------------------------------


def random_pairs(length: int, d_inner: int, d_state: int, scale: float, dtype: torch.dtype) -> ScanPairs:
    """A scan of random parameters whose steps are around ``scale``."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    A = -torch.arange(1, d_state + 1, dtype=dtype).expand(d_inner, -1)
    delta = scale * torch.rand(length, d_inner, generator=generator, dtype=torch.float64).to(dtype)
    every = list(range(length))
    return ScanPairs(delta, draw(length, d_inner), A, draw(length, d_state), draw(length, d_state), every, every)


def y_of(pairs: ScanPairs) -> Tensor:
    """y [L,E] by a scan."""
    rows = (one[None] for one in (pairs.x, pairs.delta, pairs.B, pairs.C))
    x, delta, B, C = rows
    return selective_scan(x, delta, pairs.A, B, C, kernels="reference")[0][0]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 40])
def test_rows_of_any_length_add_up_to_the_scan(length: int) -> None:
    pairs = random_pairs(length, 6, 3, 0.3, torch.float64)
    agree(pairs.each().sum(1), y_of(pairs), 1e-12)
    agree(pairs.along(torch.ones_like(pairs.x)).sum(1), y_of(pairs).sum(1), 1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 100.0])
def test_long_products_neither_overflow_nor_lose_their_digits(scale: float) -> None:
    exactly = random_pairs(300, 4, 3, scale, torch.float64)
    single = replace(exactly, **{n: getattr(exactly, n).float() for n in ("delta", "x", "A", "B", "C")})
    agree(single.each(), exactly.each().float(), 3e-6)
    agree(single.each().sum(1), y_of(exactly).float(), 1e-5)


def random_heads(length: int, scale: float, dtype: torch.dtype = torch.float64) -> HeadPairs:
    """A scan of Mamba-2 with 4 heads of 3 channels, in 2 groups."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    delta = scale * torch.rand(length, 4, generator=generator, dtype=torch.float64).to(dtype)
    A, every = -torch.arange(1, 5, dtype=dtype), list(range(length))
    return HeadPairs(
        delta, draw(length, 4, 3), A, draw(length, 2, 5), draw(length, 2, 5), every, every, groups=[0, 0, 1, 1]
    )


def y_of_heads(pairs: HeadPairs) -> Tensor:
    """y [L,H,P] by a scan."""
    x, delta, B, C = (one[None] for one in (pairs.x, pairs.delta, pairs.B, pairs.C))
    return dual.reference.selective_scan(x, delta, pairs.A, B, C)[0][0]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 40])
def test_rows_of_any_length_add_up_to_the_scan_of_heads(length: int) -> None:
    pairs = random_heads(length, 0.3)
    y, alpha = y_of_heads(pairs), pairs.each()  # [L,L,H]
    agree(torch.einsum("ijh,jhp->ihp", alpha, pairs.x), y, 1e-12)
    weight = torch.rand(length, 4, 3, dtype=torch.float64)
    agree(pairs.along(weight).sum(1), (weight * y).sum((1, 2)), 1e-12)
    every = alpha[..., None] * pairs.x  # [i,j,h,p]
    for function in (torch.square, torch.abs):
        agree(pairs.summed(function), function(every).sum((2, 3)), 1e-12)
    some = replace(pairs, rows=[length - 1], columns=[0], A=pairs.A[2:3], delta=pairs.delta[:, 2:3],
                   x=pairs.x[:, 2:3], groups=[1])  # fmt: skip
    agree(some.each(), alpha[-1:, :1, 2:3], 1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 100.0])
def test_long_products_of_heads_neither_overflow_nor_lose_their_digits(scale: float) -> None:
    exactly = random_heads(300, scale)
    single = replace(exactly, **{n: getattr(exactly, n).float() for n in ("delta", "x", "A", "B", "C")})
    assert single.each().isfinite().all()
    agree(single.each(), exactly.each().float(), 3e-6)
    ones = torch.ones_like(exactly.x)
    agree(single.along(ones.float()).sum(1), y_of_heads(exactly).sum((1, 2)).float(), 1e-5)


def test_memory_of_heads_is_that_of_a_channel_or_the_result() -> None:
    pairs = random_heads(256, 0.3, torch.float32)
    ones = torch.ones_like(pairs.x)
    calls: list[Callable[[], Tensor]] = [
        lambda: pairs.along(ones),
        lambda: pairs.summed(torch.abs),
    ]
    for call in calls:
        memory = PeakMemory.of(call)
        assert memory.largest <= 256 * 256 * 4  # bytes of the result: [L,L,H] and [L,H,P,N] have more
        assert memory.peak <= 3 * 256 * 256 * 4


@pytest.mark.parametrize("elements", [1, 100, 200])
def test_the_numbers_do_not_depend_on_how_much_is_computed_at_a_time(
    monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    pairs = replace(random_pairs(21, 7, 3, 0.3, torch.float64), rows=[3, 9, 10, 20], columns=[0, 3, 4, 17, 20])
    weight = torch.rand(21, 7, dtype=torch.float64)
    at_once = [pairs.along(weight), pairs.summed(torch.square), pairs.each()]
    monkeypatch.setattr(scan_pairs, "ELEMENTS", elements)
    assert len(list(pairs.by_channels())) > 1
    for one, other in zip([pairs.along(weight), pairs.summed(torch.square), pairs.each()], at_once, strict=True):
        agree(one, other, 1e-13)


def test_memory_stays_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_pairs, "ELEMENTS", 2**15)
    pairs = random_pairs(64, 96, 8, 0.3, torch.float32)
    calls: list[Callable[[], Tensor]] = [
        lambda: pairs.along(torch.ones_like(pairs.x)),
        lambda: pairs.summed(torch.abs),
    ]
    for call in calls:
        memory = PeakMemory.of(call)
        assert memory.largest <= 2**15 * 4  # bytes; [L,E,N] has 2**15 * 6, [L,L,E] more
        assert memory.peak <= 6 * 2**15 * 4


# -- what comes back ---------------------------------------------------------------------------------------


def test_the_picture_names_tokens_and_layer(demo: MambaTrace) -> None:
    found = hidden_attention(demo, PROMPT, 1, channels="slow", rows=[8, -1])
    (heatmap,) = found.heatmaps()
    assert heatmap.row_labels == [" school_8", " to_14"]
    assert (heatmap.row_title, heatmap.column_title) == ("token that reads", "Token that is read")
    assert heatmap.column_labels[:3] == ["Lately_0", ",_1", " Emma_2"]
    assert torch.equal(heatmap.values, found.values)
    assert heatmap.title == "Hidden attention, layer 1\nmean of alpha, 43 channels"
    assert heatmap.signed
    assert not hidden_attention(demo, PROMPT, 1, reduce="abs_mean").heatmaps()[0].signed
    (heatmap,) = contributions(demo, PROMPT, 2, channels=3).heatmaps()
    assert heatmap.title == "Contributions to y, layer 2\nnorm of alpha x, 1 channel"
    assert not heatmap.signed


def test_the_picture_of_separate_channels_is_that_of_their_mean(demo: MambaTrace) -> None:
    found = hidden_attention(demo, PROMPT, 1, channels=[2, 5], reduce=None)
    (heatmap,) = found.heatmaps()
    assert found.values.shape == (15, 15, 2)
    agree(heatmap.values, hidden_attention(demo, PROMPT, 1, channels=[2, 5]).values)
    assert heatmap.title.endswith("mean of alpha, 2 channels")


@pytest.mark.parametrize("suffix", [".json", ".safetensors", ".html", ".png"])
def test_results_are_saved_and_read_back(demo: MambaTrace, tmp_path: Path, suffix: str) -> None:
    for found in (hidden_attention(demo, PROMPT, 1, rows=-1), contributions(demo, PROMPT, 1)):
        path = found.save(tmp_path / f"result{suffix}")
        assert path.stat().st_size > 0
        if suffix in (".json", ".safetensors"):
            again = Result.load(path)
            assert type(again) is type(found)
            assert vars(again).keys() == vars(found).keys()
            for name, value in vars(found).items():
                other = getattr(again, name)
                assert torch.equal(other, value) if isinstance(value, Tensor) else other == value


def test_tokens_of_a_model_without_a_tokenizer_are_their_ids(tiny: MambaTrace, prompt: Tensor) -> None:
    found = hidden_attention(tiny, prompt, 0)
    assert found.tokens == [str(token) for token in prompt[0].tolist()]
    assert isinstance(found, HiddenAttention)
    assert isinstance(contributions(tiny, prompt, 0), Contributions)


# -- what is refused ---------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[type[Exception], str, Callable[[MambaTrace, Tensor], Any]]] = {
    "two prompts": (
        PromptError,
        "must be one prompt",
        lambda model, t: hidden_attention(model, t.expand(2, -1), 1),
    ),
    "a layer that is not there": (
        LayerError,
        "^layer=3: this model has layers 0 to 2, and no 3$",
        lambda model, t: hidden_attention(model, t, 3),
    ),
    "a row that is not there": (
        PositionError,
        r"rows=9, but there are 9, from -9 to 8",
        lambda model, t: hidden_attention(model, t, 1, rows=[9]),
    ),
    "a column that is not there": (
        PositionError,
        r"columns=-10, but there are 9",
        lambda model, t: contributions(model, t, 1, columns=-10),
    ),
    "a channel that is not there": (
        SiteValueError,
        r"channels=24, but there are 24",
        lambda model, t: hidden_attention(model, t, 1, channels=24),
    ),
    "an unknown reduction": (
        ArgumentError,
        r"reduce='max' is none of 'mean', 'abs_mean', None",
        lambda model, t: hidden_attention(model, t, 1, reduce="max"),
    ),
    "a direction of another length": (
        SiteValueError,
        r"residual_direction takes a floating tensor of shape \[12\] \[D d_model\], not .* \[24\]",
        lambda model, t: contributions(model, t, 1, residual_direction=torch.ones(24)),
    ),
    "a direction of integers": (
        SiteValueError,
        r"y_direction takes a floating tensor of shape \[24\] \[E d_inner\]",
        lambda model, t: contributions(model, t, 1, y_direction=torch.ones(24, dtype=torch.long)),
    ),
    "two directions": (
        SiteValueError,
        r"along one direction",
        lambda model, t: contributions(model, t, 1, y_direction=torch.ones(24), residual_direction=torch.ones(12)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_before_anything_runs(tiny: MambaTrace, prompt: Tensor, case: str) -> None:
    kind, message, call = REFUSED[case]
    with pytest.raises(kind, match=message):
        call(tiny, prompt)
    assert not len(tiny.last_run)


#: Heads that a kind of model lacks.
REFUSED_HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "heads of Mamba-1": ("mamba", r"heads=\[0\]: a mixer of Mamba-1 or .* has 0 heads.*give channels=", {"heads": [0]}),
    "heads of Falcon-Mamba": ("falcon_mamba", r"heads=1: a mixer of Mamba-1 or Falcon-Mamba has 0 heads", {"heads": 1}),
    "a head that is not there": (DUAL[0], r"heads=6, but there are 6, from -6 to 5", {"heads": [5, 6]}),
    "both": (DUAL[1], r"channels=\[1\] and heads=\[0\]: both choose", {"heads": [0], "channels": [1]}),
}


@pytest.mark.parametrize("question", [hidden_attention, contributions], ids=lambda one: one.__name__)
@pytest.mark.parametrize("case", REFUSED_HEADS)
def test_heads_that_are_not_there_are_refused_before_anything_runs(
    prompt: Tensor, question: Callable[..., Any], case: str
) -> None:
    kind, message, arguments = REFUSED_HEADS[case]
    model = make(kind)
    with pytest.raises(SiteValueError, match=message):
        question(model, prompt, 1, **arguments)
    assert not len(model.last_run)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_heads_are_drawn_saved_and_read_back(tmp_path: Path, prompt: Tensor, suffix: str) -> None:
    found = hidden_attention(made(DUAL[1]), prompt, 1, heads=[1, 4], reduce=None)
    (heatmap,) = found.heatmaps()
    agree(heatmap.values, found.values.mean(-1), 1e-12)
    assert heatmap.title == "Hidden attention, layer 1\nmean of alpha, 2 heads"
    read = HiddenAttention.load(found.save(tmp_path / f"attention{suffix}"))
    assert read.heads == [1, 4]
    assert read.channels == [4, 5, 6, 7, 16, 17, 18, 19]
    assert torch.equal(read.values, found.values)


@pytest.mark.parametrize("question", [hidden_attention, contributions], ids=lambda one: one.__name__)
def test_inside_a_trace_both_are_refused_before_anything_runs(
    tiny: MambaTrace, prompt: Tensor, question: Callable[..., Any]
) -> None:
    words = f"{question.__name__} is a trace of its own, and this model is in one"
    with pytest.raises(RuntimeError, match=words), tiny.trace(prompt):
        question(tiny, prompt, 1)
    assert not len(tiny.last_run)


@pytest.mark.parametrize("question", [hidden_attention, contributions], ids=lambda one: one.__name__)
@pytest.mark.parametrize("layer", [None, [1, 2], "all", torch.tensor([1, 2])], ids=repr)
def test_both_are_of_one_layer(tiny: MambaTrace, prompt: Tensor, question: Callable[..., Any], layer: Any) -> None:
    with pytest.raises(LayerError, match=r"(?s)^layer=.*: this model has layers 0 to 2, named by one integer$"):
        question(tiny, prompt, layer)
