"""In a notebook everything answers: what a cell shows and stores, and what `print` shows."""

from __future__ import annotations

import base64
import json
import struct
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from pictures import SIZES, picture
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.patching.result import PatchGrid
from mamba_trace.results import Report, Result
from mamba_trace.results.heatmap import Heatmap
from mamba_trace.tables import html_table

PLOTLY, PNG, TEXT = "application/vnd.plotly.v1+json", "image/png", "text/plain"


@dataclass(frozen=True, eq=False)
class Drawn(Result):
    """A result of any pictures."""

    pictures: list[Heatmap]
    note: str = "a note"

    def heatmaps(self) -> list[Heatmap]:
        return self.pictures


def grid(*values: float, source_metric: float = -2.0) -> PatchGrid:
    tokens = [f" t{position}" for position in range(len(values))]
    return PatchGrid(torch.tensor([values]), 6.0, source_metric, "h", "m", ["0"], tokens, tokens)


def bundle(shown: Any) -> dict[str, Any]:
    """What the display formatter of a notebook makes of an object."""
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(shown)
    return data


def size_of(png: str) -> tuple[int, int]:
    content = base64.b64decode(png, validate=True)
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">2I", content[16:24])  # type: ignore[return-value]


# -- results -----------------------------------------------------------------------------------------------


def test_a_result_shows_its_figure_its_picture_and_what_print_shows() -> None:
    result = grid(6.0, 2.0, -2.0)
    data = bundle(result)
    assert set(data) == {PLOTLY, PNG, TEXT}
    assert data[TEXT] == str(result)
    assert data[PLOTLY] == json.loads(result.figure().to_json())
    width, height = size_of(data[PNG])
    assert width > 400
    assert height > 100


@pytest.mark.parametrize("kind", ["8x15", "lens 9x15", "17x17", "three"])
def test_a_stored_output_is_small(kind: str) -> None:
    data = bundle(Drawn(SIZES[kind]))
    assert len(json.dumps(data)) < 350_000, "the library that draws alone has 4 megabytes"


def test_print_shows_the_numbers_under_their_tokens() -> None:
    lines = str(grid(6.0, 4.0, -2.0)).splitlines()
    assert lines == [
        "Normalised metric after patching h (hook_h)",
        "m: +6.000 on prompt (0), -2.000 on source (1)",
        "               0        1        2",
        "prompt        t0       t1       t2",
        "layer 0        ·    +0.25    +1.00",
        "",
        "m: +6.0000 on prompt, -2.0000 on source",
    ]


def test_print_names_the_tokens_of_a_map_and_gives_no_sign_to_what_is_never_negative() -> None:
    values = torch.tensor([[0.5, 0.0], [0.25, 12.0]])
    labels = [" a_0", " b_1"]
    shown = picture(values, row_labels=labels, column_labels=labels, signed=False, column_title="Token")
    lines = str(Drawn([shown], note="")).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["A", "title"],
        ["0", "1"],
        ["token", "a_0", "b_1"],
        ["a_0", "0.50", "·"],
        ["b_1", "0.25", "12.00"],
    ]


def test_print_describes_what_is_too_large_for_a_table() -> None:
    values = torch.zeros(64, 300)
    values[3, 250], values[60, 7] = -2.0, 1.5
    values[0, 0] = torch.nan
    text = str(Drawn([picture(values)]))
    assert text.splitlines() == [
        "A title",
        "64 rows (layer) by 300 columns (position)",
        "smallest: layer 3, position  school_250, value -2.0000",
        "largest: layer 60, position  at_7, value +1.5000",
        "",
        "note: a note",
    ]


@pytest.mark.parametrize(
    ("missing", "left"),
    [
        (["plotly.graph_objects"], {PNG, TEXT}),
        (["matplotlib", "matplotlib.figure"], {PLOTLY, TEXT}),
        (["plotly.graph_objects", "matplotlib.figure"], {TEXT}),
    ],
)
def test_without_a_library_the_rest_is_shown(
    monkeypatch: pytest.MonkeyPatch, missing: list[str], left: set[str]
) -> None:
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    assert set(bundle(grid(6.0, 2.0))) == left


def test_a_grid_without_a_scale_says_so_in_words() -> None:
    data = bundle(grid(6.0, 2.0, source_metric=6.0))
    assert set(data) == {TEXT}
    assert "prompt and source have the same metric" in data[TEXT]
    assert data[TEXT].endswith("m: +6.0000 on prompt, +6.0000 on source")


def test_a_report_shows_all_its_results() -> None:
    report = Report({"One <b>": grid(6.0, 2.0), "Two": Drawn(SIZES["8x15"])}, title="Who?")
    data = bundle(report)
    assert set(data) == {PLOTLY, PNG, TEXT}
    assert [drawn["type"] for drawn in data[PLOTLY]["data"]] == ["heatmap", "heatmap"]
    titles = [note["text"].split("<br>")[0] for note in data[PLOTLY]["layout"]["annotations"]]
    assert titles == ["One &lt;b&gt;", "Two"]
    assert data[TEXT] == str(report)
    assert str(report).startswith("Who?\n\nOne <b>\n\nNormalised metric after patching h (hook_h)\n")
    assert set(bundle(Report({}))) == {TEXT}, "nothing to draw"


# -- models ------------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    """The texts of a table, row by row; the texts outside of it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.outside: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside |= tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data
        elif data.strip():
            self.outside.append(data.strip())


def test_markup_in_a_table_is_shown_as_it_is() -> None:
    table = Cells(html_table("a <b>", ["<i>", "&"], [["<td>", "x"]]))
    assert table.outside == ["a <b>"]
    assert table.rows == [["<i>", "&"], ["<td>", "x"]]


def test_a_model_shows_its_sites(tiny: MambaTrace) -> None:
    data = bundle(tiny)
    assert data[TEXT] == repr(tiny)
    head, *rows = Cells(data["text/html"]).rows
    assert head == ["path", "shape", "layers", "hook name", "meaning"]
    sites = {row[0]: row[1:] for row in rows}
    assert sites["embeddings"] == ["[B, L, 12]", "", "hook_embed", "token embeddings"]
    assert sites["layers[l].ssm.h[p]"][:3] == ["[B, 24, 5]", "0 to 2", "blocks.l.hook_h.p"]
    assert sites["layers[l].ssm.h"][:3] == ["[B, L, 24, 5]", "0 to 2", ""]
    listed = repr(tiny).partition("Sites, in the order to ask for them:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == [*sites]


def test_a_hybrid_says_which_layers_have_a_site() -> None:
    model = MambaTrace.demo("hybrid")
    _, *rows = Cells(model._repr_html_()).rows
    for path, _, layers, *_ in rows:
        if path.startswith("layers[l].attn."):
            assert layers == ", ".join(map(str, model.attention_layers))
    assert any(path.startswith("layers[l].attn.") for path, *_ in rows)


def test_the_last_run_shows_what_print_shows(tiny: MambaTrace, tokens: Tensor) -> None:
    assert bundle(tiny.last_run)[TEXT] == "nothing has run yet"
    with torch.no_grad(), tiny.trace(tokens):
        tiny.layers[1].ssm.h[4].output.save()
    data = bundle(tiny.last_run)
    assert data[TEXT] == str(tiny.last_run)
    table = Cells(data["text/html"])
    assert table.outside == ["The last forward call: 9 positions"]
    assert [row[0] for row in table.rows] == ["layers", "0", "1", "2"]
    assert table.rows[2][1:] == [tiny.last_run[1].kernels(), "; ".join(tiny.last_run[1].reasons)]
    assert repr(tiny.last_run[1]) == str(tiny.last_run[1])


def test_the_configuration_shows_a_table(tiny: MambaTrace) -> None:
    data = bundle(tiny.cfg)
    assert data[TEXT] == repr(tiny.cfg)
    head, *rows = Cells(data["text/html"]).rows
    assert head == ["name", "value"]
    assert dict(rows) == {name: repr(value) for name, value in tiny.cfg.to_dict().items()}


@pytest.mark.parametrize("of", ["layers[1]", "layers[1].ssm", "layers[1].ssm.h", "layers[1].ssm.h[3]", "lm_head"])
def test_a_place_shows_its_words(tiny: MambaTrace, of: str) -> None:
    place = eval(f"tiny.{of}", {"tiny": tiny})
    assert bundle(place) == {TEXT: repr(place)}


# -- a kernel ----------------------------------------------------------------------------------------------


def run_cells(*sources: str) -> list[list[Any]]:
    """The outputs of cells, from a kernel."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, timeout=300, allow_errors=True, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


PROMPTS = """
from mamba_trace import MambaTrace
from mamba_trace.patching import logit_diff, patch_grid
model = MambaTrace.demo()
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
source = prompt.replace("Shelby gave", "Emma gave")
"""


def test_progress_without_ipywidgets_warns_of_nothing() -> None:
    without = "import sys\nsys.modules['ipywidgets'] = None"
    sweep = "patch_grid(model, prompt, source, site='h', metric=logit_diff(model, ' Emma', ' Shelby'))"
    _, loaded, swept = run_cells(without, PROMPTS, sweep)
    said = "".join(output.text for output in [*loaded, *swept] if output.output_type == "stream")
    assert "arning: " not in said
    assert "IProgress" not in said
    assert "patching h: 100%" in said
    (shown,) = [output.data for output in swept if output.output_type == "execute_result"]
    assert set(shown) == {PLOTLY, PNG, TEXT}
