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
from conftest import LENGTH, N_LAYERS, SIZES, ModuleFactory, agree, layers_that_ran
from torch import Tensor, nn

from mamba_trace import MambaTrace
from mamba_trace.cli import PROMPT
from mamba_trace.errors import ArgumentError, LayerError, PositionError, PromptError, SiteValueError
from mamba_trace.flow import decay_groups
from mamba_trace.hidden_attention import Contributions, HiddenAttention, contributions, hidden_attention
from mamba_trace.results import Result
from mamba_trace.scan import pairs as scan_pairs
from mamba_trace.scan import selective_scan
from mamba_trace.scan.pairs import ScanPairs

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
    length = len(A_bar)
    alpha = torch.zeros(length, length, A_bar.shape[1], dtype=torch.float64)
    for j in range(length):
        carried = B_bar[j]  # [E,N]
        for i in range(j, length):
            carried = carried if i == j else A_bar[i] * carried
            alpha[i, j] = (C[i] * carried).sum(-1)
    return alpha


def site_of(values: dict[str, Tensor], layer: int, site: str) -> Tensor:
    return values[f"blocks.{layer}.hook_{site}"][0].detach()


@pytest.fixture(scope="module")
def prompt(tokens: Tensor) -> Tensor:
    """Token ids [1,9]."""
    return tokens[1:2]


@pytest.fixture(scope="module")
def values(exact_once: MambaTrace, prompt: Tensor) -> dict[str, Tensor]:
    return values_of(exact_once, prompt)


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


# -- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_every_pair_in_every_channel_is_the_product_of_the_matrices_between(
    exact_once: MambaTrace, prompt: Tensor, values: dict[str, Tensor], layer: int
) -> None:
    alpha = attention_of(values, layer)
    agree(hidden_attention(exact_once, prompt, layer, reduce=None).values, alpha, 1e-11)
    mean = hidden_attention(exact_once, prompt, layer).values
    agree(mean, alpha.mean(-1), 1e-11)
    assert not mean.triu(1).any()
    agree(hidden_attention(exact_once, prompt, layer, reduce="abs_mean").values, alpha.abs().mean(-1), 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_what_every_token_reads_adds_up_to_y(
    tiny_hf: ModuleFactory, prompt: Tensor, layer: int, dtype: torch.dtype, tolerance: float
) -> None:
    model = MambaTrace(tiny_hf(dtype=dtype))
    with torch.no_grad(), model.trace(prompt):
        x = model.layers[layer].ssm.ssm_input.output[0].save()  # [L,E]
        y = model.layers[layer].ssm.y.output[0].save()
    alpha = hidden_attention(model, prompt, layer, reduce=None).values
    assert alpha.dtype == dtype
    agree((alpha * x).sum(1), y, tolerance)


@pytest.mark.parametrize("reduce", ["mean", "abs_mean", None], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(-1, None), ([5, 1, 7], slice(2, 6)), (None, 3), ([2, 3], [3, 2]), (slice(4, None), [0, 1]), (0, -1)],
    ids=["last row", "some of both", "one column", "a square", "all later", "none earlier"],
)
def test_chosen_rows_and_columns_are_those_of_the_whole(
    exact_once: MambaTrace, prompt: Tensor, values: dict[str, Tensor], rows: Any, columns: Any, reduce: str | None
) -> None:
    found = hidden_attention(exact_once, prompt, 1, rows=rows, columns=columns, reduce=reduce)
    whole = attention_of(values, 1)[found.rows][:, found.columns]
    expected = {"mean": whole.mean(-1), "abs_mean": whole.abs().mean(-1), None: whole}[reduce]
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


def test_every_backend_gives_the_same_matrix_and_contributions(
    tiny_hf: ModuleFactory, prompt: Tensor, each_backend: str
) -> None:
    """In float32, whose rounding (6e-8) grows to about 1e-6 over the layers, steps and products of a run."""
    model, layer = MambaTrace(tiny_hf(), kernels=each_backend), 2
    values = values_of(model, prompt)
    alpha = attention_of(values, layer)
    agree(hidden_attention(model, prompt, layer, reduce=None).values, alpha.float(), 1e-5)
    agree(hidden_attention(model, prompt, layer).values, alpha.mean(-1).float(), 1e-5)
    parts = alpha * site_of(values, layer, "ssm_input")  # [L,L,E]
    agree(contributions(model, prompt, layer).values, parts.norm(dim=-1).float(), 1e-5)
    direction = torch.randn(D, generator=torch.Generator().manual_seed(4))
    gate = nn.functional.silu(site_of(values, layer, "skip"))[:, None]  # [L,1,E]
    out_proj = model._module.state_dict()[f"backbone.layers.{layer}.mixer.out_proj.weight"].double()
    written = (parts * gate) @ out_proj.T @ direction.double()
    agree(contributions(model, prompt, layer, residual_direction=direction).values, written.float(), 1e-5)


def test_in_half_precision_the_matrix_is_that_of_the_run_in_float32(tiny_hf: ModuleFactory, prompt: Tensor) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.bfloat16))
    with torch.no_grad(), model.trace(prompt):
        x = model.layers[0].ssm.ssm_input.output[0].save()
        y = model.layers[0].ssm.y.output[0].save()
    alpha = hidden_attention(model, prompt, 0, reduce=None).values
    assert alpha.dtype == torch.float32
    agree((alpha * x.float()).sum(1), y, 1e-5)


def test_nothing_after_the_layer_is_computed(tiny: MambaTrace, prompt: Tensor) -> None:
    hidden_attention(tiny, prompt, 1)
    assert layers_that_ran(tiny)[-1] == 1


# -- contributions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"use_bias": True}], ids=["plain", "with biases"])
def test_contributions_are_alpha_x_by_norm_or_along_a_direction(
    tiny_hf: ModuleFactory, prompt: Tensor, changes: dict[str, Any]
) -> None:
    model = MambaTrace(tiny_hf(dtype=torch.float64, **changes))
    values = values_of(model, prompt)
    parts = attention_of(values, 1) * site_of(values, 1, "ssm_input")  # [L,L,E]
    generator = torch.Generator().manual_seed(4)
    in_y = torch.randn(E, generator=generator, dtype=torch.float64)
    in_residual = torch.randn(D, generator=generator, dtype=torch.float64)
    agree(contributions(model, prompt, 1).values, parts.norm(dim=-1), 1e-11)
    agree(contributions(model, prompt, 1, y_direction=in_y.float()).values, parts @ in_y.float().double(), 1e-11)
    gate = nn.functional.silu(site_of(values, 1, "skip"))[:, None]  # [L,1,E]
    out_proj = model._module.state_dict()["backbone.layers.1.mixer.out_proj.weight"]
    written = (parts * gate) @ out_proj.T  # [L,L,D]
    found = contributions(model, prompt, 1, residual_direction=in_residual).values
    agree(found, written @ in_residual, 1e-11)
    some = contributions(
        model, prompt, 1, residual_direction=in_residual, channels=[1, 8], rows=[4, 6], columns=slice(5)
    )
    only = torch.zeros(E, dtype=torch.float64)
    only[[1, 8]] = 1
    expected = ((parts * gate * only) @ out_proj.T @ in_residual)[[4, 6], :5]
    agree(some.values, expected, 1e-11)


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


def test_out_proj_may_be_adapted_or_offloaded(tiny_hf: ModuleFactory, prompt: Tensor) -> None:
    direction = torch.randn(D, generator=torch.Generator().manual_seed(4))
    plain, offloaded = MambaTrace(tiny_hf()), MambaTrace(tiny_hf())
    expected = contributions(plain, prompt, 1, residual_direction=direction).values
    for block in offloaded._module.backbone.layers:
        attach_align_device_hook(block, execution_device=torch.device("cpu"), offload=True)
    assert offloaded.layers[1].ssm.out_proj._module.weight.is_meta
    agree(contributions(offloaded, prompt, 1, residual_direction=direction).values, expected)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = tiny_hf()
    module.backbone.layers[1].mixer.out_proj.__class__ = Doubled
    found = contributions(MambaTrace(module), prompt, 1, residual_direction=direction).values
    agree(found, 2 * expected)


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
