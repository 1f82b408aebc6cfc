"""Figures and the report in a browser: nothing lies on anything else, every label can be read, nothing is fetched.

What is measured is what Chromium has drawn. A turned label is compared by its own corners, since the upright box
around it holds much that is empty.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import lens, shaped, square
from test_notebook import Drawn

from mamba_trace.results import Report
from mamba_trace.results.heatmap import Heatmap

TITLE = (
    "Normalised metric after patching h (hook_h), 3 layers together\n"
    "logit of ' Emma' minus logit of ' Shelby': +10.848 on prompt (0), -12.637 on source (1)"
)


def titled(heatmap: Heatmap, **changes: Any) -> Heatmap:
    return replace(heatmap, title=TITLE, value_title="normalised metric", **changes)


def unsigned(heatmap: Heatmap) -> Heatmap:
    return titled(heatmap, values=heatmap.values.abs(), signed=False)


def long_labels(rows: int, columns: int) -> Heatmap:
    labels = [f" a_very_long_token_that_goes_on_{column}" for column in range(columns)]
    return titled(shaped(rows, columns, column_labels=labels))


KINDS: dict[str, list[Heatmap]] = {
    **{f"grid {rows}x{columns}": [titled(shaped(rows, columns))] for rows, columns in [(1, 1), (8, 15), (48, 15)]},
    **{f"grid {rows}x{columns}": [titled(shaped(rows, columns))] for rows, columns in [(8, 200), (64, 300), (9, 1)]},
    **{f"map {size}x{size}": [unsigned(square(size))] for size in (2, 15, 120)},
    **{f"lens {rows}x{columns}": [titled(lens(rows, columns))] for rows, columns in [(9, 15), (49, 15), (9, 200)]},
    "long labels": [long_labels(8, 15)],
    "many long labels": [long_labels(8, 90)],
    "stack": [titled(shaped(8, 15)), unsigned(square(17)), titled(lens(9, 15)), titled(shaped(2, 200))],
    "maps": [unsigned(square(15)) for _ in range(3)],
}

#: Returns what is wrong in the page, in words, and how many labels each axis shows.
MEASURE = r"""
const wrong = [], shown = {};
const name = text => JSON.stringify(text.textContent.slice(0, 40));
function corners(element) {
  const box = element.getBBox(), toScreen = element.getScreenCTM();
  const [l, r, t, b] = [box.x + 1, box.x + box.width - 1, box.y + 1, box.y + box.height - 1];
  return [[l, t], [r, t], [r, b], [l, b]].map(([x, y]) => new DOMPoint(x, y).matrixTransform(toScreen));
}
function upright(element) {
  const {left, right, top, bottom} = element.getBoundingClientRect();
  return [[left, top], [right, top], [right, bottom], [left, bottom]].map(([x, y]) => new DOMPoint(x, y));
}
function apart(one, other) {  // a line along a side of one of them separates them
  for (const shape of [one, other])
    for (const [number, from] of shape.entries()) {
      const to = shape[(number + 1) % 4], across = [from.y - to.y, to.x - from.x];
      const along = points => points.map(point => point.x * across[0] + point.y * across[1]);
      const [mine, theirs] = [along(one), along(other)];
      if (Math.max(...mine) <= Math.min(...theirs) || Math.max(...theirs) <= Math.min(...mine)) return true;
    }
  return false;
}
for (const figure of document.querySelectorAll(".plotly-graph-div")) {
  const all = [...figure.querySelectorAll(".main-svg text")].filter(text => text.textContent.trim());
  const inside = all.filter(text => text.closest(".heatmaplayer"));
  const outside = all.filter(text => !inside.includes(text));
  const areas = [...figure.querySelectorAll(".heatmaplayer image, .cbfills, .modebar-group")];
  const whole = figure.querySelector(".main-svg").getBoundingClientRect();
  const placed = outside.map(text => [text, corners(text)]);
  for (const [number, [text, shape]] of placed.entries()) {
    for (const [other, its] of placed.slice(number + 1))
      if (!apart(shape, its)) wrong.push(`${name(text)} lies on ${name(other)}`);
    for (const area of areas)
      if (!apart(shape, upright(area)))
        wrong.push(`${name(text)} lies on ${area.tagName} ${area.getAttribute("class")}`);
    if (shape.some(({x, y}) => x < whole.left || x > whole.right || y < whole.top || y > whole.bottom))
      wrong.push(`${name(text)} is cut`);
    if (parseFloat(getComputedStyle(text).fontSize) < 10) wrong.push(`${name(text)} is too small`);
  }
  const images = [...figure.querySelectorAll(".heatmaplayer image")];
  for (const [number, one] of images.entries())
    for (const other of [...images.slice(number + 1), ...figure.querySelectorAll(".cbfills")])
      if (!apart(upright(one), upright(other))) wrong.push("a picture lies on a picture or a colour bar");
  for (const [number, trace] of figure.data.entries()) {
    const [x, y] = [trace.xaxis, trace.yaxis].map(name => figure._fullLayout[name[0] + "axis" + name.slice(1)]);
    const [width, height] = [x._length / trace.x.length, y._length / trace.y.length];
    for (const text of images.length > 1 ? [] : inside) {
      const box = text.getBoundingClientRect();
      if (box.width > width || box.height > height) wrong.push(`${name(text)} is larger than its cell`);
    }
    if (x.scaleanchor || y.scaleanchor)
      if (Math.abs(width - height) > 0.5) wrong.push(`cells of ${width} by ${height} pixels are no squares`);
    for (const [axis, its] of [["x", x], ["y", y]]) {
      const labels = its._vals.filter(value => value.text).map(value => value.text);
      shown[`${axis}${number}`] = labels.length;
    }
  }
}
return [wrong, shown];
"""
#: The contrast of every text of the page, outside of figures, with what is behind it.
CONTRAST = r"""
function rgb(colour) { return colour.match(/[\d.]+/g).map(Number); }
function light(colour) {
  const parts = rgb(colour).slice(0, 3).map(part => part / 255);
  const [r, g, b] = parts.map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if ((rgb(colour)[3] ?? 1) > 0) return colour;
  }
  return "rgb(255, 255, 255)";
}
const texts = [...document.querySelectorAll("h1, h2, p, a")];
return texts.filter(element => !element.closest(".plotly-graph-div")).map(element => {
  const [one, other] = [light(getComputedStyle(element).color), light(behind(element))];
  return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if program is None or driver is None:
        pytest.skip("needs the programs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in ("no-first-run", "background-networking", "component-update", "sync"):
        options.add_argument(f"--{switch}" if switch.startswith("no-") else f"--disable-{switch}")
    for switch in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def opened(browser: Any, path: Path) -> list[str]:
    """Open a page and wait until its figures are drawn. Returns the addresses that it asked for."""
    browser.get(path.as_uri())
    browser.set_script_timeout(60)
    browser.execute_async_script(
        "const done = arguments[0], wait = () => [...document.querySelectorAll('.plotly-graph-div')]"
        ".every(figure => figure.querySelector('.heatmaplayer image')) ? done() : setTimeout(wait, 50); wait();"
    )
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def from_the_network(addresses: list[str]) -> list[str]:
    return [address for address in addresses if not address.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_lies_on_anything_else(browser: Any, tmp_path: Path, kind: str) -> None:
    heatmaps = KINDS[kind]
    asked = opened(browser, Drawn(heatmaps).save(tmp_path / "figure.html"))
    assert from_the_network(asked) == []
    wrong, shown = browser.execute_script(MEASURE)
    assert wrong == []
    for number, heatmap in enumerate(heatmaps):
        rows, columns = heatmap.values.shape
        assert 1 <= shown[f"y{number}"] <= rows
        assert shown[f"x{number}"] == columns if columns <= 20 else 10 <= shown[f"x{number}"] <= columns
        assert shown[f"y{number}"] == rows if rows <= 20 else 10 <= shown[f"y{number}"] <= rows


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = {f"Section <{kind}>": Drawn(KINDS[kind]) for kind in ("grid 8x15", "map 15x15", "lens 9x15", "stack")}
    return Report(results, title="Who gets the apple?").save(tmp_path_factory.mktemp("page") / "report.html")


def test_a_report_needs_no_network_and_nothing_lies_on_anything_else(browser: Any, page: Path) -> None:
    assert from_the_network(opened(browser, page)) == []
    wrong, _ = browser.execute_script(MEASURE)
    assert wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_can_be_read_by_day_and_by_night(browser: Any, page: Path, scheme: str) -> None:
    emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
    opened(browser, page)
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
    contrasts = browser.execute_script(CONTRAST)
    assert len(contrasts) >= 13
    assert min(contrasts) >= 4.5, "what the WCAG ask for"
