"""Pictures show every number in its place, on a scale around zero, with nothing overlapping or cut."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from mamba_trace.errors import FileError, MissingExtraError
from mamba_trace.results.files import check_writable
from mamba_trace.results.heatmap import Heatmap, spelt
from mamba_trace.results.interactive import plotly_figure
from mamba_trace.results.layout import LINE, SLANTED, measured, stacked
from mamba_trace.results.png import static_figure, write_png
from mamba_trace.results.terminal import terminal_table

WORDS = ["Lately", ",", " Emma", " and", " Shelby", " had", " fun", " at", " school", ".", " <|endoftext|>"]
NAN, INF = math.nan, math.inf


def picture(values: Any, **changes: Any) -> Heatmap:
    """A heatmap of values, rows by columns, whose columns are tokens."""
    values = torch.as_tensor(values)
    rows, columns = values.shape
    labels = [f"{WORDS[column % len(WORDS)]}_{column}" for column in range(columns)]
    settings: dict[str, Any] = {
        "title": "A title",
        "row_title": "layer",
        "row_labels": [str(row) for row in range(rows)],
        "column_labels": labels,
    }
    return Heatmap(values=values, **(settings | changes))


def shaped(rows: int, columns: int, **changes: Any) -> Heatmap:
    generator = torch.Generator().manual_seed(rows)
    return picture(torch.randn(rows, columns, generator=generator), **changes)


def square(size: int) -> Heatmap:
    heatmap = shaped(size, size)
    return shaped(size, size, row_labels=heatmap.column_labels, row_title="reading position")


def lens(rows: int, columns: int) -> Heatmap:
    texts = [[WORDS[(row + column) % len(WORDS)] for column in range(columns)] for row in range(rows)]
    return shaped(rows, columns, texts=texts)


SIZES: dict[str, list[Heatmap]] = {
    "1x15": [shaped(1, 15, value_title="normalised metric")],
    "first label": [shaped(8, 15, column_labels=["a_very_long_first_token_0", *map(str, range(14))])],
    "8x1": [shaped(8, 1)],
    "8x15": [shaped(8, 15)],
    "24x17": [shaped(24, 17)],
    "64x300": [shaped(64, 300)],
    "17x17": [square(17)],
    "120x120": [square(120)],
    "lens 9x15": [lens(9, 15)],
    "three": [shaped(8, 15, title="two\nlines"), square(17), lens(9, 15)],
}
every_size = pytest.mark.parametrize("heatmaps", SIZES.values(), ids=SIZES.keys())


# -- what every drawing agrees on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([[1.0, -3.0]], 3.0),
        ([[1e-6, 0.0]], 1e-6),
        ([[0.0, 0.0]], 1.0),
        ([[NAN, 0.5]], 0.5),
        ([[INF, -2.0]], 2.0),
        ([[NAN, NAN]], 1.0),
        (torch.tensor([[3, -1]]), 3.0),
        (torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16), 0.5),
        (torch.empty(0, 3), 1.0),
    ],
    ids=["signs", "small", "zeros", "nan", "inf", "nans", "integers", "bfloat16", "empty"],
)
def test_the_scale_is_the_largest_finite_value(values: Any, scale: float) -> None:
    assert picture(values).scale == pytest.approx(scale, rel=1e-6)


def test_the_scale_is_never_finer_than_the_resolution() -> None:
    assert picture([[1e-7]], resolution=0.005).scale == 0.005
    assert picture([[0.5]], resolution=0.005).scale == 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"row_labels": ["0"]}, "1 row_labels for values of shape [2, 3]"),
        ({"column_labels": ["a"] * 4}, "4 column_labels for values of shape [2, 3]"),
        ({"prompt_tokens": ["a"]}, "1 prompt_tokens for values of shape [2, 3]"),
        ({"source_tokens": []}, "0 source_tokens for values of shape [2, 3]"),
        ({"texts": [["a"] * 3]}, "texts must hold one string for each of the [2, 3] values"),
        ({"hover": [["a"] * 3, ["a"]]}, "hover must hold one string for each of the [2, 3] values"),
    ],
    ids=["rows", "columns", "prompt", "source", "texts", "hover"],
)
def test_labels_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        shaped(2, 3, **changes)


def test_values_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[rows, columns\], not a tensor of shape \[3\]"):
        Heatmap(values=torch.ones(3), title="", row_title="", row_labels=[], column_labels=[])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Emma_2", " Emma_2"),
        ("\n_3", "\\n_3"),
        ("a\tb\u200b", "a\\tb\\u200b"),
        ("日本語", "日本語"),
        ("a_very_long_token_that_goes_on_31", "a_very_long_token_th…_31"),
        ("日" * 20 + "_7", "日" * 10 + "…_7"),
    ],
    ids=["space", "newline", "invisible", "wide", "long", "long and wide"],
)
def test_labels_are_spelt_in_one_line_and_keep_their_position(text: str, shown: str) -> None:
    assert spelt(text, 24) == shown
    assert cell_len(spelt(text, 24)) <= 24


# -- plotly ------------------------------------------------------------------------------------------------


def test_the_figure_is_the_matrix_centred_at_zero() -> None:
    heatmap = picture([[0.5, -2.0], [0.0, 1.0], [1.0, 0.25]])
    figure = plotly_figure(heatmap)
    (drawn,) = figure.data
    assert (
        drawn.z == ([0.5, -2.0], [0.0, 1.0], [1.0, 0.25]) or [*map(list, drawn.z)] == heatmap.values.tolist()
    )
    assert [[*row] for row in drawn.z] == heatmap.values.tolist()
    assert drawn.zmid == 0
    assert (drawn.zmin, drawn.zmax) == (-2.0, 2.0)
    assert drawn.colorscale[0][1] == "rgb(103,0,31)", "red for negative"
    assert drawn.colorscale[5][1] == "rgb(247,247,247)", "white for zero"
    assert drawn.colorscale[-1][1] == "rgb(5,48,97)", "blue for positive"
    assert figure.layout.yaxis.autorange == "reversed", "layer 0 on top"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Position", "Layer")
    assert figure.layout.title.text == "A title"
    assert drawn.colorbar.title.text == "value"


def test_markup_in_labels_titles_and_words_is_shown_as_it_is() -> None:
    given = {"texts": [["<b>"]], "title": "<i>\nb", "row_labels": ["<s>"], "value_title": "a<b"}
    figure = plotly_figure(picture([[1.0]], column_labels=["<|endoftext|>_0"], **given))
    drawn, layout = figure.data[0], figure.layout
    assert layout.xaxis.ticktext == ("&lt;|endoftext|&gt;_0",)
    assert layout.yaxis.ticktext == ("&lt;s&gt;",)
    assert layout.title.text == "&lt;i&gt;<br>b"
    assert drawn.text[0][0] == "&lt;b&gt;"
    assert drawn.colorbar.title.text == "a&lt;b"
    assert drawn.hovertext[0][0].split("<br>")[0] == "layer &lt;s&gt;"
    dollars = plotly_figure(picture([[1.0]], column_labels=["$a$"])).layout.xaxis.ticktext
    assert dollars == ("&#36;a&#36;",), "no formula, where MathJax is loaded"


def test_a_cell_says_its_row_column_and_value() -> None:
    plain = plotly_figure(picture([[1.0, -0.00004]], value_title="alpha")).data[0]
    assert plain.text[0][0] == "layer 0<br>position Lately_0<br>alpha +1.0000"
    assert plain.text[0][1] == "layer 0<br>position ,_1<br>alpha +0.0000", "no negative zero"
    assert plain.hoverinfo == "text"
    tokens = {"prompt_tokens": ["a", "\n"], "source_tokens": ["a", " b"]}
    compared = plotly_figure(picture([[1.0, 2.0]], **tokens)).data[0].text[0]
    assert compared[0] == "layer 0<br>position 0: token 'a'<br>value +1.0000"
    assert compared[1] == "layer 0<br>position 1: prompt '\\n', source ' b'<br>value +2.0000"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.00012, 0.0005], ["+0.00012000", "+0.00050000"]),
        ([12345.678, -5.0], ["+12346", "-5"]),
        ([1e-9, 0.0], ["+1e-09", "+0"]),
        ([INF, 1.0], ["+inf", "+1.0000"]),
        ([NAN, 1.0], ["not computed", "+1.0000"]),
    ],
    ids=["small", "large", "tiny", "infinite", "not computed"],
)
def test_a_value_is_said_as_finely_as_the_scale_is(values: list[float], words: list[str]) -> None:
    hover = picture(torch.tensor([values], dtype=torch.float64)).hover_texts()[0]
    assert [text.split("value ")[1] for text in hover] == words


def test_words_of_a_cell_can_be_given() -> None:
    drawn = plotly_figure(picture([[1.0, 2.0]], hover=[["one\ntwo", "<3"]], texts=[[" Emma", "\n"]])).data[0]
    assert [*drawn.hovertext[0]] == ["one<br>two", "&lt;3"]
    assert [*drawn.text[0]] == [" Emma", "\\n"]
    assert drawn.texttemplate == "%{text}"


def test_cells_without_a_number_are_grey_and_infinite_ones_saturate() -> None:
    figure = plotly_figure(picture([[NAN, INF, -INF, 0.0, 2.0]]))
    (drawn,) = figure.data
    content = json.loads(figure.to_json())["data"][0]["z"][0]
    assert content == [None, 2.0, -2.0, 0.0, 2.0]
    assert drawn.hoverongaps
    assert figure.layout.plot_bgcolor == "rgb(190,190,190)"
    assert "rgb(190,190,190)" not in [colour for _, colour in drawn.colorscale]


@every_size
def test_pictures_in_a_figure_have_room_for_titles_labels_and_bars(heatmaps: list[Heatmap]) -> None:
    figure, stack = plotly_figure(heatmaps), stacked(heatmaps)
    layout = figure.layout
    margin, height = layout.margin, layout.height - layout.margin.t - layout.margin.b
    width = layout.width - margin.l - margin.r
    assert not margin.autoexpand
    end = 0.0  # of the picture above, in pixels from the top
    for number, (drawn, panel) in enumerate(zip(figure.data, stack.panels, strict=True), start=1):
        suffix = "" if number == 1 else str(number)
        across, down = layout[f"xaxis{suffix}"], layout[f"yaxis{suffix}"]
        top, bottom = (margin.t + (1 - edge) * height for edge in reversed(down.domain))
        assert top - 19 * len(panel.title) >= end, "the title is below the labels of the picture above"
        assert bottom - top == pytest.approx(panel.height)
        longest = max(cell_len(label) for label in panel.columns.labels)
        end = bottom + 0.7 * 6 * longest + 14
        assert (across.domain[1] - across.domain[0]) * width == pytest.approx(panel.width)
        assert margin.l >= 6 * max(cell_len(label) for label in panel.rows.labels) + 14
        assert drawn.colorbar.len == panel.height
        assert 1 - drawn.colorbar.y == pytest.approx(((top + bottom) / 2 - margin.t) / height)
        assert margin.r >= drawn.colorbar.thickness + 80
    assert layout.height >= end
    assert layout.width <= 1500 or any(heatmap.texts for heatmap in heatmaps)


def test_every_picture_of_a_stack_has_its_own_title_axes_and_scale() -> None:
    figure = plotly_figure([picture([[1.0]], title="one"), picture([[-2.0]], title="two")])
    assert [note.text for note in figure.layout.annotations] == ["one", "two"]
    assert [(drawn.xaxis, drawn.yaxis) for drawn in figure.data] == [("x", "y"), ("x2", "y2")]
    assert [drawn.zmax for drawn in figure.data] == [1.0, 2.0]
    assert figure.layout.yaxis2.anchor == "x2"
    assert figure.layout.title.text is None


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no heatmap to draw"):
        plotly_figure([])
    with pytest.raises(ValueError, match="no heatmap to draw"):
        write_png([], tmp_path / "a.png")


# -- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 15, 64, 65, 300, 500])
def test_labels_are_thinned_to_those_that_fit(columns: int) -> None:
    panel = measured(shaped(64, columns))
    places = panel.columns.places
    assert places[0] == 0
    assert len({b - a for a, b in pairwise(places)}) <= 1
    assert len(places) * SLANTED <= panel.width + SLANTED
    assert len(places) == columns or len(places) > 30, "and no further"
    assert len(panel.rows.places) * LINE <= panel.height + LINE
    labels = shaped(64, columns).column_labels
    assert panel.columns.labels == [spelt(labels[place], 24) for place in places]


@pytest.mark.parametrize("size", [2, 17, 120, 500])
def test_token_by_token_cells_are_squares(size: int) -> None:
    panel = measured(square(size))
    assert panel.width == panel.height <= 900
    axis = plotly_figure(square(size)).layout.yaxis if size <= 17 else None
    assert axis is None or (axis.scaleanchor, axis.constrain) == ("x", "domain")
    assert plotly_figure(shaped(2, 3)).layout.yaxis.scaleanchor is None


def test_long_titles_are_broken_to_the_width_of_the_picture() -> None:
    panel = measured(shaped(3, 5, title="word " * 60 + "\nand another line"))
    assert len(panel.title) > 4
    assert panel.title[-1] == "and another line"
    assert " ".join(panel.title) == ("word " * 60 + "and another line")


# -- PNG ---------------------------------------------------------------------------------------------------


@every_size
def test_nothing_in_a_png_overlaps(heatmaps: list[Heatmap]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = static_figure(heatmaps)
    renderer = FigureCanvasAgg(figure).get_renderer()
    whole = figure.get_tightbbox(renderer)  # in inches
    width, height = figure.get_size_inches()
    assert whole.x0 >= 0, "nothing is cut"
    assert whole.y0 >= 0
    assert whole.x1 <= width
    assert whole.y1 <= height
    end = math.inf  # the lower edge of the picture above
    for number, heatmap in enumerate(heatmaps):
        cells, bar = figure.axes[2 * number : 2 * number + 2]
        box = cells.get_tightbbox(renderer)
        assert box.y1 < end, "no title runs into the labels above"
        end = box.y0
        area, colours = cells.get_window_extent(renderer), bar.get_tightbbox(renderer)
        assert area.x1 < colours.x0
        assert colours.height <= area.height + 2 * LINE
        lines = [label.get_window_extent(renderer) for label in cells.get_yticklabels()]
        assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(lines))
        assert cells.yaxis.label.get_window_extent(renderer).x1 <= min(line.x0 for line in lines)
        slanted = [label.get_window_extent(renderer) for label in cells.get_xticklabels()]
        gaps = [second.x1 - first.x1 for first, second in pairwise(slanted)]
        assert min(gaps, default=99) * math.sqrt(0.5) >= 11, "11 pixels is a line's height"
        assert cells.xaxis.label.get_window_extent(renderer).y1 <= min(label.y0 for label in slanted)
        for text in cells.texts:
            assert text.get_window_extent(renderer).width <= area.width / heatmap.values.shape[1]
        if heatmap.square:
            assert area.width == pytest.approx(area.height)


def test_a_png_has_the_colours_of_its_numbers(tmp_path: Path) -> None:
    from matplotlib.image import imread

    write_png(picture([[1.0, 0.0, NAN, -1.0, INF, -INF]]), tmp_path / "a.png")
    pixels = torch.from_numpy(imread(tmp_path / "a.png"))[..., :3]
    for colour, share in (((5, 48, 97), 2), ((247, 247, 247), 1), ((191, 191, 191), 1), ((103, 0, 31), 2)):
        near = ((pixels * 255 - torch.tensor(colour)).abs() < 3).all(-1).sum().item()
        cell = 420 / 6 * 90 * 1.5**2
        assert share * cell * 0.9 < near < share * cell * 1.2, colour


def test_a_png_is_as_large_as_its_matrix_needs(tmp_path: Path) -> None:
    def size(heatmap: Heatmap) -> tuple[int, int]:
        write_png(heatmap, tmp_path / "a.png")
        content = (tmp_path / "a.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        return struct.unpack(">II", content[16:24])

    small, large = size(shaped(8, 15)), size(shaped(64, 300))
    assert large[0] > 1.5 * small[0]
    assert large[1] > 2 * small[1]


@pytest.mark.filterwarnings("error")
def test_what_the_font_lacks_and_dollars_are_spelt_out() -> None:
    labels = ["$x$_0", " 日本語_1", "\n_2"]
    cells = static_figure(picture([[1.0, 2.0, 3.0]], column_labels=labels, title="$\\frac$")).axes[0]
    shown = [label.get_text() for label in cells.get_xticklabels()]
    assert shown == [r"\$x\$_0", r" \u65e5\u672c\u8a9e_1", r"\n_2"]
    assert cells.get_title(loc="left") == r"\$\frac\$"


# -- the terminal ------------------------------------------------------------------------------------------


def table(values: list[list[float]], **changes: Any) -> Heatmap:
    tokens = [" tok", " longer_than_a_cell", "\n", " ", " 日本語", ","][: len(values[0])]
    tokens += [f" t{i}" for i in range(len(tokens), len(values[0]))]
    runs = {"prompt_tokens": tokens, "source_tokens": [" other", *tokens[1:]]}
    return picture(values, **({**runs, "resolution": 0.005} | changes))


def printed(heatmap: Heatmap, width: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(terminal_table(heatmap, width), soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_reads_without_colours() -> None:
    text = printed(table([[0.0, 1.0, -1.0, 0.5, 12.34, NAN]]), 100)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["0", "1", "2", "3", "4", "5"]
    assert lines[1][:2] == ["prompt", "tok"]
    assert lines[1][3:] == ["\\n", "'", "'", "日本語", ","]
    assert lines[2] == ["source", "other"]
    assert lines[3] == ["layer", "0", "·", "+1.00", "-1.00", "+0.50", "+12.3", "?"]


def test_the_table_has_no_line_for_a_source_that_is_the_prompt() -> None:
    same = table([[1.0]], source_tokens=[" tok"])
    assert [line.split()[0] for line in printed(same, 80).splitlines()] == ["0", "prompt", "layer"]


def test_a_table_without_tokens_has_the_labels_of_its_columns() -> None:
    lines = printed(picture([[1.0, 2.0]], column_title="Source"), 80).splitlines()
    assert lines[1].split() == ["source", "Lately_0", ",_1"]
    numbered = printed(picture([[1.0, 2.0]], column_labels=["0", "1"]), 80).splitlines()
    assert [line.split() for line in numbered] == [["0", "1"], ["layer", "0", "+1.00", "+2.00"]]


def test_a_table_of_texts_shows_them_in_the_colours_of_the_values() -> None:
    text = terminal_table(picture([[1.0, 0.0]], texts=[[" Emma", "\n"]]), 80)
    assert text.plain.splitlines()[-1].split() == ["layer", "0", "Emma", "\\n"]
    assert "white on rgb(33,102,172)" in [str(span.style) for span in text.spans]


def test_small_numbers_are_printed_in_a_unit_that_the_corner_names() -> None:
    lines = printed(picture([[0.0012, -0.0006, 0.0]]), 80).splitlines()
    assert lines[0].split() == ["x", "1e-03", "0", "1", "2"]
    assert lines[-1].split() == ["layer", "0", "+1.20", "-0.60", "·"]


@pytest.mark.parametrize("width", [10, 30, 60, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    lines = printed(table([[column / 17 for column in range(17)]]), width).splitlines()
    assert max(cell_len(line) for line in lines) <= max(width, len("layer 0 ") + 6), "one column, at least"
    shown = [number for line in lines if line.startswith("layer 0") for number in line.split()[2:]]
    assert len(shown) == 17
    assert (lines.count("") == 0) == (width == 120)


def test_row_labels_of_any_width_stay_in_line() -> None:
    rows = [" 日本語_0", "\n_1", " a_very_long_token_that_goes_on_2"]
    lines = printed(picture([[1.0]] * 3, row_labels=rows, row_title="token"), 80).splitlines()
    assert len({cell_len(line) for line in lines}) == 1
    assert lines[-2].startswith("token \\n_1 ")


def test_colours_diverge_from_zero_and_can_be_refused() -> None:
    heatmap = table([[0.0, 1.0, -1.0, 0.5]])
    text = printed(heatmap, 80, force_terminal=True, color_system="truecolor")
    assert "48;2;33;102;172m" in text
    assert "48;2;178;24;43m" in text
    assert "48;2;140;174;210m" in text, "half way to blue"
    plain = printed(heatmap, 80, force_terminal=True, no_color=True)
    assert "48;2" not in plain
    assert "+1.00" in plain


def test_rounding_is_not_painted() -> None:
    text = printed(table([[1e-7, -1e-7, 0.0]]), 80, force_terminal=True, color_system="truecolor")
    assert "48;2" not in text


# -- files -------------------------------------------------------------------------------------------------


def test_asking_whether_a_file_can_be_written_changes_nothing(tmp_path: Path) -> None:
    there, link = tmp_path / "there.json", tmp_path / "link.json"
    there.write_text("old", encoding="utf-8")
    link.symlink_to(tmp_path / "new.json")
    for path in (there, link, tmp_path / "other.safetensors"):
        assert check_writable(path) == path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "there.json"]
    assert there.read_text(encoding="utf-8") == "old"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(FileError) as caught:
            check_writable(tmp_path / name)
        return str(caught.value)

    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    assert "folder.json cannot be written: Is a directory. Choose another place" in refusal("folder.json")
    assert "loop.json cannot be written: " in refusal("loop.json")
    assert "there is no folder" in refusal("no/grid.json")
    assert "saved as .html, .png, .json, .safetensors, not .pdf" in refusal("grid.pdf")
    assert "not without a suffix" in refusal("grid")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "loop.json"]


def test_a_folder_that_takes_no_new_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "there.json"
    path.write_text("old", encoding="utf-8")

    def refuse(self: Path) -> None:
        assert self.parent == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(FileError, match=r"there\.json cannot be written: Permission denied"):
        check_writable(path)


@pytest.mark.parametrize(
    ("module", "suffix"), [("plotly.graph_objects", "html"), ("matplotlib.figure", "png")]
)
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, suffix: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        check_writable(tmp_path / f"grid.{suffix}")
    assert f"needs {module.partition('.')[0]}: pip install 'mamba_trace[plot]'" in str(caught.value)
