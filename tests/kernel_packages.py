"""mamba-ssm's and causal-conv1d's own Python, from their source packages, with stand-ins for what is compiled alone.

`sources` downloads the source packages with pip, once for all processes and runs of the tests. `imported` puts one
release of each in place of whatever is installed and lets the backend run on the CPU: mamba-ssm's Triton kernels in
Triton's interpreter, the compiled halves as `compiled_stand_ins`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import compiled_stand_ins
import pytest
import torch
from filelock import FileLock

from mamba_trace.scan import cuda
from mamba_trace.scan.cuda import installed
from mamba_trace.scan.dual import cuda as dual_cuda

#: mamba-ssm and causal-conv1d: the newest release of each, the one before it, and the oldest that is declared.
RELEASES = [("2.3.2.post1", "1.7.0"), ("2.3.1", "1.6.2.post1"), ("2.3.0", "1.5.0.post5")]
PACKAGES = ("mamba_ssm", "causal_conv1d")
COMPILED = ("selective_scan_cuda", "causal_conv1d_cuda")
#: What pip asks for the name and the version of a source package. The packages' own answer, their setup.py, looks for a
#: compiler; this one reads what the package says of itself.
BUILD_BACKEND = """
import email, pathlib, shutil

class Backend:
    def prepare_metadata_for_build_wheel(self, folder, settings=None):
        about = email.message_from_string(pathlib.Path("PKG-INFO").read_text(encoding="utf-8"))
        place = pathlib.Path(folder, f"{about['Name'].replace('-', '_')}-{about['Version']}.dist-info")
        place.mkdir()
        shutil.copy("PKG-INFO", place / "METADATA")
        return place.name

__legacy__ = Backend()
prepare_metadata_for_build_wheel = __legacy__.prepare_metadata_for_build_wheel
"""


def sources() -> Path:
    """The folder of the unpacked source packages, ``mamba_ssm-2.3.1`` and so on, downloaded where they are missing.

    Raises:
        ConnectionError: if no package index can be reached.
        RuntimeError: if pip fails in another way.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba_trace" / "kernel_packages"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        pairs = [dict(zip(PACKAGES, releases, strict=True)) for releases in RELEASES]
        wanted = [[f"{n}-{v}" for n, v in pair.items() if not (cache / f"{n}-{v}").is_dir()] for pair in pairs]
        with tempfile.TemporaryDirectory(dir=cache) as place:
            download([names for names in wanted if names], Path(place))
            for archive in Path(place).glob("*.tar.gz"):
                with tarfile.open(archive) as opened:
                    opened.extractall(place, filter="data")
                (Path(place) / archive.name.removesuffix(".tar.gz")).rename(
                    cache / archive.name.removesuffix(".tar.gz")
                )
    return cache


def download(groups: list[list[str]], place: Path) -> None:
    """Download source packages such as ``mamba_ssm-2.3.1`` to ``place``; pip takes one release of each at a time."""
    backend = place / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BUILD_BACKEND, encoding="utf-8")
    options = "--quiet --no-deps --no-binary :all: --no-build-isolation --retries 1 --timeout 30".split()
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(place)]
    environment = {**os.environ, "PYTHONPATH": str(backend.parent), "PIP_USE_PEP517": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen([*command, *(name.replace("-", "==") for name in names)], env=environment, **pipes)
        for names in groups
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    for process, text in zip(running, said, strict=True):
        if process.returncode and "from versions: none" in text:
            raise ConnectionError(f"pip reaches no index with the source packages: {text.strip().splitlines()[-1]}")
        if process.returncode:
            raise RuntimeError(text)


def forget() -> None:
    """Forget what was imported of the packages and what was found in them."""
    for name in [name for name in sys.modules if name.partition(".")[0] in (*PACKAGES, *COMPILED)]:
        del sys.modules[name]
    for cached in (
        installed.scan_kernel, installed.chunk_scan_kernel, installed.state_update_kernel, installed.conv_kernel,
        cuda.scan_failure, cuda.conv_failure, dual_cuda.dual_failure,
    ):  # fmt: skip
        getattr(cached, "cache_clear", lambda: None)()


@contextlib.contextmanager
def imported(folder: Path, mamba: str, conv: str) -> Iterator[ModuleType]:
    """Let the backend find these releases, on tensors of the CPU; gives mamba_ssm, imported."""
    import triton

    everything = triton.autotune

    def largest(configs: list[Any], *args: Any, **options: Any) -> Any:
        # Nothing can be timed here, and a program of the interpreter costs the same whatever its size.
        return everything([max(configs, key=blocks)], *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        forget()
        for name, release in zip(PACKAGES, (mamba, conv), strict=True):
            patch.syspath_prepend(folder / f"{name}-{release}")
        patch.setitem(sys.modules, "selective_scan_cuda", compiled_stand_ins.selective_scan_cuda())
        patch.setitem(sys.modules, "causal_conv1d_cuda", compiled_stand_ins.causal_conv1d_cuda(conv))
        patch.setattr(installed, "DEVICE_TYPES", ("cpu",))
        patch.setattr(triton, "autotune", largest)
        # mamba-ssm asks these of the GPU that its tensors are on, and its generate measures itself there.
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=1))
        try:
            import mamba_ssm

            yield mamba_ssm
        finally:
            forget()


class Event:
    """A moment, no time being kept."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.record, self.elapsed_time = (lambda: None), (lambda other: 1.0)


def blocks(config: Any) -> int:
    """How many numbers a program of a Triton kernel works on."""
    size = 1
    for name, value in config.kwargs.items():
        size *= value if name.startswith("BLOCK") else 1
    return size
