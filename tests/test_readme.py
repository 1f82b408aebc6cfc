"""The README: its code runs, its table is the site table, and CI runs its test command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba_trace import MambaTrace, __version__
from mamba_trace.sites import FAMILIES, SITES, rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str = README) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def found(pattern: str) -> str:
    match = re.search(pattern, README, flags=re.DOTALL)
    assert match, pattern
    return match[1]


def command(name: str) -> str:
    return found(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```")


def site_table() -> str:
    """The README's table of sites, written from the table that the code reads."""
    lines = ["| path under `model` | shape | in Mamba-2 | MambaLens name | meaning |", "|---|---|---|---|---|"]
    for row in rows():
        hook = f"`{row.hook}`" if row.hook else "(none)"
        shapes = [row.shape(family) or "(none)" for family in FAMILIES]
        dual = "" if shapes[0] == shapes[1] else shapes[1]
        lines.append(f"| `{row.path}` | {shapes[0]} | {dual} | {hook} | {row.meaning} |")
    return "\n".join(lines)


def hybrid_table() -> str:
    """The README's table of the sites that only hybrids have."""
    lines = ["| path under `model` | shape | hook name | meaning |", "|---|---|---|---|"]
    lines += [f"| `{row.path}` | {row.shape('dual')} | `{row.hook}` | {row.meaning} |" for row in rows(hybrid=True)]
    return "\n".join(lines)


def test_every_code_block_runs_in_order(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n\n".join(blocks()), encoding="utf-8")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    correlation = found(r"print\(estimate\.correlation\(grid\)\)  # (\d\.\d+)")
    assert re.search(rf"^{re.escape(correlation)}\d*$", run.stdout, re.MULTILINE)
    assert (tmp_path / "heatmap.html").stat().st_size > 1000


def test_the_deployment_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "tutorials" / "deployment.md").read_text(encoding="utf-8")
    script = tmp_path / "deployment.py"
    script.write_text("\n".join(blocks(page)), encoding="utf-8")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_the_first_block_prints_what_it_says(tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text(blocks()[0], encoding="utf-8")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    edited, plain = re.findall(r"print\(.*# ('.*?'); without the edit it is ('.*?')$", blocks()[0], re.MULTILINE)[0]
    assert run.stdout.strip() == edited, run.stderr
    without = [line for line in blocks()[0].splitlines() if "[:] = 0" not in line]
    script.write_text("\n".join(without), encoding="utf-8")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == plain, run.stderr


def test_the_report_is_what_it_says(tmp_path: Path) -> None:
    script, (block,) = tmp_path / "report.py", [block for block in blocks() if "last_run" in block]
    load = "from mamba_trace import MambaTrace\nmodel = MambaTrace.demo()\n"
    (prompt,) = re.findall(r"^prompt = .*$", README, re.MULTILINE)[:1]
    script.write_text(f"{load}{prompt}\n{block}", encoding="utf-8")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.stdout.splitlines() == re.findall(r"^# (.*)$", block, re.MULTILINE), run.stderr


def test_the_measurements_are_the_recorded_ones() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    from readme_table import forward_table, patching_table, recorded, scaling_table

    forward, scaling = recorded("forward"), recorded("scaling")
    assert found(r"<!-- forward -->\n(.*?)\n<!-- /forward -->") == forward_table(forward)
    assert found(r"<!-- scaling -->\n(.*?)\n<!-- /scaling -->") == scaling_table(scaling)
    assert found(r"<!-- patching -->\n(.*?)\n<!-- /patching -->") == patching_table(recorded("patching"))
    tiny = forward["tiny"]["contenders"]["trace, empty"]["ratio"]
    assert f"takes {tiny:.2f} of the time of the same trace" in README
    edit = scaling["memory"]["contenders"]["trace, edit h[5]"]["ratio"]
    assert edit <= 1.0005, "the README says that it takes no more memory"


def test_loading_names_every_kernel() -> None:
    from mamba_trace.scan.dispatch import KERNELS

    assert "kernels=" + " | ".join(f'"{name}"' for name in KERNELS) in README


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.*?)\]", changelog, flags=re.MULTILINE)
    assert versions[0] == __version__


def test_the_two_experiments_are_short() -> None:
    experiments = [block for block in blocks() if "grid[l, p]" in block]
    assert len(experiments) == 2
    for block in experiments:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_the_site_table_is_the_table() -> None:
    assert found(r"<!-- sites -->\n(.*?)\n<!-- /sites -->") == site_table()
    assert found(r"<!-- hybrid sites -->\n(.*?)\n<!-- /hybrid sites -->") == hybrid_table()


def test_every_site_has_a_row_and_the_state_has_two() -> None:
    table = list(rows())
    names = [row.path.rpartition(".")[2] for row in table]
    assert [name for name in names if name != "h[p]"] == [site.name for site in SITES if not site.part]
    assert [row.path.rpartition(".")[2] for row in rows(hybrid=True)] == [site.name for site in SITES if site.part]
    one, whole = (table[names.index(name)] for name in ("h[p]", "h"))
    assert names.index("h[p]") + 1 == names.index("h")
    assert (one.path, one.shape("selective"), one.hook) == ("layers[l].ssm.h[p]", "B E N", "blocks.l.hook_h.p")
    assert (whole.path, whole.shape("selective"), whole.hook) == ("layers[l].ssm.h", "B L E N", None)
    assert one.meaning == "the state carried after token p: an edit changes y at p and everything after"
    assert whole.meaning.endswith("an edit of h[:, p] changes y at p alone and is not carried on")


def test_an_edit_is_carried_from_one_position_and_not_from_the_whole(tiny: MambaTrace) -> None:
    """What the rows of h[p] and h say, and the README of gradients."""
    tokens, p = torch.tensor([[3, 1, 7, 9, 4, 2]]), 2
    ssm = tiny.layers[1].ssm
    with torch.no_grad(), tiny.trace(tokens):
        plain = ssm.y.output.save()  # [1,L,E]
    with torch.no_grad(), tiny.trace(tokens):
        ssm.h[p].output[:] = 0
        carried = ssm.y.output.save()
    with torch.no_grad(), tiny.trace(tokens):
        ssm.h.output[:, p] = 0
        alone = ssm.y.output.save()
    assert positions_apart(carried, plain) == [2, 3, 4, 5]
    assert positions_apart(alone, plain) == [2]
    with tiny.trace(tokens):
        h = ssm.h[p].output.save()
        last = ssm.y.output[:, -1].sum().save()
    (gradient,) = torch.autograd.grad(last, h)
    assert gradient.abs().max() > 1e-6
    with tiny.trace(tokens):
        states = ssm.h.output.save()
        last = ssm.y.output[:, -1].sum().save()
    (gradient,) = torch.autograd.grad(last, states)
    assert positions_apart(gradient.flatten(2), torch.zeros_like(gradient.flatten(2))) == [5]


def positions_apart(one: torch.Tensor, other: torch.Tensor) -> list[int]:
    """The positions where [1,L,...] values differ by more than rounding."""
    return (one - other).abs().amax((0, 2)).gt(1e-6).nonzero().flatten().tolist()


@pytest.mark.parametrize("part", ["pip install -e '.[dev]' && python -m pytest -n 2"])
def test_ci_runs_the_test_command(part: str) -> None:
    assert command("test").endswith(part)
    assert command("test") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_speed_of_mamba2_is_that_of_the_recorded_run() -> None:
    lengths = json.loads((ROOT / "tests" / "benchmarks" / "forward_mamba2.json").read_text())["lengths"]
    ratios = {
        name: [f"{lengths[length]['contenders'][name]['ratio']:.2f}" for length in ("128", "512")]
        for name in ("untraced", "hugging face", "mixer", "hugging face's mixer")
    }
    said = re.findall(r"\d\.\d\d", found(r"A model of mamba2-130m's shape (.*?)\n\n"))
    assert said == [ratio for pair in ratios.values() for ratio in pair]
