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
from dual_stand_ins import DualStandIns
from test_scan_dual import arguments, rounded

from mamba_trace.errors import BackendError
from mamba_trace.scan.cuda import installed
from mamba_trace.scan.dual import cuda

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
    (folder / "ssd_combined.py").write_text("def mamba_chunk_scan_combined(): return 'ran'")
    kernel = installed.chunk_scan_kernel()
    assert not isinstance(kernel, str)
    assert kernel() == "ran"
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
