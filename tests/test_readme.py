"""The README: its code runs, it prints what it says, and CI runs its test command. Its tables: `test_documentation`."""

import re
import runpy
from pathlib import Path

import pytest

from mamba_trace import __version__

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def found(pattern: str) -> str:
    match = re.search(pattern, README, flags=re.DOTALL)
    assert match, pattern
    return match[1]


def command(name: str) -> str:
    return found(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```")


def printed(code: str, script: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a script from a new file, as nnsight wants to read it, and give the lines that it prints."""
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script))
    return capsys.readouterr().out.splitlines()


def test_every_code_block_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one script. The first block prints what it says, and so does the last."""
    monkeypatch.chdir(tmp_path)
    lines = printed("\n\n".join(blocks()), tmp_path / "readme.py", capsys)
    ((edited, plain),) = re.findall(r"print\(.*# ('.*?'); without the edit it is ('.*?')$", blocks()[0], re.MULTILINE)
    assert lines[0] == edited
    correlation = found(r"print\(estimate\.correlation\(grid\)\)  # (\d\.\d+)")
    assert re.fullmatch(rf"{re.escape(correlation)}\d*", lines[-1])
    assert (tmp_path / "heatmap.html").stat().st_size > 1000
    without = [line for line in blocks()[0].splitlines() if "[:] = 0" not in line]
    assert printed("\n".join(without), tmp_path / "without.py", capsys) == [plain]


def test_it_is_short_and_shows_a_picture() -> None:
    assert len(README.splitlines()) <= 200
    picture = (ROOT / found(r"!\[[^\]]+\]\((.*?\.png)\)")).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000


def test_the_releases_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.*?)\]", changelog, flags=re.MULTILINE)
    assert versions[0] == __version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == __version__


@pytest.mark.parametrize("part", ["pip install -e '.[dev]' && python -m pytest -n 2"])
def test_ci_runs_the_test_command(part: str) -> None:
    assert command("test").endswith(part)
    assert command("test") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_ci_builds_the_documentation() -> None:
    build = "mkdocs build --strict -f tutorials/mkdocs.yml"
    assert build in README
    assert build in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
