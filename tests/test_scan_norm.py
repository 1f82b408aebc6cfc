"""The root mean square norm: compiled and not, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import near
from torch import Tensor

from mamba_trace.scan import cpu, norm
from mamba_trace.scan.norm import rms_norm

EPSILON = 1e-3
#: The shape of x and the size of a group: one row, cut vectors, several groups, more rows than pieces.
SIZES = [((7,), 7), ((2, 5, 7), 7), ((2, 9, 24), 8), ((3, 1, 1000), 1000), ((1, 300, 96), 96)]


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x, each row of which is scaled by another power of ten, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 10.0 ** torch.randint(-3, 4, (*shape[:-1], 1), generator=generator)
    return x.to(dtype), torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(dtype)


def by_formula(x: Tensor, weight: Tensor, size: int) -> Tensor:
    groups = x.double().unflatten(-1, (-1, size))
    return weight.double() * (groups / (groups.square().mean(-1, keepdim=True) + EPSILON).sqrt()).flatten(-2)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what the compiled norm was given."""
    shapes: list[tuple[int, ...]] = []
    run = cpu.rms_norm

    def watched(x: Tensor, *others: object) -> Tensor:
        shapes.append(tuple(x.shape))
        return run(x, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu, "rms_norm", watched)
    return shapes


@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
def test_each_number_of_the_compiled_norm_is_that_of_the_formula(shape, size, compiled) -> None:
    x, weight = arguments(shape)
    expected = by_formula(x, weight, size)
    found = rms_norm(x, weight, EPSILON, size)
    assert compiled == [shape]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_rows_with_gaps_between_and_transposed_ones_are_read_where_they_are(compiled) -> None:
    x, weight = arguments((2, 6, 12))
    wide = torch.cat((x, x + 1, x + 2), dim=-1)
    layouts = [wide[..., :12], x.transpose(0, 1).contiguous().transpose(0, 1), x.transpose(1, 2).contiguous().mT]
    for laid_out in layouts:
        assert torch.equal(laid_out, x)
        assert not laid_out.is_contiguous()
        assert torch.equal(rms_norm(laid_out, weight, EPSILON, 4), rms_norm(x, weight, EPSILON, 4))
    assert torch.equal(rms_norm(x, wide[0, 0, ::3], EPSILON), rms_norm(x, wide[0, 0, ::3].clone(), EPSILON))
    assert len(compiled) == 8


def test_several_threads_give_what_one_gives(compiled) -> None:
    x, weight = arguments((1, 300, 96))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(rms_norm(x, weight, EPSILON))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert len(compiled) == 2


@pytest.mark.parametrize("wanting", ["x", "weight"])
def test_gradients_are_pytorch_s_and_the_value_is_the_same(wanting, compiled) -> None:
    x, weight = (tensor.double() for tensor in arguments((2, 5, 12)))
    given = {"x": x.float() / x.abs().max(), "weight": weight.float()}
    given[wanting].requires_grad_()
    value = rms_norm(**given, epsilon=EPSILON, group_size=6)
    value.square().sum().backward()
    wide = {name: tensor.detach().double() for name, tensor in given.items()}
    wide[wanting].requires_grad_()
    by_formula(wide["x"], wide["weight"], 6).square().sum().backward()
    near(given[wanting].grad, wide[wanting].grad, 1e-5, f"the gradient of {wanting}")
    assert len(compiled) == 1
    with torch.no_grad():
        assert torch.equal(rms_norm(**given, epsilon=EPSILON, group_size=6), value)


def test_forward_mode_and_vmap_see_pytorch_s_operations(compiled) -> None:
    x, weight = arguments((3, 5, 12))
    moved = torch.func.vmap(lambda row: rms_norm(row, weight, EPSILON))(x)
    near(moved, by_formula(x, weight, 12), 1e-6, "under vmap")
    _, tangent = torch.func.jvp(lambda w: rms_norm(x, w, EPSILON), (weight,), (torch.ones_like(weight),))
    near(tangent, by_formula(x, torch.ones_like(weight), 12), 1e-6, "the tangent")
    assert not compiled


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_round_where_pytorch_rounds(dtype, compiled) -> None:
    x, weight = arguments((2, 5, 12), dtype)
    found = rms_norm(x, weight, EPSILON, 4)
    if dtype == torch.float64:
        torch.testing.assert_close(found, by_formula(x, weight, 4), rtol=1e-14, atol=0)
    else:  # rounded before it is multiplied, and again after
        assert torch.equal(found, weight * by_formula(x, torch.ones(12), 4).float().to(dtype))
    # A gate is multiplied with in float32: what it gives is rounded to the dtype of the values all the same.
    if dtype == torch.bfloat16:
        assert torch.equal(rms_norm(x.float(), weight, EPSILON, 4, dtype), found)
    assert found.dtype == dtype
    assert not compiled


def test_no_kernel_sees_an_empty_tensor_or_one_without_memory_of_its_own(compiled, monkeypatch) -> None:
    _, weight = arguments((2, 5, 12))
    assert rms_norm(torch.empty(2, 0, 12), weight, EPSILON).shape == (2, 0, 12)
    assert rms_norm(torch.empty(2, 5, 12, device="meta"), weight.to("meta"), EPSILON).is_meta
    monkeypatch.setattr(norm.cpu, "unavailable", lambda: "it needs numba")
    rms_norm(*arguments((2, 5, 12)), EPSILON)
    assert not compiled
