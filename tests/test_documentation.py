"""The documentation: every block of every page runs, every table is the one of the code or of a recorded run."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import sys
import tomllib
import warnings
from pathlib import Path

import error_page
import pytest
import torch
from comparison import NOT_MEASURED, Cell, cells, evidence_numbers, value
from tables import LAYERS, PAGES, PURE, ROOT, TABLES, shapes, written

from mamba_trace import MambaTrace, errors
from mamba_trace.modeling.architectures import ARCHITECTURES
from mamba_trace.sites import SITES, rows

DOCS = ROOT / "tutorials" / "docs"
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


def blocks(page: str) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return TEXTS[f"tutorials/docs/{name}.md"]


RUN = [name for name, text in TEXTS.items() if blocks(text) and not name.endswith(("README.md", "errors.md"))]


@pytest.mark.parametrize("name", RUN)
def test_every_block_runs_in_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page is one script. What a block prints stands in comments after it, where the page says it."""
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks(TEXTS[name])), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    printed = capsys.readouterr().out.splitlines()
    for block in blocks(TEXTS[name]):
        said = re.findall(r"^# (.*)$", block, re.MULTILINE) if "print(model.last_run)" in block else []
        assert not said or printed[-len(said) :] == said
        for words in re.findall(r"^print\(repr\(.*  # ('[^']*')", block, re.MULTILINE):
            assert words in printed
    if correlation := re.search(r"print\(estimate\.correlation\(grid\)\)  # (\d\.\d+)", TEXTS[name]):
        assert any(re.fullmatch(rf"{re.escape(correlation[1])}\d*", line) for line in printed)
        assert (tmp_path / "heatmap.html").stat().st_size > 1000


def test_every_error_on_its_page_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the lines that stand above it; and the page has every class that there is."""
    monkeypatch.chdir(tmp_path)
    quoted = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for example in error_page.examples(page("errors"), tmp_path):
            if example.said is not None:
                assert example.raised, f"nothing was raised by\n{example.code}"
                assert error_page.agree(example.said, example.raised), f"{example.said!r}\nis {example.raised!r}"
                quoted.add(example.said.partition(":")[0])
    classes = {name for name, cls in vars(errors).items() if inspect.isclass(cls)}
    assert classes - quoted == {"MambaTraceError"}


@pytest.mark.parametrize("name", TEXTS)
def test_every_table_is_up_to_date(name: str) -> None:
    """`python tests/tables.py` writes them."""
    assert written(TEXTS[name]) == TEXTS[name]


def test_every_table_stands_somewhere() -> None:
    assert set(re.findall(r"^<!-- ([\w ]+) -->$", "\n".join(TEXTS.values()), re.MULTILINE)) >= TABLES.keys()


def test_every_file_and_test_that_is_named_exists() -> None:
    text = "\n".join(TEXTS.values()) + "".join(f"`tests/{item}`" for item in evidence_numbers() if "::" in item)
    for file, test in set(re.findall(r"tests/(test_\w+\.py)::(test_\w+)", text)):
        names = [
            node.name for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text())) if hasattr(node, "name")
        ]
        assert test in names, f"{file}::{test}"
    for path in set(re.findall(r"`(?:python )?((?:tests|tutorials|mamba_trace)/[\w/.]*\w)\b", text)):
        assert (ROOT / path).exists() or (ROOT / path).suffix in (".ipynb", ""), path


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_of_the_repository(name: str) -> None:
    """mkdocs sees to those of the documentation; these are relative to the page where they stand."""
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXTS[name]):
        if not link.startswith("https:"):
            assert (folder / link).exists(), link


def test_the_extra_for_the_tutorials_has_what_they_import() -> None:
    """Beside what every installation has; IPython comes with ipykernel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["tutorials"]]
    there = {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in required} | {"mamba_trace"}
    there |= {"IPython"} if "ipykernel" in there else set()
    imported = set()
    for script in (ROOT / "tutorials").glob("[0-9]*.py"):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {name.partition(".")[0] for name in names}
    assert imported - sys.stdlib_module_names <= there
    assert "'.[tutorials]'" in page("tutorials")
    assert "'.[tutorials]'" in TEXTS["README.md"]


def test_every_cell_of_the_comparison_has_evidence() -> None:
    for row, column, cell in cells():
        assert cell.evidence or cell == NOT_MEASURED, (row, column)
    for item in evidence_numbers():
        if ".json: " in item:
            assert value(item) is not None, item


def test_the_comparison_says_what_was_recorded() -> None:
    """The cells whose words stand for a recorded value that is no number in the cell."""
    models = json.loads((ROOT / "tests" / "benchmarks" / "transformer_lens.json").read_text())["models"]
    assert [models[name]["generate"] for name in ("mamba", "mamba2", "nemotron_h")] == [False, False, True]
    assert all(model["logits"] < 1e-4 for model in models.values())
    assert [models[name]["positions changed"] for name in ("mamba", "mamba2")] == [[3], [3]]
    assert all(model["effective attention"].startswith("RuntimeError") for model in models.values())
    assert "conv1d.hook_out" in models["mamba"]["state"]
    assert "dt_proj.hook_out" in models["mamba"]["effective attention"]
    assert isinstance(next(cells())[2], Cell)


def test_every_architecture_has_a_row() -> None:
    assert set(LAYERS) == {architecture.name for architecture in ARCHITECTURES} == set(shapes())
    assert set(PURE) == {architecture.name for architecture in ARCHITECTURES if not architecture.hybrid}


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
    """What the rows of h[p] and h say, and the page on edits of gradients."""
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


def test_the_speed_page_says_what_was_recorded() -> None:
    recorded = ROOT / "tests" / "benchmarks"
    lengths = json.loads((recorded / "forward_mamba2.json").read_text())["lengths"]
    ratios = [
        f"{lengths[length]['contenders'][name]['ratio']:.2f}"
        for name in ("mixer", "hugging face's mixer")
        for length in ("128", "512")
    ]
    (paragraph,) = re.findall(r"One of its mixers (.*?)\n\n", page("speed"), re.DOTALL)
    assert re.findall(r"\d\.\d\d", paragraph) == ratios
    tiny = json.loads((recorded / "forward.json").read_text())["tiny"]["contenders"]["trace, empty"]["ratio"]
    assert f"takes {tiny:.2f} of the time of the same trace" in page("speed")
    scaling = json.loads((recorded / "scaling.json").read_text())
    for found in scaling["architectures"].values():
        for length, peaks in found["memory"]["lengths"].items():
            assert peaks["trace, edit h[L/2]"]["ratio"] <= 1.05, f"the page says 5 % at most; {length} tokens"


def test_the_two_experiments_are_short() -> None:
    experiments = [block for block in blocks(page("patching")) if "grid[l, p]" in block]
    assert len(experiments) == 2
    for block in experiments:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_the_page_on_loading_names_every_kernel() -> None:
    from mamba_trace.scan.dispatch import KERNELS

    assert "kernels=" + " | ".join(f'"{name}"' for name in KERNELS) in page("loading")
