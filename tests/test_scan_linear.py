"""Linear layers: by a compiled loop, by oneDNN and by what PyTorch chooses, against float64; what asks for which."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from conftest import TINY, make_hf, multiplied_in, near
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mamba_trace import MambaTrace
from mamba_trace.modeling import repeated
from mamba_trace.scan import cpu
from mamba_trace.scan import linear as room
from mamba_trace.scan.linear import linear, linear_into
from mamba_trace.scan.noting import notes

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
pytestmark = needs_onednn

DOCS = Path(__file__).parent.parent / "tutorials" / "docs"
#: The shape of x, and the number of outputs.
SIZES = [((1, 7), 5), ((1, 1, 64), 96), ((3, 9, 24), 17), ((2, 3, 5, 8), 8), ((1, 300, 96), 40)]


@pytest.fixture(params=["onednn", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How whatever is multiplied is multiplied, whatever its size and the machine."""
    monkeypatch.setattr(room, "most_vectors", lambda: 1000 if request.param == "kernel" else 0)
    monkeypatch.setattr(room, "least_numbers", lambda: 0 if request.param == "onednn" else math.inf)
    way: str = request.param
    return way


@pytest.fixture
def multiplied(way: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what was multiplied in this `way`."""
    shapes: list[tuple[int, ...]] = []
    run = getattr(room, f"by_{way}")

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(x.shape))
        return run(x, weight, bias)

    monkeypatch.setattr(room, f"by_{way}", watched)
    return shapes


by_onednn_alone = pytest.mark.parametrize("way", ["onednn"], indirect=True)


def arguments(shape: tuple[int, ...], outputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, a weight and a bias."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (outputs, shape[-1]), (outputs,))
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("shape", "outputs"), SIZES, ids=str)
def test_each_number_and_each_gradient_is_that_of_float64(shape, outputs, biased, multiplied) -> None:
    given = [tensor.requires_grad_() for tensor in arguments(shape, outputs)[: 2 + biased]]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    with torch.no_grad():
        alone = linear(*given)
    found, expected = linear(*given), F.linear(*exact)
    assert multiplied == [shape, shape]
    assert torch.equal(alone, found), "the numbers do not depend on whether a gradient is wanted"
    near(found, expected, 1e-6)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, given, grad, create_graph=True)
    wanted = torch.autograd.grad(expected, exact, grad.double(), create_graph=True)
    for one, other in zip(gradients, wanted, strict=True):
        near(one, other, 1e-6)
    second = torch.autograd.grad(gradients[0].square().sum(), given[1])[0]
    wanted_second = torch.autograd.grad(wanted[0].square().sum(), exact[1])[0]
    near(second, wanted_second, 1e-6)


def test_a_gradient_that_nobody_wants_is_not_computed(multiplied) -> None:
    x, weight, bias = arguments((2, 4, 6), 5)
    for wanted in range(3):
        given = [tensor.clone().requires_grad_(place == wanted) for place, tensor in enumerate((x, weight, bias))]
        linear(*given).sum().backward()
        assert [tensor.grad is not None for tensor in given] == [place == wanted for place in range(3)]


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_what_no_gradient_needs_can_be_edited_before_the_backward_pass(wanted, multiplied) -> None:
    given = list(arguments((2, 4, 6), 5))
    given[wanted].requires_grad_()
    product = linear(*given)
    (expected,) = torch.autograd.grad(F.linear(*given).sum(), given[wanted])
    unneeded = {0: [0], 1: [1], 2: [0, 1]}[wanted]
    with torch.no_grad():
        for place in unneeded:
            given[place].mul_(3)
    assert torch.allclose(torch.autograd.grad(product.sum(), given[wanted])[0], expected)
    assert multiplied


@pytest.mark.parametrize(("wanted", "kept"), [([0], [1]), ([1], [0]), ([2], []), ([0, 1], [0, 1])], ids=str)
def test_what_no_gradient_needs_is_not_kept(wanted, kept, multiplied) -> None:
    given = [tensor.requires_grad_(place in wanted) for place, tensor in enumerate(arguments((2, 4, 6), 5))]
    places = [tensor.data_ptr() for tensor in given]
    seen: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(places.index(t.data_ptr())), lambda t: t):
        linear(*given)
    assert seen == kept
    assert multiplied


def test_gradients_may_come_in_a_batch(multiplied) -> None:
    given = [tensor.requires_grad_() for tensor in arguments((2, 4, 6), 5)]
    grads = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(linear(*given), given, grads, is_grads_batched=True)
    assert multiplied
    expected = torch.autograd.grad(F.linear(*given), given, grads, is_grads_batched=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8)], ids=str)
def test_the_product_can_be_edited_in_place(shape, multiplied) -> None:
    x, weight, bias = arguments(shape, 6)
    with torch.no_grad():
        assert linear(x, weight, bias)._base is None

    def gradient(multiply: Callable[..., Tensor]) -> Tensor:
        product = multiply(x, weight.requires_grad_(), bias)
        product[0] *= 3
        return torch.autograd.grad(product.square().sum(), weight)[0]

    near(gradient(linear), gradient(F.linear).double(), 1e-6)


@pytest.mark.parametrize(
    "laid_out",
    [
        lambda x: torch.cat((x, x + 1), -1)[..., : x.shape[-1]],
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:1].expand(3, -1, -1),
    ],
    ids=["columns", "transposed", "rows", "expanded"],
)
def test_x_may_lie_in_memory_in_any_way(laid_out: Callable[[Tensor], Tensor], multiplied) -> None:
    x, weight, bias = arguments((3, 5, 8), 6)
    x = laid_out(x)
    assert not x.is_contiguous()
    near(linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()), 1e-6)
    assert multiplied


@by_onednn_alone
def test_a_weight_may_be_transposed(multiplied) -> None:
    x, weight, bias = arguments((3, 5, 8), 6)
    transposed = weight.t().contiguous().t()
    near(linear(x, transposed, bias), F.linear(x.double(), weight.double(), bias.double()), 1e-6)
    assert multiplied


@by_onednn_alone
def test_the_gradient_of_x_is_multiplied_so_too(multiplied) -> None:
    x, weight, _ = arguments((3, 5, 8), 6)
    linear(x.requires_grad_(), weight).sum().backward()
    assert multiplied == [(3, 5, 8), (3, 5, 6)]


def in_a_graph(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), F.linear(x, weight, bias))


def counted(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    with FlopCounterMode(display=False) as operations:
        linear(x, weight, bias)
    assert operations.get_total_flops() == 2 * x.numel() * len(weight)


def rounded(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


@by_onednn_alone
def test_onednn_can_be_switched_off(multiplied) -> None:
    x, weight, bias = arguments((3, 5, 8), 6)
    torch.backends.mkldnn.enabled = False
    try:
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    finally:
        torch.backends.mkldnn.enabled = True
    assert not multiplied


def differentiated_forward(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    value, change = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (x,))
    torch.testing.assert_close(change, value - bias)


def for_each(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    each = torch.func.vmap(lambda x: linear(x, weight, bias))(x)
    torch.testing.assert_close(each, F.linear(x, weight, bias))


def of_another_kind(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    class Own(Tensor):
        pass

    assert isinstance(linear(x.as_subclass(Own), weight, bias), Own)  # type: ignore[arg-type]
    assert isinstance(linear(x, weight.as_subclass(Own), bias), Own)  # type: ignore[arg-type]


def wide(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    assert linear(x.double(), weight.double(), bias.double()).dtype == torch.float64


def without_memory(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    assert linear(x.to("meta"), weight.to("meta"), bias.to("meta")).is_meta


def of_nothing(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    assert linear(x[:, :0], weight, bias).shape == (len(x), 0, len(weight))


def of_a_vector(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    assert torch.equal(linear(x[0, 0], weight, bias), F.linear(x[0, 0], weight, bias))


def by_a_weight_with_gaps(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    weight = torch.cat((weight, weight), -1)[:, : x.shape[-1]]
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def that_does_not_fit(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    for wrong in ((x[..., :-1], weight, bias), (x, weight[:, :-1].contiguous(), bias), (x, weight, bias[:-1])):
        with pytest.raises(RuntimeError):
            linear(*wrong)


def with_a_bias_with_gaps(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    for gaps in (torch.stack((bias, bias + 1), -1)[:, 0], bias[:1].expand(len(weight))):
        assert torch.equal(linear(x, weight, gaps), F.linear(x, weight, gaps))


def of_another_layout(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    x = x[0]
    for one, other in ((x.to_sparse(), weight), (x.to_sparse_csr(), weight), (x, weight.to_sparse_csr())):
        torch.testing.assert_close(linear(one, other), F.linear(x, weight))
    for one, other in ((torch._neg_view(x), weight), (x, torch._neg_view(weight))):
        assert torch.equal(linear(one, other, bias), F.linear(-x, weight, bias))
    zero = torch._efficientzerotensor(bias.shape)
    assert torch.equal(linear(x, weight, zero), F.linear(x, weight))  # type: ignore[arg-type]
    assert linear(torch.nested.nested_tensor([x, x[1:]]), weight).is_nested


def in_a_mode_of_functions(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    class Zeros(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return out * 0 if function is F.linear else out

    with Zeros():
        assert not linear(x, weight, bias).any()


def in_a_graph_of_jit(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    traced = torch.jit.trace(linear, (x, weight, bias), check_trace=False)
    assert torch.equal(traced(2 * x, weight, bias), F.linear(2 * x, weight, bias))


def by_nothing(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    with pytest.raises(TypeError, match="must be Tensor"):
        linear(x, None)  # type: ignore[arg-type]


def by_a_vector(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    assert torch.equal(linear(x, weight[0]), F.linear(x, weight[0]))


@pytest.mark.parametrize(
    "asks",
    [
        in_a_graph,
        counted,
        rounded,
        differentiated_forward,
        for_each,
        of_another_kind,
        wide,
        without_memory,
        of_nothing,
        of_a_vector,
        by_a_weight_with_gaps,
        by_a_vector,
        with_a_bias_with_gaps,
        of_another_layout,
        in_a_mode_of_functions,
        in_a_graph_of_jit,
        by_nothing,
        that_does_not_fit,
    ],
)
def test_what_pytorch_multiplies_in_its_own_way(asks: Callable[..., None], multiplied) -> None:
    asks(*arguments((3, 5, 8), 6))
    assert not multiplied


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("by", ["onednn", "kernel", "pytorch"])
def test_a_product_may_be_written_into_memory_that_is_there(by, biased, monkeypatch) -> None:
    monkeypatch.setattr(room, "most_vectors", lambda: 1000 if by == "kernel" else 0)
    monkeypatch.setattr(room, "least_numbers", lambda: 0 if by == "onednn" else math.inf)
    given = arguments((5, 8), 6)[: 2 + biased]
    for space in (torch.full((2, 7, 6), 9.0), torch.full((2, 7, 9), 9.0)[..., :6]):
        out = space[1, 1:6]
        linear_into(out, *given)
        torch.testing.assert_close(out, F.linear(*given))
        assert float(space.sum() - out.sum()) == pytest.approx(9.0 * (space.numel() - 30))


def test_a_small_weight_is_not_worth_a_call_of_onednn(way, multiplied, monkeypatch) -> None:
    x, weight, bias = arguments((3, 5, 8), 6)
    monkeypatch.setattr(room, "least_numbers", lambda: weight.numel() + 1)
    linear(x, weight, bias)
    assert bool(multiplied) == (way == "kernel")
    monkeypatch.setattr(room, "least_numbers", lambda: weight.numel())
    linear(x, weight, bias)
    assert multiplied


@pytest.mark.parametrize("way", ["kernel"], indirect=True)
def test_a_weight_of_fewer_rows_than_a_group_is_pytorchs(multiplied) -> None:
    assert cpu.kernels_in(".few_vectors").ROWS == room.ROWS
    for outputs in range(1, room.ROWS + 2):
        linear(*arguments((3, 8), outputs))
    assert len(multiplied) == 2


@pytest.mark.parametrize("way", ["kernel"], indirect=True)
def test_only_so_many_vectors_are_multiplied_by_the_compiled_loop(multiplied, monkeypatch) -> None:
    monkeypatch.setattr(room, "most_vectors", lambda: 4)
    for rows in (1, 3, 4, 5):
        linear(*arguments((rows, 8), 6))
        linear(*arguments((1, rows, 8), 6))
    linear(*arguments((2, 2, 8), 6))
    assert multiplied == [(1, 8), (1, 1, 8), (3, 8), (1, 3, 8), (4, 8), (1, 4, 8), (2, 2, 8)]


@pytest.mark.skipif(not cpu.has_blas(), reason="PyTorch was built without MKL")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("rows", "inner", "outputs"), [(1, 1, 1), (3, 8, 1), (9, 5, 17), (70, 24, 80), (130, 700, 33)])
def test_the_blas_of_pytorch_computes_the_numbers_of_pytorch(rows, inner, outputs, biased) -> None:
    x, weight, bias = arguments((rows, inner + 7), outputs)
    bias = bias if biased else None
    strided = x[:, :inner]
    for each in (strided, strided[None], strided.contiguous()[None], x[:1, :inner].expand(rows, -1)):
        dense = weight[:, :inner].contiguous()
        assert torch.equal(room.by_blas(each, dense, bias), F.linear(each, dense, bias))


@pytest.mark.parametrize(("told", "ours"), [("ieee", True), ("none", True), ("bf16", False), ("tf32", False)])
def test_who_lets_pytorch_round_has_pytorch_multiply(told, ours, multiplied) -> None:
    given = arguments((3, 5, 8), 6)
    with multiplied_in(told):
        found, expected = linear(*given), F.linear(*given)
    assert bool(multiplied) == ours
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 23, 128])
def test_what_the_compiled_loop_computes_of_a_vector_depends_on_that_alone(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    for inner, outputs in ((1, 4), (15, 5), (16, 6), (48, 130), (100, 7), (1024, 9)):
        sizes = ((rows, inner), (outputs, inner), (outputs,))
        x, weight, bias = (torch.randn(size, generator=generator) for size in sizes)
        found = room.by_kernel(x, weight, bias)
        near(found, F.linear(x.double(), weight.double(), bias.double()), 1e-6)
        wide = torch.cat((x, x), 1)[:, :inner]
        for one in range(rows):
            assert torch.equal(room.by_kernel(wide[one : one + 1], weight, bias)[0], found[one])


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_its_block_is_the_one_that_the_layout_makes(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = arguments((5, 8), 6)
    blocks = []

    def listener(kernel: Any, block: Any, pieces: int, given: Any) -> None:
        blocks.append((block[:], kernel.layout.pack(pieces, given)))

    monkeypatch.setattr(notes, "listener", listener)
    room.by_kernel(torch.cat((x, x), 1)[:, :8], weight, bias if biased else None)
    ((filled, packed),) = blocks
    assert filled == packed


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_its_numbers_do_not_depend_on_the_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = arguments((6, 700), 1003)
    expected = room.by_kernel(x, weight, bias)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(room.by_kernel(x, weight, bias), expected)


def test_a_graph_of_any_number_of_rows_is_of_what_pytorch_chooses(multiplied) -> None:
    x, weight, bias = arguments((300, 8), 6)
    graph = make_fx(linear, tracing_mode="symbolic")(x, weight, bias)
    assert not multiplied
    torch.testing.assert_close(graph(x[:7], weight, bias), F.linear(x[:7], weight, bias))


def test_what_hides_the_weight_of_a_layer_is_multiplied(monkeypatch) -> None:
    class Doubled(nn.Linear):
        @property
        def weight(self) -> Tensor:  # type: ignore[override]
            return 2 * self._parameters["weight"]  # type: ignore[operator]

    model, tokens = MambaTrace.demo(), torch.arange(9)[None]
    in_proj: Any = model.layers[0].ssm.in_proj._module
    with torch.no_grad():
        hidden = torch.rand(1, 9, in_proj.in_features)
        expected = F.linear(hidden, 2 * in_proj.weight)
        before = model._module(tokens).logits
        monkeypatch.setattr(in_proj, "__class__", Doubled)
        torch.testing.assert_close(in_proj(hidden), expected)
        assert not torch.allclose(model._module(tokens).logits, before)


def test_the_documentation_says_what_is_multiplied_by_what() -> None:
    told = (DOCS / "kernels.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"a weight of {room.MANY:,} numbers or more" in told
    assert f"up to {room.FEW} vectors" in told
    assert f"up to {room.MOST} tokens" in told


@pytest.mark.parametrize(
    ("told", "capability", "vectors", "numbers"),
    [
        ("vendor_id\t: AuthenticAMD\nmodel", "AVX512", 1, room.MANY),
        ("vendor_id\t: GenuineIntel\n", "AVX512", room.FEW, math.inf),
        ("vendor_id\t: GenuineIntel\n", "AVX2", 1, math.inf),
        ("", "DEFAULT", 1, math.inf),
    ],
    ids=["amd", "intel", "short registers", "unknown"],
)
def test_what_is_fastest_depends_on_the_processor(told, capability, vectors, numbers, monkeypatch, tmp_path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(told)
    monkeypatch.setattr(room, "Path", lambda path: file)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (room.most_vectors.__wrapped__(), room.least_numbers.__wrapped__()) == (vectors, numbers)
    monkeypatch.setattr(room, "least_numbers", lambda: numbers)
    monkeypatch.setattr(room, "most_vectors", lambda: vectors)
    for found, most in ((True, room.MOST if numbers == math.inf else vectors), (False, vectors)):
        monkeypatch.setattr(cpu, "has_blas", lambda found=found: found)
        assert room.most_noted.__wrapped__() == most
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert room.least_numbers.__wrapped__() == math.inf


def test_elsewhere_the_platform_says_who_made_the_processor(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(room, "Path", lambda path: tmp_path / "there is none")
    monkeypatch.setattr(room.platform, "processor", lambda: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD")
    assert room.made_by_amd()


# -- in a model ----------------------------------------------------------------------------------------------


def products(model: MambaTrace, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model._module(tokens).logits
    return logits


@pytest.mark.parametrize("model_type", TINY)
def test_every_linear_layer_of_a_model_is_multiplied_so(model_type, tokens, multiplied, monkeypatch) -> None:
    model = MambaTrace(make_hf(model_type=model_type))
    count = sum(type(module) is nn.Linear for module in model._module.modules())
    logits = products(model, tokens)
    assert len(multiplied) == count
    with torch.no_grad(), model.trace(tokens):
        inner = model.layers[1].ssm.in_proj.output.save()
        traced = model.lm_head.output.save()
    assert len(multiplied) == 2 * count, "those that somebody looks into are multiplied in the same way"
    assert torch.equal(traced, logits)
    weight = model._module.backbone.layers[1].mixer.in_proj.weight
    assert inner.shape[-1] == len(weight)
    monkeypatch.setattr(room, "least_numbers", lambda: math.inf)
    monkeypatch.setattr(room, "most_vectors", lambda: 0)
    monkeypatch.setattr(repeated, "most_noted", lambda: 0)
    expected = products(model, tokens)
    assert len(multiplied) == 2 * count
    near(logits, expected.double(), 2e-6)


def test_a_layer_whose_source_is_looked_into_runs_as_it_is_written(tiny, tokens, multiplied) -> None:
    products(tiny, tokens)
    count = len(multiplied)
    multiplied.clear()
    with torch.no_grad(), tiny.trace(tokens):
        x = tiny.layers[0].ssm.in_proj.input.save()
        product = tiny.layers[0].ssm.in_proj.source.F_linear_0.output.save()
    assert len(multiplied) == count - 1
    assert torch.equal(product, F.linear(x, tiny._module.backbone.layers[0].mixer.in_proj.weight))


def test_a_layer_that_replaces_another_is_multiplied_so_too(tiny, tokens, multiplied) -> None:
    tiny._module.lm_head = nn.Linear(12, 31)
    with torch.no_grad(), tiny.trace(tokens):
        logits = tiny.lm_head.output.save()
    shapes = list(multiplied)
    multiplied.clear()
    assert torch.equal(products(tiny, tokens), logits)
    assert multiplied == shapes


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "file"]
)
def test_a_copy_of_a_model_has_the_same_numbers(copied, tiny, tokens, multiplied) -> None:
    again = copied(tiny)
    with torch.no_grad(), tiny.trace(tokens):
        logits = tiny.lm_head.output.save()
    with torch.no_grad(), again.trace(tokens):
        same = again.lm_head.output.save()
    assert torch.equal(same, logits)
    half = len(multiplied) // 2
    assert multiplied[:half] == multiplied[half:] != []


def test_accelerate_may_put_its_hooks_around_it(tiny, tokens, multiplied) -> None:
    expected = products(tiny, tokens)
    shapes = list(multiplied)
    multiplied.clear()
    add_hook_to_module(tiny._module.lm_head, AlignDevicesHook(execution_device="cpu"))
    with torch.no_grad(), tiny.trace(tokens):
        logits = tiny.lm_head.output.save()
    assert torch.equal(logits, expected)
    assert multiplied == shapes
    remove_hook_from_module(tiny._module.lm_head)
    assert torch.equal(products(tiny, tokens), expected)


def test_a_forward_of_the_user_is_left_alone(tiny, tokens, multiplied) -> None:
    module = make_hf()
    head = module.lm_head
    head.forward = lambda x: torch.zeros(*x.shape[:-1], 31)
    wrapped = MambaTrace(module)
    assert not products(wrapped, tokens).any()
    with torch.no_grad(), wrapped.trace(tokens):
        logits = wrapped.lm_head.output.save()
    assert not logits.any()
    assert products(tiny, tokens).any()
