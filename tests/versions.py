"""Whether the package runs with the oldest and the newest releases that it declares.

    python tests/versions.py oldest --python python3.11
    python tests/versions.py newest --python python3.13

Each makes a virtual environment in a temporary folder, installs the package there with every dependency at its lower
bound, or at its newest release, and runs the README's first command and the tests in TESTS. What happened is a row of
``tests/benchmarks/versions.json``, of which `tests/tables.py` makes the table of the page on versions. ``--torch``
names another release of torch, where the declared one is not to be had.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "benchmarks" / "versions.json"
#: They touch nnsight's internals, Hugging Face's modules, the compiled scan, and what a new user does.
TESTS = ("test_nnsight.py", "test_huggingface.py", "test_scan_cpu.py", "test_readme.py")
SHOWN = ("torch", "transformers", "nnsight", "accelerate", "numba", "numpy", "typer")
CHECKERS = ("pytest>=8", "hypothesis>=6.100", "peft>=0.18")


def wanted(which: str, torch: str | None) -> list[str]:
    """What to install beside the package: pins at the lower bounds, or nothing but torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if which == "newest":
        return [f"torch=={torch}"] if torch else []
    pins = {}
    for line in (*project["dependencies"], *project["optional-dependencies"]["plot"]):
        name, bound = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        pins[name] = bound
    if torch:
        pins["torch"] = torch
    return [f"{name}=={bound}" for name, bound in pins.items()]


def run(*command: str | Path, cwd: Path = ROOT) -> tuple[bool, str]:
    """Whether a command succeeded, and the end of what it printed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def tried(which: str, python: str, torch: str | None, folder: Path) -> dict[str, object]:
    """One row: the versions, and what happened at each step."""
    interpreter = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    row: dict[str, object] = {"which": which}
    pins = wanted(which, torch)
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if which == "newest" else []
    good, said = run(interpreter, "-m", "pip", "install", "-q", *upgrade, f"{ROOT}[plot]", *pins, *CHECKERS)
    row["install"] = "yes" if good else said
    if not good:
        return row
    _, listed = run(interpreter, "-c", VERSIONS)
    row["versions"] = json.loads(listed)
    command = ["-m", "mamba_trace", "patch", "--out", "heatmap.html"]
    good, said = run(interpreter, *command, cwd=folder)
    row["first command"] = "yes" if good else said
    tests = [f"tests/{name}" for name in TESTS]
    row["tests"] = run(interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)[1]
    return row


VERSIONS = f"""
import json, platform
from importlib.metadata import version
print(json.dumps({{"python": platform.python_version()}} | {{name: version(name) for name in {SHOWN!r}}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("which", choices=("oldest", "newest"))
    parser.add_argument("--python", default=sys.executable, help="the interpreter to make the environment with")
    parser.add_argument("--torch", help="a release of torch in place of the declared one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = tried(args.which, args.python, args.torch, Path(folder))
    print(json.dumps(row, indent=1))
    rows = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    RECORD.write_text(json.dumps(rows | {args.which: row}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
