"""Results come back from their files equal to the last bit, and are never half written."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_trace.errors import FileError, MetricError
from mamba_trace.patching.result import PatchGrid
from mamba_trace.results import Report, Result, files
from mamba_trace.results.heatmap import Heatmap

NAN, INF = math.nan, math.inf
FORMATS = (".json", ".safetensors")


@dataclass(frozen=True, eq=False)
class Everything(Result):
    """A result with a field of every kind."""

    values: Tensor
    name: str = 'a "quote", <b>, \n, 日本語, \ud7ff'
    count: int = 2**70
    share: float = 0.1 + 0.2
    done: bool = True
    nothing: None = None
    texts: list[list[str]] | None = None
    numbers: list[float] | None = None
    parts: dict[str, Tensor] | None = None

    def heatmaps(self) -> list[Heatmap]:
        rows, columns = self.values.shape
        labels = {"row_labels": list(map(str, range(rows))), "column_labels": list(map(str, range(columns)))}
        return [Heatmap(values=self.values, title=self.name, row_title="row", **labels)]


def patch_grid(values: Any = ((6.0, 2.0, -2.0, 8.0),), **changes: Any) -> PatchGrid:
    values = torch.as_tensor(values)
    tokens = [f" t{position}" for position in range(values.shape[1])]
    labels = [str(row) for row in range(len(values))]
    return replace(PatchGrid(values, 6.0, -2.0, "h", "m", labels, tokens, tokens), **changes)


def refusal(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def same(one: Any, other: Any) -> bool:
    """Equal in type, dtype, shape and bits; a nan equals a nan."""
    if isinstance(one, Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return torch.equal(one.contiguous().flatten().view(torch.uint8), other.flatten().view(torch.uint8))
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and repr(one) == repr(other)


def same_result(one: Result, other: Result) -> bool:
    return type(one) is type(other) and all(
        same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
    )


# -- files -------------------------------------------------------------------------------------------------

FLOATS = [0.0, -0.0, 1 / 3, 2.0**-140, -1e30, NAN, INF, -INF]
TENSORS = {
    **{
        str(dtype).removeprefix("torch."): torch.tensor(FLOATS, dtype=torch.float64).to(dtype).reshape(2, 4)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    },
    "float8_e5m2": torch.tensor([0.5, -0.25, INF, 3.0]).to(torch.float8_e5m2),
    "complex64": torch.tensor([[1 + 2j, complex(1 / 3, -0.0)]], dtype=torch.complex64),
    "conjugate": torch.tensor([[1 + 2j, 0.5j]], dtype=torch.complex64).conj(),
    "int64": torch.tensor([2**63 - 1, -(2**63)]),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(0.1),
    "empty": torch.empty(2, 0, 3, dtype=torch.float16),
    "strided": torch.arange(12.0).reshape(3, 4).T[:, ::2],
    "with gradient": torch.tensor([0.1], requires_grad=True),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("values", TENSORS.values(), ids=TENSORS.keys())
def test_a_tensor_of_any_dtype_comes_back_to_the_last_bit(values: Tensor, suffix: str, tmp_path: Path) -> None:
    loaded = Everything.load(Everything(values).save(tmp_path / f"a{suffix}")).values
    assert same(values.detach().resolve_conj(), loaded)
    assert not loaded.requires_grad


@pytest.mark.parametrize("suffix", FORMATS)
def test_random_bits_come_back(suffix: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**63), 2**63 - 1, (64, 16), generator=generator)
    parts = {"double": bits.view(torch.float64), "single": bits.view(torch.float32)}
    parts = {name: part.nan_to_num(NAN, INF, -INF) for name, part in parts.items()}
    result = Everything(bits, parts=parts)
    assert same_result(Everything.load(result.save(tmp_path / f"a{suffix}")), result)


@pytest.mark.parametrize("suffix", FORMATS)
def test_fields_of_every_kind_come_back(suffix: str, tmp_path: Path) -> None:
    shared = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    result = Everything(
        shared,
        texts=[[" Emma", ""], ["tensor", "\n"]],
        numbers=[1.0, NAN, -INF, 2, True, 5e-324],
        parts={"a.b": shared, "tensor": shared[0], "": torch.tensor(1)},
    )
    assert same_result(Result.load(result.save(tmp_path / f"a{suffix}")), result)
    bare = Everything(shared, share=NAN, texts=[], parts={})
    assert same_result(Everything.load(bare.save(tmp_path / f"a{suffix}")), bare)


def test_json_is_strict_and_says_what_is_in_it(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    path = patch_grid([[1.0, NAN, INF]]).save(tmp_path / "a.json")
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert content["class"] == "PatchGrid", "where the module lies is no part of a file"
    assert content["site"] == "h"
    expected = {"dtype": "float32", "shape": [1, 3], "values": [[1.0, "nan", "inf"]]}
    assert content["values"] == {"tensor": expected}


def test_safetensors_hold_tensors_that_any_program_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = Everything(torch.eye(2), parts={"one": torch.ones(3)})
    found = load_file(result.save(tmp_path / "a.safetensors"))
    assert {name: one.tolist() for name, one in found.items()} == {
        "values": [[1.0, 0.0], [0.0, 1.0]],
        "parts.one": [1.0, 1.0, 1.0],
    }


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_would_come_back_as_something_else_is_refused(suffix: str, tmp_path: Path) -> None:
    for value, said in (
        ((1, 2), "numbers is a tuple"),
        ([1.0, {2}], "numbers.1 is a set"),
        ({1: "a"}, "numbers is a dict"),
    ):
        result = Everything(torch.eye(2), numbers=value)  # type: ignore[arg-type]
        assert said in refusal(FileError, lambda result=result: result.save(tmp_path / f"a{suffix}"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_class_loads_its_own_files_only(suffix: str, tmp_path: Path) -> None:
    path = Everything(torch.eye(2)).save(tmp_path / f"a{suffix}")
    message = refusal(FileError, lambda: PatchGrid.load(path))
    assert "holds a Everything, not a PatchGrid: load it with Everything.load or Result.load" in message
    assert type(Result.load(path)) is Everything


def test_files_that_hold_no_result_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def message(content: Any) -> str:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return refusal(FileError, lambda: Result.load(path))

    good = json.loads(patch_grid().save(path).read_text(encoding="utf-8"))
    for content in ("", "[]", "{}", '"a"', {**good, "values": {"tensor": {}}}, {**good, "site": {"x": 1}}):
        assert "is no result that Result.save wrote" in message(content)
    unknown = message({"class": "elsewhere.Thing"})
    assert "holds a elsewhere.Thing, which is no class of results known here. Import the module" in unknown
    assert "PatchGrid" in unknown
    assert "no class of results known here" in message({"class": "mamba_trace.no_such.Thing"})
    assert "written by another version of PatchGrid" in message({**good, "colour": 1})
    del good["site"]
    assert "written by another version of PatchGrid" in message(good)
    broken = tmp_path / "b.safetensors"
    broken.write_bytes(b"\x08")
    assert "is no result" in refusal(FileError, lambda: Result.load(broken))
    for name in ("none.json", "none.safetensors"):
        assert "cannot be read: No such file" in refusal(FileError, lambda name=name: Result.load(tmp_path / name))
    assert "is loaded from .json or .safetensors; pictures hold no data" in refusal(
        FileError, lambda: Result.load(tmp_path / "a.png")
    )


def test_a_class_of_this_package_is_found_without_importing_it(tmp_path: Path) -> None:
    """Also by the name of the module that it lay in when the file was written."""
    from mamba_trace.hidden_attention import HiddenAttention

    attention = HiddenAttention(torch.eye(2), 1, "m", [0], [0, 1], [0, 1], ["a", "b"])
    paths = [patch_grid().save(tmp_path / "grid.json"), attention.save(tmp_path / "attention.safetensors")]
    content = json.loads(paths[0].read_text(encoding="utf-8"))
    paths.append(tmp_path / "old.json")
    paths[-1].write_text(json.dumps({**content, "class": "mamba_trace.grids.PatchGrid"}), encoding="utf-8")
    code = (
        "import sys; from mamba_trace.results import Result; "
        "assert 'mamba_trace.patching' not in sys.modules; "
        "print(*(type(Result.load(path)).__name__ for path in sys.argv[1:]))"
    )
    ran = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["PatchGrid", "HiddenAttention", "PatchGrid"]


def test_no_file_makes_anything_be_imported(tmp_path: Path) -> None:
    (tmp_path / "named_in_a_file.py").write_text("class Thing: pass", encoding="utf-8")
    path = tmp_path / "a.json"
    path.write_text('{"class": "named_in_a_file.Thing"}', encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        refusal(FileError, lambda: Result.load(path))
    assert "named_in_a_file" not in sys.modules


# -- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_a_write_that_fails_leaves_the_old_file_as_it_was(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        assert source.parent == target.parent == tmp_path
        assert source.stat().st_size > 100, "complete before it takes the old one's place"
        raise OSError(28, "No space left on device")

    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        message = refusal(FileError, lambda: patch_grid().save(path))
    assert f"a{suffix} cannot be written: No space left on device" in message
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == [f"a{suffix}"]
    patch_grid().save(path)
    assert path.stat().st_size > 100
    assert [one.name for one in tmp_path.iterdir()] == [f"a{suffix}"]


def test_a_reader_keeps_what_it_has_while_the_file_is_replaced(tmp_path: Path) -> None:
    path = patch_grid([[1.0, 2.0]]).save(tmp_path / "a.safetensors")
    first = PatchGrid.load(path)
    with path.open("rb") as opened:
        patch_grid([[3.0, 4.0]]).save(path)
        assert len(opened.read()) > 100
    assert first.values.tolist() == [[1.0, 2.0]]
    assert PatchGrid.load(path).values.tolist() == [[3.0, 4.0]]


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "a.json", tmp_path / "link.json"
    target.write_text("old", encoding="utf-8")
    target.chmod(0o640)
    link.symlink_to(target)
    patch_grid().save(link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert PatchGrid.load(target).site == "h"
    fresh, plain = patch_grid().save(tmp_path / "b.json"), tmp_path / "plain"
    plain.touch()
    assert fresh.stat().st_mode == plain.stat().st_mode


def test_a_page_holds_plotly_and_a_png_is_a_picture(tmp_path: Path) -> None:
    page = patch_grid().save(str(tmp_path / "a.html")).read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert len(page) > 1_000_000, "plotly itself is inside, so that the page opens offline"
    picture = patch_grid().save(tmp_path / "a.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_suffix_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    class Untouched(Everything):
        def heatmaps(self) -> list[Heatmap]:
            raise AssertionError("drawn")

    message = refusal(FileError, lambda: Untouched(torch.eye(2)).save(tmp_path / "a.pdf"))
    assert "a result is saved as .html, .png, .json, .safetensors, not .pdf" in message


def test_a_result_without_pictures_cannot_be_made() -> None:
    class Bare(Result):
        pass

    with pytest.raises(TypeError, match="heatmaps"):
        Bare()  # type: ignore[abstract]


def test_the_caption_is_what_the_picture_does_not_show() -> None:
    caption = Everything(torch.eye(2), name="n", count=3).caption()
    assert caption == "name: n; count: 3; share: 0.3; done: True"


# -- grids -------------------------------------------------------------------------------------------------


def test_normalized_is_0_as_prompt_and_1_as_source() -> None:
    assert patch_grid().normalized().tolist() == [[0.0, 0.5, 1.0, -0.25]]
    assert not patch_grid().normalized()[0, 0].signbit(), "a cell without an effect is printed as 0.0000, not -0.0000"
    double = patch_grid(torch.tensor([[6.0, 2.0]], dtype=torch.float64)).normalized()
    assert (double.dtype, double.tolist()) == (torch.float64, [[0.0, 0.5]])


def test_prompts_answered_alike_have_no_scale_but_can_be_kept(tmp_path: Path) -> None:
    grid = patch_grid(source_metric=6.0)
    message = refusal(MetricError, grid.normalized)
    assert "prompt and source have the same metric (m: +6)" in message
    assert refusal(MetricError, grid.figure) == message
    assert refusal(MetricError, lambda: grid.save(tmp_path / "a.html")) == message
    assert not list(tmp_path.iterdir())
    assert same_result(PatchGrid.load(grid.save(tmp_path / "a.json")), grid)


def test_an_interrupted_sweep_is_drawn_with_its_cells_missing(tmp_path: Path) -> None:
    grid = patch_grid([[6.0, -2.0], [NAN, NAN]])
    assert not grid.complete
    assert patch_grid().complete
    assert grid.normalized().isnan().tolist() == [[False, False], [True, True]]
    figure = grid.figure()
    assert [*json.loads(figure.to_json())["data"][0]["z"][1]] == [None, None]
    assert figure.data[0].text[1][0].endswith("normalised metric not computed")
    assert grid.caption() == "m: +6.0000 on prompt, -2.0000 on source; 2 of 4 cells not computed"
    for suffix in FORMATS:
        assert same_result(PatchGrid.load(grid.save(tmp_path / f"a{suffix}")), grid)


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "Normalised metric after patching h (hook_h)"),
        ({"window": 3}, "Normalised metric after patching h (hook_h), 3 layers together"),
        ({"method": "attribution"}, "Normalised metric after patching h (hook_h), estimated by attribution"),
        ({"site": "h_read"}, "Normalised metric after patching h_read (mixer.hook_ssm_state)"),
        ({"site": "of my own"}, "Normalised metric after patching of my own"),
    ],
    ids=["plain", "window", "method", "another site", "unknown site"],
)
def test_the_title_says_what_was_done(changes: dict[str, Any], title: str) -> None:
    first, second = patch_grid(**changes).heatmap().title.split("\n")
    assert first == title
    assert second == "m: +6.000 on prompt (0), -2.000 on source (1)"


def test_rows_are_layers_or_one_site() -> None:
    assert patch_grid().heatmap().row_title == "layer"
    assert patch_grid(site="embeddings").heatmap().row_title == "site"
    tokens = patch_grid(prompt_tokens=["a"] * 4, source_tokens=["a", "b", "a", "a"])
    assert tokens.labels == ["a_0", "a ->b_1", "a_2", "a_3"]
    assert tokens.figure().data[0].text[0][1].startswith("layer 0<br>position 1: prompt 'a', source 'b'<br>")


def pearson(one: list[float], other: list[float]) -> float:
    """By the sums of the textbook."""
    n = len(one)
    top = n * sum(map(float.__mul__, one, other)) - sum(one) * sum(other)
    squares = [n * sum(value * value for value in values) - sum(values) ** 2 for values in (one, other)]
    return top / math.sqrt(squares[0] * squares[1])


def test_a_correlation_is_pearsons_over_the_cells_that_both_have() -> None:
    one, other = [1.0, 2.5, -3.0, 7.0, 0.5], [2.0, 1.0, -1.0, 4.0, 4.0]
    grids = patch_grid([[*one, NAN, 5.0]]), patch_grid([[*other, 9.0, INF]])
    assert grids[0].correlation(grids[1]) == pytest.approx(pearson(one, other), abs=1e-12)
    assert grids[1].correlation(grids[0]) == pytest.approx(pearson(one, other), abs=1e-12)
    assert grids[0].correlation(grids[0]) == 1.0
    opposite = replace(grids[0], values=5.0 - 3.0 * grids[0].values.double())
    assert grids[0].correlation(opposite) == pytest.approx(-1.0, abs=1e-12)


def test_a_correlation_without_meaning_is_refused() -> None:
    def message(values: Any, **changes: Any) -> str:
        return refusal(MetricError, lambda: patch_grid().correlation(patch_grid(values, **changes)))

    shapes = message([[1.0, 2.0]])
    assert "h has [1, 4] rows and positions, h [1, 2]" in shapes
    assert "site is 'h' in one and 'resid_pre' in the other" in message([[1.0] * 4], site="resid_pre")
    assert "window is 1 in one and 3 in the other" in message([[1.0] * 4], window=3)
    assert "have 1 cells in common that are computed and finite; a correlation needs two" in message(
        [[1.0, NAN, INF, NAN]]
    )
    constant = message([[0.1] * 4], method="attribution")
    assert "the grid of h (attribution) is +0.1 in all 4 cells, so nothing can correlate" in constant


# -- the report --------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """The tags of a page, its texts outside of scripts, and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)
        elif data.strip():
            self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for one, text in self.texts if one == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    attention = Everything(torch.eye(2), name="</script><script>alert(1)</script>", count=5)
    results: dict[str, Result] = {"The state": patch_grid(metric="<m>"), "A <b> & C": attention}
    path = tmp_path_factory.mktemp("report") / "report.html"
    return Report(results, title="Who & <why>?").save(path).read_text(encoding="utf-8")


def test_the_page_has_plotly_once_and_needs_no_network(page: str) -> None:
    outline = Outline(page)
    assert sum(len(script) > 1_000_000 for script in outline.scripts) == 1
    assert sum("Plotly.newPlot(" in script and len(script) < 1e6 for script in outline.scripts) == 2
    linked = [value for _, attrs in outline.tags for name, value in attrs.items() if name in ("src", "href")]
    assert linked == ["#section-1", "#section-2"]


def test_the_page_has_headings_figures_captions_and_contents(page: str) -> None:
    outline = Outline(page)
    assert outline.of("h1") == outline.of("title") == ["Who & <why>?"]
    assert outline.of("h2") == outline.of("a") == ["The state", "A <b> & C"]
    assert outline.of("p") == [
        "<m>: +6.0000 on prompt, -2.0000 on source",
        "name: </script><script>alert(1)</script>; count: 5; share: 0.3; done: True",
    ]
    ids = [attrs["id"] for _, attrs in outline.tags if attrs.get("id")]
    assert ids == ["section-1", "figure-1", "section-2", "figure-2"]
    assert ("meta", {"charset": "utf-8"}) in outline.tags


def test_what_is_markup_in_a_result_is_none_in_the_page(page: str) -> None:
    assert not [tag for tag, _ in Outline(page).tags if tag in ("m", "b", "why")]
    assert not [script for script in Outline(page).scripts if script.startswith("alert")]
    drawn = [script for script in Outline(page).scripts if "figure-2" in script]
    assert len(drawn) == 1
    assert r"\u003c" in drawn[0], "what a string of the figure has of markup is spelt out"


def test_a_report_is_a_mapping_of_headings_to_results() -> None:
    grid = patch_grid()
    report = Report({"b": grid, "a": grid})
    assert list(report) == ["b", "a"]
    assert report["a"] is grid
    assert repr(report) == "Report('Report': 'b', 'a')"


def test_reports_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    assert "'x' is a Tensor; a report holds results" in refusal(
        TypeError,
        lambda: Report({"x": torch.eye(2)}),  # type: ignore[dict-item]
    )
    assert "has no results; give it at least one" in refusal(FileError, lambda: Report({}).save(path))
    assert "a result is saved as .html, not .json" in refusal(
        FileError, lambda: Report({"x": patch_grid()}).save(tmp_path / "a.json")
    )
    same_answers = Report({"x": patch_grid(source_metric=6.0)})
    assert "the same metric" in refusal(MetricError, lambda: same_answers.save(path))
    assert not path.exists()
    assert re.search(r"no folder", refusal(FileError, lambda: same_answers.save(tmp_path / "no" / "a.html")))
