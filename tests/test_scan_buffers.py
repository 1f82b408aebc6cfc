"""What kernels are handed: under every default of PyTorch's the right numbers, and nothing that does not fit.

A buffer that is made without a dtype or a device has the process's default ones. The expected numbers are
`reference`'s in float64, computed under the ordinary defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_stand_ins
import numba
import pytest
import torch
from conftest import ModuleFactory, agree
from numba.core.errors import TypingError
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import BackendError
from mamba_trace.flow import channel_mask, decay_groups, knockout
from mamba_trace.hidden_attention import hidden_attention
from mamba_trace.lenses import state_lens
from mamba_trace.patching import PatchGrid, attribution_grid, logit_diff, patch_grid
from mamba_trace.scan import cpu, cuda, reference
from mamba_trace.scan.buffers import BlockLayout, Buffer
from mamba_trace.scan.cpu import compiled, conv, explicit, selective, team
from mamba_trace.scan.cpu.compiled import arguments_at
from mamba_trace.scan.cuda import installed as installed

triton = pytest.importorskip("mamba_trace.scan.triton")
pytest.importorskip("triton")
from mamba_trace.scan.triton import launch  # noqa: E402

BACKENDS = {"reference": reference, "cpu": cpu, "cuda": cuda, "triton": triton}
SHAPES = {
    "x": "BLE", "delta": "BLE", "A": "EN", "B": "BLN", "C": "BLN", "h_start": "BEN", "D": "E", "skip": "BLE",
    "A_bar": "BLEN", "B_bar": "BLEN", "weight": "EK", "bias": "E", "before": "BEK",
}  # fmt: skip
FUNCTIONS = {
    "selective_scan": "x delta A B C h_start",
    "selective_states": "x delta A B C h_start",
    "gated_scan": "x delta A B C D skip h_start",
    "explicit_scan": "A_bar B_bar x C h_start",
    "explicit_states": "A_bar B_bar x C h_start",
    "causal_conv": "x weight bias before",
}
DEFAULTS = ["float32", "float64", "bfloat16", "meta"]
SIZES = {"B": 1, "L": 4, "E": 5, "N": 3, "K": 4}


def set_default(default: str) -> Iterator[None]:
    """Set the default device, or the default dtype, until the next step."""
    if default == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, default))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def arguments(names: str) -> list[Tensor]:
    """Arguments by name, in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, axes in SHAPES.items():
        value = torch.randn([SIZES[axis] for axis in axes], generator=generator)
        drawn[name] = {"A": -value.exp(), "delta": value.exp() / 4, "A_bar": value.sigmoid()}.get(name, value)
    return [drawn[name] for name in names.split()]


def results(run: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Its results without a gradient, with one, and the gradient of each argument."""
    with torch.no_grad():
        plain = run(*inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    found = run(*leaves)
    plain, found = ((one,) if isinstance(one, Tensor) else one for one in (plain, found))
    grads = torch.autograd.grad(sum(one.square().sum() for one in found), leaves)
    return [one.detach() for one in (*plain, *found, *grads)]


@pytest.mark.parametrize(
    ("backend", "function"),
    [(name, f) for name, module in BACKENDS.items() for f in FUNCTIONS if hasattr(module, f)],
)
def test_a_scan_is_the_same_under_every_default(backend: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    inputs, run = arguments(FUNCTIONS[function]), getattr(BACKENDS[backend], function)
    expected = results(getattr(reference, function), [tensor.double() for tensor in inputs])
    for default in DEFAULTS if backend != "triton" else DEFAULTS[2:]:  # interpreted, and so slow
        for _ in set_default(default):
            actual = results(run, inputs)
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == torch.float32
            agree(one, other.float())


@pytest.mark.parametrize("default", DEFAULTS)
def test_the_probe_of_the_cuda_kernels_is_in_float32(default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = (cuda.scan_failure.__wrapped__, cuda.conv_failure.__wrapped__)
    cuda_stand_ins.install(monkeypatch)
    for _ in set_default(default):
        assert [failure(torch.device("cpu")) for failure in failures] == [None, None]
        assert _waves_dtype() == torch.float32


def _waves_dtype() -> torch.dtype:
    return installed.waves(2, 3, device=torch.device("cpu")).dtype


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_a_model_is_the_same_under_every_default(tiny_hf: ModuleFactory, tokens: Tensor, kernels: str) -> None:
    plain, model = tiny_hf(), MambaTrace(tiny_hf(), kernels=kernels)
    generation = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    generated = plain.generate(tokens, **generation)
    with torch.no_grad():
        expected = plain(tokens).logits
    for default in DEFAULTS:
        for _ in set_default(default):
            with torch.no_grad():
                untraced = model._module(tokens).logits
            with model.trace(tokens):
                model.layers[1].ssm.A_bar.output.save()
                h = model.layers[1].ssm.h[2].output.save()
                logits = model.lm_head.output.save()
            gradient = torch.autograd.grad(logits.square().sum(), h)[0]
            if default != "meta":  # Hugging Face's generate makes tensors of its own there
                with model.generate(tokens, **generation) as tracer:
                    assert torch.equal(tracer.result.save(), generated)
        assert gradient.abs().max() > 0
        agree(untraced, expected)
        agree(logits.detach(), expected)


def analyses(model: MambaTrace, folder: Path) -> list[Tensor]:
    """Numbers of the analyses that make tensors of their own."""
    prompt, source = (torch.tensor([ids], device="cpu") for ids in ([1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6]))
    metric = logit_diff(model, 3, 4)
    grid = patch_grid(model, prompt, source, "h", {"a": metric, "b": metric}, keep=folder / "kept")
    again = patch_grid(model, prompt, source, "h", {"a": metric, "b": metric}, keep=folder / "kept")
    grid["a"].save(folder / "grid.json")
    estimate = attribution_grid(model, prompt, source, "h", metric)
    attention = hidden_attention(model, prompt, 1, channels=[0, 3], reduce=None)
    lens = state_lens(model, prompt, token=5)
    with torch.no_grad(), model.trace(prompt):
        knockout(model, source_positions=[1], target_positions=[4, 5], layers=[1], channels="slow", conv=True)
        logits = model.lm_head.output.save()
    values = [
        grid["a"].values,
        again["b"].values,
        PatchGrid.load(folder / "grid.json").values,
        estimate.values,
    ]
    values += [attention.values, lens.logits, logits]
    values += [channel_mask(model, 1, [2]).float(), decay_groups(model, 1)["fast"].float()]
    return [*values, model.tokens_to_residual_directions([1, 2]).detach()]


@pytest.mark.parametrize("default", DEFAULTS[1:])
def test_analyses_are_the_same_under_every_default(tiny: MambaTrace, default: str, tmp_path: Path) -> None:
    expected = analyses(tiny, tmp_path / "before")
    for _ in set_default(default):
        actual = analyses(tiny, tmp_path / "after")
    for one, other in zip(actual, expected, strict=True):
        agree(one, other)


# -- what does not fit ---------------------------------------------------------------------------------------

KERNELS = {
    f"{module.__name__.rsplit('.', 1)[-1]} {name}": getattr(module, name)
    for module, name in (
        (selective, "forward"),
        (selective, "forward_runs"),
        (selective, "backward"),
        (explicit, "forward"),
        (explicit, "backward"),
        (conv, "forward"),
        (conv, "forward_runs"),
    )
}
AXES = {"batch": 2, "length": 3, "width": 4, "n_state": 2, "taps": 3, "past": 2, "pieces": 1, "runs": 2}


def fitting(layout: BlockLayout) -> dict[str, Any]:
    """What a kernel of the CPU takes: every number, and zeros of the right shapes."""
    given = {name: AXES.get(name, 1) for name in layout.given}
    for name, buffer in layout.buffers.items():
        given[name] = torch.zeros([AXES[axis] for axis in buffer.names])
    return given


def not_fitting(tensor: Tensor, dense: int | None) -> list[Tensor | None]:
    """The tensor in ways that a kernel must refuse."""
    shape = tensor.shape
    wrong = [None, tensor.double(), tensor.bfloat16(), tensor.int(), tensor.to("meta"), tensor[None]]
    wrong.append(tensor.new_zeros(*shape[:-1], shape[-1] - 1))
    wrong.append(tensor.new_zeros(*shape[:-1], 2 * shape[-1])[..., ::2])
    if len(shape) > 1 and dense is None:
        wrong.append(tensor.new_zeros(shape[::-1]).permute(*reversed(range(len(shape)))))
    return wrong


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_of_the_cpu_refuses_what_does_not_fit(name: str) -> None:
    kernel = KERNELS[name]
    good = fitting(kernel.layout)
    team.run(kernel, 1, **good)
    for array, buffer in kernel.layout.buffers.items():
        for wrong in not_fitting(good[array], buffer.dense):
            with pytest.raises(BackendError, match=r"a compiled kernel takes|among the inputs of a scan"):
                team.run(kernel, 1, **{**good, array: wrong})
    for missing in good:
        with pytest.raises(BackendError, match="takes"):
            team.run(kernel, 1, **{name: value for name, value in good.items() if name != missing})
    with pytest.raises(BackendError, match="takes"):
        team.run(kernel, 1, **good, another=1)


def test_an_array_that_a_kernel_does_not_look_at_may_be_missing() -> None:
    good = fitting(selective.FORWARD)
    missing = dict.fromkeys(("skip", "D", "states"))
    team.run(selective.forward, 1, **{**good, **missing, "gated": 0, "keep": 0})


def test_the_places_of_a_layout_do_not_overlap() -> None:
    layout = BlockLayout("scale", x=Buffer("length width", dense=1), out=Buffer("length width"))
    assert layout.places == {
        "next": 0, "pieces": 1, "scale": 2, "length": 3, "width": 4, "x": 5, "out": 7,
    }  # fmt: skip
    assert layout.length == 8
    x, out = torch.rand(5, 4)[:, :3], torch.empty(5, 3)
    assert list(layout.pack(7, {"scale": 2, "x": x, "out": out})) == [
        *(0, 7, 2, 5, 3),
        *(x.data_ptr(), 4),
        out.data_ptr(),
    ]
    for kernel in KERNELS.values():
        assert len(kernel.layout.pack(1, fitting(kernel.layout))) == kernel.layout.length


def test_an_axis_of_an_array_that_is_not_looked_at_shifts_no_other_number() -> None:
    layout = BlockLayout("with_a", a=Buffer("rows columns", when="with_a"), b=Buffer("rows"))
    b = torch.empty(3)
    assert list(layout.pack(1, {"with_a": 0, "a": None, "b": b})) == [0, 1, 0, 3, 0, 0, b.data_ptr()]


SUM = BlockLayout("scale", x=Buffer("rows columns", dense=1), out=Buffer("rows"))


def add_up(data: Any) -> None:
    """out[r] = scale * sum over c of x[r, c]."""
    p = arguments_at(data)
    for r in range(p.rows):
        p.out[r] = 0
        for c in range(p.columns):
            p.out[r] += p.scale * p.x[r, c]


def take_one(data: Any) -> None:
    p = arguments_at(data)
    for _ in range(p.one):
        p.out[0] = p.x[2, 1, 3]


def unknown_name(data: Any) -> None:
    p = arguments_at(data)
    p.out[0] = p.factor


def wrong_rank(data: Any) -> None:
    p = arguments_at(data)
    p.out[0, 0] = p.x[0, 0]


def test_a_kernel_finds_its_arguments_by_name() -> None:
    x, out = torch.rand(3, 5)[:, 1:4], torch.empty(3)
    team.run(compiled.Kernel(add_up, SUM), 1, scale=2, x=x, out=out)
    agree(out, 2 * x.sum(1))


@pytest.mark.parametrize(("function", "reason"), [(unknown_name, "factor"), (wrong_rank, "setitem")])
def test_a_name_or_a_rank_that_a_layout_lacks_does_not_compile(function: Any, reason: str) -> None:
    with pytest.raises(TypingError, match=reason):
        _ = compiled.Kernel(function, SUM).compiled


def test_compiled_code_of_other_files_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel is made of several files, and Numba asks about one: all of them are part of the key."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    hits, own_sources = [], compiled.SOURCES
    for sources in ("one release", "one release", "another"):
        monkeypatch.setattr(compiled, "SOURCES", sources)
        hits.append(compiled.Kernel(add_up, SUM).compiled.cache_hits)
    assert hits == [0, 1, 0]
    own = Path.read_bytes
    for changed in ("selective.py", "vectors.py", "steps.py"):
        monkeypatch.setattr(Path, "read_bytes", lambda file, changed=changed: own(file) + b"#" * (file.name == changed))
        assert compiled._sources() != own_sources


def test_compiled_code_for_other_places_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Numba keeps compiled code as long as the kernel's own file stays: the places are part of the key."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    x, out = torch.rand(3, 5), torch.empty(3)
    hits = []
    for layout in (SUM, SUM, BlockLayout("shift scale", x=Buffer("rows columns", dense=1), out=Buffer("rows"))):
        kernel = compiled.Kernel(add_up, layout)
        given = {"scale": 2, "x": x, "out": out} | ({"shift": 0} if "shift" in layout.places else {})
        out.zero_()
        team.run(kernel, 1, **given)
        agree(out, 2 * x.sum(1))
        hits.append(kernel.compiled.cache_hits)
    assert hits == [0, 1, 0]


def test_layouts_that_differ_in_strides_alone_are_not_taken_for_each_other() -> None:
    """All have the same places. Numba takes two types of one name for the same."""
    x = torch.rand(3, 2, 4)
    for buffer in (Buffer("rows columns inner"), Buffer("inner columns rows")):
        layout = BlockLayout("rows columns inner", x=buffer, out=Buffer("one"))
        out = torch.empty(1)
        sizes = dict(zip(buffer.names, x.shape, strict=True))
        team.run(compiled.Kernel(take_one, layout), 1, x=x, out=out, **sizes)
        assert out == x[2, 1, 3]


FACTOR = 2


def multiply(data: Any) -> None:
    """out[r] = FACTOR * the first x[r, c], but for layouts without x."""
    p = arguments_at(data)
    for r in range(p.rows):
        if FACTOR:
            p.out[r] = FACTOR * p.x[r, 0]
        else:
            p.out[r] = 0


def test_a_kernel_may_have_its_own_constants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a branch on them leaves out need not compile, and code for other constants is not run."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    x, out = torch.rand(3, 5), torch.empty(3)
    for layout, constants in ((SUM, {}), (SUM, {"FACTOR": 3}), (SUM.but("x"), {"FACTOR": 0})):
        given = {"scale": 2, "x": x, "out": out}
        team.run(compiled.Kernel(multiply, layout, **constants), 1, **{name: given[name] for name in layout.names})
        agree(out, constants.get("FACTOR", 2) * x[:, 0])


def test_the_triton_kernels_refuse_what_does_not_fit() -> None:
    inputs = arguments("x delta A B C h_start")
    B, L, E, N, _ = SIZES.values()
    states, checkpoints = torch.zeros(B, L, E, N), torch.zeros(B, 1, E, N)
    launch.run_selective(*inputs, states=states, checkpoints=checkpoints)
    for name, wrong in (
        ("states", states.double()),
        ("states", states[:, 1:]),
        ("states", torch.zeros(N, E, L, B).permute(3, 2, 1, 0)),
        ("states", states.to("meta")),
        ("checkpoints", torch.zeros(B, 2, E, N)),
        ("checkpoints", checkpoints.bfloat16()),
    ):
        with pytest.raises(BackendError, match=rf"\b{name}\b"):
            launch.run_selective(*inputs, **{"states": states, name: wrong})
    for index, name in enumerate(("x", "delta", "A", "B", "C", "h_start")):
        if name in "xA":  # what the sizes are taken from
            continue
        for wrong in (inputs[index][..., 1:], inputs[index].int(), inputs[index].to("meta")):
            with pytest.raises(BackendError, match=rf"\b{name}\b"):
                launch.run_selective(*[wrong if i == index else t for i, t in enumerate(inputs)])
    matrices = arguments("A_bar B_bar x C h_start")
    with pytest.raises(BackendError, match="before"):
        launch.run_explicit(*matrices, before=states.half())
    with pytest.raises(BackendError, match="gy"):
        launch.explicit_gradients(*matrices, torch.zeros(B, L, E + 1))


def test_the_cuda_kernels_are_handed_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_stand_ins.install(monkeypatch)
    names = FUNCTIONS["gated_scan"].split()
    inputs = arguments(FUNCTIONS["gated_scan"])
    for name, called in (("delta", "delta"), ("B", "B"), ("C", "C"), ("D", "D"), ("skip", "z")):
        index = names.index(name)
        for wrong in (inputs[index][..., 1:], inputs[index].to("meta")):
            with pytest.raises(BackendError, match=rf"\b{called}\b"):
                cuda.gated_scan(*[wrong if i == index else t for i, t in enumerate(inputs)][:-1])
    x, weight, bias, _ = arguments(FUNCTIONS["causal_conv"])
    with pytest.raises(BackendError, match="bias"):
        cuda.causal_conv(x, weight, bias[1:])
    with pytest.raises(BackendError, match="weight"):
        cuda.causal_conv(x, weight[1:], bias)
