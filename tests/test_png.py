"""Nothing in a PNG overlaps or is cut, from 1 row to 300 columns."""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pictures import INF, NAN, every_size, picture, shaped

from mamba_trace.results.heatmap import LINE, Heatmap
from mamba_trace.results.png import static_figure, write_png


@every_size
def test_nothing_in_a_png_overlaps(heatmaps: list[Heatmap]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = static_figure(heatmaps)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # lays it out
    whole = figure.get_tightbbox(renderer)  # in inches
    width, height = figure.get_size_inches()
    assert whole.x0 >= 0, "nothing is cut"
    assert whole.y0 >= 0
    assert whole.x1 <= width
    assert whole.y1 <= height
    end = math.inf  # the lower edge of the picture above
    for heatmap, cells in zip(heatmaps, figure.axes, strict=True):
        (bar,) = cells.child_axes
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
        places = cells.transData.transform([(at, 0) for at in cells.get_xticks()])[:, 0]
        gaps = [second - first for first, second in pairwise(places)]
        assert min(gaps, default=99) * math.sqrt(0.5) >= 11, "11 pixels is a line's height"
        assert cells.xaxis.label.get_window_extent(renderer).y1 <= min(label.y0 for label in slanted)
        for text in cells.texts:
            assert text.get_window_extent(renderer).width <= area.width / heatmap.values.shape[1]
        if heatmap.square:
            assert area.width == pytest.approx(area.height, rel=1e-3)  # to a tenth of a pixel


def test_a_png_has_the_colours_of_its_numbers(tmp_path: Path) -> None:
    from matplotlib.image import imread

    heatmap = picture([[1.0, 0.0, NAN, -1.0, INF, -INF]])
    write_png(heatmap, tmp_path / "a.png")
    figure = static_figure(heatmap)
    figure.draw_without_rendering()
    area = figure.axes[0].get_window_extent()  # at 100 pixels to the inch, and the file at 150
    cell = area.width / 6 * area.height * 1.5**2
    pixels = torch.from_numpy(imread(tmp_path / "a.png"))[..., :3]
    for colour, share in (((5, 48, 97), 2), ((247, 247, 247), 1), ((191, 191, 191), 1), ((103, 0, 31), 2)):
        near = ((pixels * 255 - torch.tensor(colour)).abs() < 3).all(-1).sum().item()
        assert share * cell * 0.95 < near < share * cell * 1.05, colour


def test_what_cannot_be_negative_is_white_at_zero_and_blue(tmp_path: Path) -> None:
    (image,) = static_figure(picture([[0.0, 0.5]], signed=False)).axes[0].images
    assert image.get_clim() == (0.0, 0.5)
    assert image.get_cmap().name == "Blues"


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no heatmap to draw"):
        write_png([], tmp_path / "a.png")


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
