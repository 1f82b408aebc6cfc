"""The README: its code runs, its table is the site table, and CI runs its test command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_trace.sites import SITES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def command(name: str) -> str:
    return re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```", README, flags=re.DOTALL)[1]


def site_table() -> str:
    """The README's table of sites, written from the table that the code reads."""
    rows = []
    for site in SITES:
        path, hook, axes = site.path("l"), site.hook_name("l"), site.axes
        if site.name == "h":
            path, hook, axes = f"{path}[p]", f"{hook}.p", "BEN"
        rows.append(f"| `{path}` | {' '.join(axes)} | `{hook}` | {site.meaning} |")
    return "\n".join(
        ["| path under `model` | shape | MambaLens name | meaning |", "|---|---|---|---|", *rows]
    )


def test_every_code_block_runs_in_order(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n\n".join(blocks()), encoding="utf-8")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "heatmap.html").stat().st_size > 1000


def test_the_two_experiments_are_short():
    experiments = [block for block in blocks() if "grid[l, p]" in block]
    assert len(experiments) == 2
    for block in experiments:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_the_site_table_is_the_table():
    shown = re.search(r"<!-- sites -->\n(.*?)\n<!-- /sites -->", README, flags=re.DOTALL)[1]
    assert shown == site_table()


@pytest.mark.parametrize("part", ["pip install -e '.[dev]' && python -m pytest -n 2"])
def test_ci_runs_the_test_command(part):
    assert command("test").endswith(part)
    assert command("test") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
