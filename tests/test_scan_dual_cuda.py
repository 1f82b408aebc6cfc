"""What mamba-ssm's kernels for Mamba-2 are handed, when they are called, and why they cannot run.

That the results are right is tested with those of the other backends in test_scan_dual.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dual_stand_ins
import pytest
import torch
from conftest import agree, make_hf, near
from dual_stand_ins import DualStandIns
from test_scan_dual import arguments, gradients, rounded, written_out

from mamba_trace import MambaTrace
from mamba_trace.errors import BackendError
from mamba_trace.scan.cuda import installed
from mamba_trace.scan.dual import cuda, reference

CPU = torch.device("cpu")
DUAL_FAILURE = cuda.dual_failure


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> DualStandIns:
    return dual_stand_ins.install(monkeypatch)


def test_a_prompt_is_one_call_and_a_position_is_another(kernels: DualStandIns) -> None:
    for length, name in ((5, "scan"), (1, "update")):
        for function in ("selective_scan", "gated_scan"):
            given = rounded(arguments(function, (2, length, 4, 3, 2, 5)))
            getattr(cuda, function)(*given.values())
        assert kernels.names() == [name] * 2
        assert "z" not in kernels.calls[0][1]
        assert "z" in kernels.calls[1][1]
        kernels.calls.clear()


@pytest.mark.parametrize("length", [1, 5])
def test_everything_is_handed_over_in_float32(kernels: DualStandIns, length: int) -> None:
    """The kernel keeps the states between its chunks in the dtype of C."""
    given = rounded(arguments("gated_scan", (2, length, 4, 3, 2, 5)), torch.bfloat16)
    cuda.gated_scan(*given.values())
    cuda.selective_scan(*[tensor for name, tensor in given.items() if name not in ("D", "skip")])
    for _, dtypes in kernels.calls:
        assert set(dtypes.values()) == {torch.float32}


def test_a_position_with_a_gradient_calls_no_kernel(kernels: DualStandIns) -> None:
    given = rounded(arguments("selective_scan", (2, 1, 4, 3, 2, 5)))
    given["x"].requires_grad_()
    cuda.selective_scan(*given.values())[0].sum().backward()
    assert not kernels.calls


def test_the_state_that_was_given_stays_as_it_is(kernels: DualStandIns) -> None:
    given = rounded(arguments("selective_scan", (2, 1, 4, 3, 2, 5)))
    before = given["h_start"].clone()
    _, h_last = cuda.selective_scan(*given.values())
    assert kernels.names() == ["update"]
    assert torch.equal(given["h_start"], before)
    assert not torch.equal(h_last, before)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("length", [1, 5])
def test_what_does_not_fit_is_refused(length: int) -> None:
    given = rounded(arguments("gated_scan", (2, length, 4, 3, 2, 5)))
    for name, called in (("C", "C"), ("D", "D"), ("skip", "z"), ("h_start", "state")):
        for wrong in (given[name][..., 1:], given[name].to("meta")):
            with pytest.raises(BackendError, match=rf"\b\w*{called}\w*\b"):
                cuda.gated_scan(*{**given, name: wrong}.values())


@pytest.mark.parametrize("function", ["selective_scan", "gated_scan"])
@pytest.mark.parametrize("edit", ["a negative delta", "a positive A", "nan"])
def test_what_the_kernel_would_misread_runs_as_it_is_defined(kernels: DualStandIns, function: str, edit: str) -> None:
    """It takes a negative delta for 0, lets no state grow, and a NaN of delta is lost in it."""
    exact = arguments(function, (2, 5, 4, 3, 2, 5))
    name, value = {"a negative delta": ("delta", -0.3), "a positive A": ("A", 0.2), "nan": ("delta", torch.nan)}[edit]
    exact[name][..., 1] = value
    y, states = written_out(exact)
    out, h_last = getattr(cuda, function)(*rounded(exact).values())
    torch.testing.assert_close(out.double(), y, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(h_last.double(), states[:, -1], rtol=1e-5, atol=1e-5, equal_nan=True)
    if edit != "nan":
        grads = gradients(lambda **given: getattr(cuda, function)(*given.values()), rounded(exact))
        expected = gradients(lambda **given: getattr(reference, function)(*given.values()), exact)
        for each, grad in grads.items():
            near(grad, expected[each], 1e-5, each)
    assert not kernels.calls


def test_an_edit_of_delta_may_be_negative(kernels: DualStandIns) -> None:
    found = []
    for chosen in ("cuda", "reference"):
        model = MambaTrace(make_hf(model_type="mamba2"), kernels=chosen)
        with torch.no_grad(), model.trace([[1, 2, 3, 4]]):
            model.layers[1].ssm.delta.output[:, 1] *= -1
            found.append(model.lm_head.output.save())
    agree(*found)
    assert kernels.names() == ["scan"] * 2


def test_a_model_is_checked_for_the_kernels_of_its_own_scan(
    kernels: DualStandIns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With Mamba-2's kernels alone, a Mamba-1 is refused at once, whether it is a module or a checkpoint."""
    monkeypatch.setattr(installed, "scan_kernel", lambda: "there is none")
    assert MambaTrace(make_hf(model_type="mamba2"), kernels="cuda").kernels == "cuda"
    make_hf().save_pretrained(tmp_path)
    for source in (make_hf(), tmp_path):
        with pytest.raises(BackendError, match="kernels='cuda' cannot run: there is none"):
            MambaTrace(source, kernels="cuda")
    assert not kernels.calls


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A place for packages that are found first, nothing of them remembered before or after."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            del sys.modules[name]
        for cached in (installed.chunk_scan_kernel, installed.state_update_kernel):
            cached.cache_clear()

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget()


@pytest.mark.usefixtures("packages")
def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    assert cuda.unavailable(CPU) == f"it needs mamba-ssm: {installed.INSTALL_DUAL}"


def test_what_is_installed_is_what_runs(packages: Path) -> None:
    folder = packages / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").write_text("")
    names = ", ".join(installed.CHUNK_SCAN.parameters)
    (folder / "ssd_combined.py").write_text(f"def mamba_chunk_scan_combined({names}): return 'ran'")
    kernel = installed.chunk_scan_kernel()
    assert not isinstance(kernel, str)
    assert kernel(*names.split(", ")) == "ran"
    missing = "mamba-ssm is installed without a working kernel (ModuleNotFoundError"
    assert str(cuda.unavailable(CPU)).startswith(missing)


def test_the_kernels_are_tried_before_they_are_used(kernels: DualStandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "dual_failure", DUAL_FAILURE.__wrapped__)
    assert cuda.unavailable(CPU) is None
    assert kernels.names() == ["scan", "update"]
    assert cuda.unavailable(CPU, torch.float64) == "it computes in float32, not torch.float64"

    def wrong(*inputs: Any, **options: Any) -> Any:
        out, final = kernels.mamba_chunk_scan_combined(*inputs, **options)
        return 1.01 * out, final

    def broken(*inputs: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image is available\nCompile with ...")

    monkeypatch.setattr(installed, "chunk_scan_kernel", lambda: wrong)
    assert str(cuda.unavailable(CPU)).startswith("its kernel is wrong here, by ")
    monkeypatch.setattr(installed, "chunk_scan_kernel", lambda: kernels.mamba_chunk_scan_combined)
    monkeypatch.setattr(installed, "state_update_kernel", lambda: broken)
    assert cuda.unavailable(CPU) == "its kernel fails here (RuntimeError: no kernel image is available)"
    assert cuda.unavailable() is None  # in general


def test_a_model_elsewhere_is_told_where_to_go(kernels: DualStandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "DEVICE_TYPES", ("cuda",))
    reason = "the model is on cpu, and it runs on a CUDA device alone: model.to('cuda')"
    assert cuda.unavailable(CPU) == reason
    assert not kernels.calls
